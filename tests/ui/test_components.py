"""Components are pure functions from a record to HTML, and nothing a model or a visitor wrote gets through unescaped."""
from __future__ import annotations

import copy
import html
import json
import re

import pytest

from lab.ui import figures, format
from lab.ui.components import cards, charts, columns, dial, metrics, tables, tokens
from lab.ui.live import LiveRun
from lab.ui.state import Address, Decoding

from . import fixture

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def record():
    return fixture.record_and_arrays()[0]


@pytest.fixture
def evil(record):
    """The record with hostile text wherever text can come from a model or a visitor."""
    bad = copy.deepcopy(record)
    bad["name"] = bad["prompt"]["text"] = EVIL
    for variant in bad["variants"]:
        variant.update(title=EVIL, spec=EVIL, error=EVIL, letter='"><script>')
        for token in variant["tokens"]:
            token["text"] = EVIL
            token["alternatives"] = [[1, EVIL, 0.5]]
        for fidelity in variant["fidelity"]:
            fidelity["top"] = [[1, EVIL, 0.5]]
    bad["model"] = {**bad["model"], "id": EVIL, "weights": EVIL, "device": EVIL}
    return bad


def assert_clean(text: str) -> None:
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    for attribute in re.findall(r'="([^"]*)"', text):
        assert "<" not in attribute


def test_every_component_escapes(evil):
    drawn = columns.columns(evil)
    for column in drawn["cols"]:
        for piece in (column["head"], column["dial"], column["note"], column["strip"], *column["own"], *column["forced"]):
            assert_clean(piece)
    assert_clean(tables.costs(evil))
    assert_clean(tables.layers(evil))
    assert_clean(charts.charts(evil))
    assert_clean(cards.model_card(evil["model"]))
    for make in (cards.status, cards.banner, cards.error, cards.empty):
        assert_clean(make(EVIL))
    assert_clean(cards.header(EVIL, EVIL))
    assert "<script" not in figures.kv_growth(evil, {}).to_json()
    assert "<script" not in figures.step_latency(evil).to_json()


def card_of(fragment):
    """What the hover card of one token is drawn from."""
    return json.loads(html.unescape(re.search(r'data-h="([^"]*)"', fragment)[1]))


def test_a_hover_card_holds_one_list_and_names_whose_token_it_is(record):
    reference, variant = record["variants"][:2]
    fork = variant["first_divergence"]
    own = [card_of(f) for f in tokens.own_text(variant, reference)]
    assert [c["k"] for c in own] == ["same"] * fork + ["fork"] + ["after"] * (len(own) - fork - 1)
    assert all(("vp" in c) == ("r" in c) == (c["k"] == "fork") and "top" not in c for c in own)
    assert own[fork]["r"] == format.visible(reference["tokens"][fork]["text"]) != own[fork]["t"]
    forced = [card_of(f) for f in tokens.forced_text(variant, reference)]
    assert all(c["k"] == "forced" and "p" not in c and c["vp"] and c["alt"] for c in forced)
    assert {card_of(f)["k"] for f in tokens.own_text(reference)} == {""}


def test_letters_of_equal_curves_stand_apart_inside_the_chart(record):
    import copy

    equal = copy.deepcopy(record)
    equal["variants"] = [{**equal["variants"][0], "letter": letter} for letter in "ABCD"]
    drawn = charts.kv_chart(equal)
    heights = sorted(float(y) for y in re.findall(r'<text class="tag[^>]* y="([\d.]+)"', drawn))
    assert len(heights) == 4 and heights[0] >= 12 and heights[-1] <= charts.HEIGHT - charts.BOTTOM + 4
    assert all(b - a >= 11.9 for a, b in zip(heights, heights[1:]))


def test_hover_card_survives_the_attribute(record):
    fragment = tokens.own_text(record["variants"][1], record["variants"][0])[3]
    card = card_of(fragment)
    assert card["n"] == 4 and card["c"].startswith("kept") and card["kl"].endswith("nats")
    assert card["alt"][2][0] == "⏎"


def test_underlines_end_at_the_first_divergence_and_the_fork_is_marked_once(record):
    variant = record["variants"][1]
    fork = variant["first_divergence"]
    fragments = tokens.own_text(variant, record["variants"][0])
    assert sum("forkbar" in f for f in fragments) == 1 and "forkbar" in fragments[fork]
    assert not any(re.search(r'class="[^"]*k[123]', f) for f in fragments[fork + 1:])
    forced = tokens.forced_text(variant, record["variants"][0])
    assert len(forced) == len(record["variants"][0]["tokens"])
    assert any(re.search(r'class="[^"]*k[123]', f) for f in forced[fork + 1:])


def test_underline_weight_follows_the_kl():
    assert [tokens.kl_class(x) for x in (None, 0.0, 0.05, 0.3, 2.0)] == ["", "", "k1", "k2", "k3"]


def test_missing_figures_are_a_dash_and_never_zero():
    strip = metrics.metrics({"letter": "B", "techniques": [1]}, {"letter": "A"})
    assert ">0" not in strip and strip.count(format.DASH) >= 6
    assert format.size(None) == format.decimal(None) == format.duration(float("nan")) == format.DASH


def test_the_dial_adds_up(record):
    parts = dial.shares(record["variants"][1])
    assert [bits for bits, _ in parts] == [16, 2, 0]
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert "evicted" in dial.dial(record["variants"][1])
    assert "not known" in dial.dial({"layers": []})


def test_masking_techniques_say_that_they_store_the_same(record):
    variant = {**record["variants"][1], "simulated": True}
    assert "reads less, stores the same" in columns.head(variant, False, "X")


def test_variants_of_one_title_are_told_apart_by_what_differs(record):
    a, b, c = (dict(v) for v in record["variants"])
    for v, bits in ((b, 8), (c, 4)):
        v.update(title="Integer codes", techniques=[{"name": "int_codes", "params": {"bits": bits, "group_size": 64}}])
    assert format.titles([a, b, c]) == {"A": "Dense", "B": "Integer codes · bits 8", "C": "Integer codes · bits 4"}
    drawn = columns.columns({**record, "variants": [a, b, c]})["cols"]
    assert ["bits" in column["head"].split("<p")[0] for column in drawn] == [False, True, True]
    assert [line.name for line in figures.step_latency({**record, "variants": [b, c]}).data] == [
        "B · Integer codes · bits 8", "C · Integer codes · bits 4"]


@pytest.mark.parametrize(("times", "told"), [([8.0], "8.0 ms"), ([4.0, 8.0, 30.0], "8.0 ms")])
def test_few_steps_are_charted_within_what_was_measured(record, times, told):
    variant = {**record["variants"][0], "tokens": [{"step_ms": None}, *({"step_ms": t} for t in times)]}
    drawn = charts.step_chart({**record, "variants": [variant]})
    assert f"A median {told}" in drawn


def test_a_run_without_a_step_says_so_in_place_of_axes_and_figures(record):
    empty = {**record, "variants": [{**v, "tokens": []} for v in record["variants"]]}
    assert tables.costs(empty).count("ended before it wrote a token") == 3 and "ended before" not in tables.costs(record)
    figure = figures.step_latency(empty)
    assert "no step" in figure.layout.annotations[0].text and figure.layout.xaxis.visible is False


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1023, "1023 B"), (46080, "45.0 KiB"), (97_255_424, "92.8 MiB")])
def test_sizes(value, text):
    assert format.size(value) == text


def test_measured_is_solid_and_predicted_dashed(record):
    figure = figures.kv_growth(record, {"A": ([130, 2048], [1e5, 2e6])})
    dashes = {trace.name: trace.line.dash for trace in figure.data}
    assert dashes["A · predicted"] == "dash"
    assert all(dash is None for name, dash in dashes.items() if "predicted" not in name)
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_a_stream_ends_in_what_the_saved_run_shows(record):
    lab = fixture.FakeLab(step_s=0)
    variants = [{"techniques": v["techniques"]} for v in record["variants"]]
    live = LiveRun([{"spec": v["spec"], "title": v["title"], "techniques": v["techniques"]} for v in record["variants"]], "p")
    outcome = None
    for event in lab.run("p", variants, {"max_new_tokens": 40}, fixture.Job()):
        if isinstance(event, fixture.Outcome):
            outcome = event
        else:
            live.apply(event)
    shown = live.columns()
    for column, variant in zip(shown["cols"], outcome.record["variants"], strict=True):
        assert len(column["own"]) == len(variant["tokens"])
    assert live.record["variants"][1]["first_divergence"] == record["variants"][1]["first_divergence"]
    assert not any(column["writing"] for column in shown["cols"])


def test_address_ignores_nonsense():
    wrong = (("variant", "Z"), ("layer", "-1"), ("head", "x"))
    assert Address.read({"tab": "<b>", "layer": "-1", "head": "x", "variant": "Z"}) == Address(unknown="<b>", wrong=wrong)
    assert Address.read({"tab": "runs", "run": "r", "layer": "7", "head": "mean"}) == Address("runs", "r", None, 7, "mean")


def test_decoding_is_brought_into_range():
    read = Decoding.read({"mode": "sampled", "temperature": 99, "top_p": "x", "max_new_tokens": 1e9, "seed": -4}, 128)
    assert (read.temperature, read.top_p, read.max_new_tokens, read.seed) == (5.0, 1.0, 128, 0)
    assert Decoding.read({"temperature": 2}, 128).settings()["temperature"] == 0.0


def test_continuations_are_asked_for_when_sampling_and_shown_beside_the_first():
    assert Decoding.read({"mode": "sampled", "samples": 3}, 128).settings()["samples"] == 3
    assert Decoding.read({"mode": "greedy", "samples": 3}, 128).settings()["samples"] == 1
    assert Decoding.read({"mode": "sampled", "samples": 999}, 128).samples == 8
    shown = columns.others({"samples": ["one", "<b>two</b>", "three"]})
    assert "2 more continuations" in shown and "&lt;b&gt;two" in shown and "one" not in shown
    assert columns.others({"samples": []}) == "" == columns.others({})


def test_small_times_and_large_rates():
    from lab.ui.format import duration, rate

    assert duration(0.0123) == "12.3 µs" and duration(0.0) == "0.0 ms" and duration(0.2) == "0.2 ms"
    assert (
        rate(9.89e14, "FLOP/s") == "989 TFLOP/s" and rate(320e9, "B/s") == "320 GB/s" and rate(None) == "–" and rate(12) == "12"
    )


def test_costs_say_what_a_step_reads_and_whether_choosing_pays(record):
    record = copy.deepcopy(record)
    a, b, c = record["variants"]
    a["reads"] = {"attend": 1.0, "choose": 0.0, "pays": False}
    b.update(reads={"attend": 0.25, "choose": 0.0625, "pays": True}, saves=["reads less, stores the same"], kept_fraction=1.0)
    c.update(reads={"attend": 0.4, "choose": 1.0, "pays": False}, saves=["memory", "reads less, stores the same"],
             kept_fraction=1.0)
    rows = tables.costs(record).split("<tr>")[2:]
    cells = [re.findall(r'<td class="num"[^>]*>(.*?)</td>', row)[7:10] for row in rows]
    assert cells == [["100%", "–", "–"], ["25%", "6%", "pays"], ["40%", "100%", "does not pay"]]
    assert ["stores everything" in row for row in rows] == [False, True, False]
    del record["variants"][0]["reads"]  # runs saved before there was a ledger in them
    assert "does not pay" in tables.costs(record)


def test_a_code_that_codes_nothing_yet_is_told(record):
    variant = {**record["variants"][1], "finish": "length", "techniques": [{"name": "kivi", "params": {"bits": 2}}],
               "layers": [{"layer": 0, "kv_bytes": 1, "bits": {"16": 9, "8": 0, "4": 0, "2": 0, "0": 5}}]}
    assert "nothing is coded so far" in columns.note(variant)
    coded = {**variant, "layers": [{"layer": 0, "kv_bytes": 1, "bits": {"16": 9, "8": 0, "4": 0, "2": 1, "0": 5}}]}
    assert "coded" not in columns.note(coded)
    older = {**variant, "techniques": [{"name": "kvquant", "params": {"bits": 3}}]}  # three bits were not counted then
    assert "coded" not in columns.note(older)
    assert "coded" not in columns.note({**variant, "techniques": [{"name": "h2o", "params": {"budget": 0.5}}]})
