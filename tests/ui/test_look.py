"""Looking inside without a browser: differences, rollout, the grid, token measures, diagnostics and the exported page."""
from __future__ import annotations

import base64

import numpy as np
import pytest

from lab.errors import LabError
from lab.ui import attention, maps
from lab.ui.opened import OpenRun
from lab.ui.state import Address
from lab.ui.tasks import Told

from . import fixture


@pytest.fixture(scope="module")
def lab():
    return fixture.FakeLab(step_s=0)


@pytest.fixture
def run():
    return OpenRun(*fixture.record_and_arrays())


def ask(letter="B", layer=3, head=0, **more):
    return {"letter": letter, "layer": layer, "head": head, "rows": [0, 999], "cols": [0, 999], **more}


def shades(tile):
    return np.frombuffer(base64.b64decode(tile["data"]), np.uint8).reshape(tile["h"], tile["w"])


@pytest.mark.parametrize("head", [0, "mean", "max", "rollout"])
def test_a_difference_is_what_its_two_cells_say(run, head):
    row = maps.row(run, ask("C", head=head, minus="A", row=120))
    for bar in row["bars"][:3]:
        cell = maps.cell(run, ask("C", head=head, minus="A", row=120, col=bar["col"]))
        assert cell["weight"] == pytest.approx(bar["weight"], abs=1e-6)
        assert cell["both"][1] - cell["both"][0] == pytest.approx(bar["weight"], abs=1e-5)


def test_a_difference_covers_the_shorter_run_and_keeps_evicted_apart(run):
    tile = maps.tile(run, ask("B", minus="A", log=False))
    assert tile["h"] == min(run.capture(x, 3).tokens for x in "AB")
    data, lost = shades(tile), np.frombuffer(base64.b64decode(tile["evicted"]), np.uint8)
    assert (data.ravel()[lost == 255] == 0).all() and data[0, 1] == 0
    exact = run.lens("B", 3, 0, "A").view((0, tile["h"]), (0, tile["w"]), 512, 512, "max").values
    there = np.isfinite(exact)
    assert (np.sign(data[there].astype(int) - 128) * np.sign(exact[there]) >= 0).all()
    assert data[there][np.abs(exact[there]).argmax()] in (1, 255)


def test_a_variant_minus_itself_is_the_variant(run):
    assert run.lens("A", 3, 1, "A").tokens == run.lens("A", 3, 1).tokens


def test_rollout_needs_captures_and_rows_sum_to_one(run):
    assert run.lens("A", 3, "rollout").row(40)[:41].sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(LabError, match="captured"):
        OpenRun(run.record, {}).lens("A", 3, "rollout")


def test_the_address_names_a_difference():
    assert Address.read({"variant": "B", "minus": "A", "head": "rollout"}) == Address(variant="B", minus="A", head="rollout")
    assert Address.read({"minus": "<"}).minus is None


def test_a_dropped_drawing_says_so(lab):
    f = {fn.__name__: fn for fn in attention.functions(lab)}
    assert f["drawing"]({"key": "recorded", "id": "x", "drop": True}) == {"fraction": None}
    assert "h" in f["tile"]({"key": "recorded", "id": "x", **ask("B", minus="A")})


def follow(lab, ask):
    """A grid's answer once it is there."""
    heads = {fn.__name__: fn for fn in attention.functions(lab)}["heads"]
    found = heads({**ask, "start": True})
    while "fraction" in found:
        found = heads(ask)
    return found


def test_the_grid_holds_every_captured_head_once_and_is_kept(lab):
    ask = {"key": "recorded", "letter": "B"}
    heads = {fn.__name__: fn for fn in attention.functions(lab)}["heads"]
    assert heads(ask)["idle"]
    found = follow(lab, ask)
    assert [(r["layer"], r["head"]) for r in found["heads"]] == [(n, h) for n in (0, 3, 7) for h in range(fixture.HEADS)]
    assert len(base64.b64decode(found["thumbs"])) == len(found["heads"]) * found["side"] ** 2
    assert all(0 <= r["sink_rate"] <= 1 and r["kv"] == r["head"] // 3 for r in found["heads"])
    assert heads(ask)["thumbs"] == found["thumbs"]
    assert not found["importance"] and all(r["importance"] is None for r in found["heads"])
    assert "no captured attention" in heads({"key": "recorded", "letter": "D"})["error"]


def test_a_grid_without_captures_says_what_to_do():
    lab = fixture.FakeLab(step_s=0)
    lab.shelf.put(OpenRun(fixture.record_and_arrays()[0], {}), "bare")
    assert "replay" in follow(lab, {"key": "bare", "letter": "A"})["error"]


def test_token_measures_stop_at_the_divergence_and_know_the_captures(lab):
    f = {fn.__name__: fn for fn in attention.functions(lab)}
    found = f["texts"]({"key": "recorded"})
    a, b = found["cols"][0], found["cols"][1]
    assert "kl" not in a["values"] and len(b["values"]["kl"]) == len(b["text"])
    assert all(v is None for v in b["values"]["kl"][b["fork"] + 1:]) and b["values"]["kl"][b["fork"]] is not None
    assert b["other"][b["fork"]] and not b["other"][b["fork"] + 1] and b["own"][0][0][1] == "0.600"
    assert b["values"]["surprisal"][0] == pytest.approx(0.4)
    while "fraction" in (more := f["attended"]({"key": "recorded"})):
        pass
    masses = more["values"]["A"]["prompt_mass"]
    assert len(masses) == len(a["text"]) and masses[-1] is None and all(0 <= x <= 1 for x in masses[:-1])
    run = lab.shelf.get("recorded")
    prompt = len(run.record["prompt"]["tokens"])
    sums = [run.lens("A", layer, "mean").row(prompt)[:prompt].sum() for layer in (0, 3, 7)]
    assert masses[0] == pytest.approx(np.mean(sums), abs=1e-4)


def test_every_declared_figure_of_the_run_alone_is_drawn_with_its_table(run):
    from lab.inspect.diagnostics import registry
    from lab.inspect.diagnostics import run as compute
    from lab.ui import probes
    from lab.ui.sessions import of_model, session

    lab, drawn = fixture.FakeLab(step_s=0), 0
    for name, declared in registry().items():
        if of_model(declared.needs) or not declared.needs:
            continue
        found = session(lab, run, "A", declared, {"marked": "amber key", "split": "."})
        if declared.missing(found):
            continue
        arrays = compute(name, found)
        for figure in declared.figures:
            if not probes.drawable(figure, arrays):
                continue
            plot, table = probes.draw(figure, arrays, run.layers("A")), probes.table(figure, arrays, run.layers("A"))
            assert plot.layout.paper_bgcolor == "rgba(0,0,0,0)" and plot.data and "<table" in table
            drawn += 1
    assert drawn > 15


def last(lab, **ask):
    """What the panel shows when a diagnostic has ended."""
    from types import SimpleNamespace

    from lab.ui import diagnostics

    return list(diagnostics.runner(lab)(SimpleNamespace(_data={"key": "recorded", "letter": "A", **ask})))[-1]


def test_a_diagnostic_is_computed_once_and_what_is_missing_is_one_sentence(lab):
    out = last(lab, name="sinks")
    assert out[0]["done"]["name"] == "sinks" and out[1]["visible"] and "<table" in out[4]
    assert out[0]["kept"] == {"A": ["sinks"]}
    tasks = lab.shelf.get("recorded").tasks
    kept = tasks["diagnostic"]
    last(lab, name="sinks")
    assert tasks["diagnostic"] is kept, "the second time reads what is kept"
    for name, word in (("iou", "Highlight"), ("basin", "documents"), ("nonsense", "no diagnostic")):
        assert word in last(lab, name=name)[0]["problem"]
    assert "no longer open" in last(lab, key="gone", name="sinks")[0]["problem"]
    lab.shelf.put(OpenRun(lab.shelf.get("recorded").record, {}), "bare")
    assert "Replay" in last(lab, key="bare", name="shapes")[0]["problem"]


def test_a_diagnostic_of_the_model_says_what_to_load(monkeypatch):
    lab = fixture.FakeLab(step_s=0)
    monkeypatch.setattr(type(lab), "loaded", property(lambda self: False))
    assert "Load tests/Synthetic-1M" in last(lab, name="massive")[0]["problem"]


def test_an_exported_page_escapes_everything_and_reaches_nowhere(run):
    from lab.ui import export

    run.record["name"] = '</script><img src=x onerror="alert(1)">@@DATA@@'
    for more in ({}, {"minus": "A"}, {"head": "rollout"}):
        name, page = export.page(run, {**ask("B"), "pool": "max", "log": True, **more})
        assert name.endswith(".html") and not set('/\\<>"') & set(name)
        assert page.count("</script>") == 2 and "<img" not in page and "<script>alert" not in page
        assert "http" not in page.replace("http-equiv", "") and len(page) < 3_000_000
        assert "&lt;script&gt;alert(1)" in page


def test_a_long_run_is_exported_with_finer_levels_that_are_exact_where_they_say(monkeypatch):
    from lab.ui import export

    rng, n = np.random.default_rng(0), 700
    arrays = {"qk/A/0/q": rng.standard_normal((2, n, 8)).astype(np.float16),
              "qk/A/0/k": rng.standard_normal((1, n, 8)).astype(np.float16)}
    record, _ = fixture.record_and_arrays()
    long = OpenRun(record, arrays)
    view, told = {**ask("A", 0), "pool": "max", "log": True}, Told()
    tiles, finest = export._levels(long, view, n, told)
    assert tiles[0]["row_step"] == 2 and finest == 1 and tiles[-1]["rows"] == [512, 700]
    monkeypatch.setattr(export, "MOST_BYTES", 10)
    assert told.fraction >= 0.5
    tiles, finest = export._levels(long, view, n, told)
    assert finest == 2 and [t["row_step"] for t in tiles] == [2, 1, 1], "the newest rows are there exactly all the same"
    told.cancel()
    with pytest.raises(LabError, match="cancelled"):
        export._levels(OpenRun(record, {k: v * 2 for k, v in arrays.items()}), view, n, told)


def test_an_export_of_what_is_not_there_is_one_sentence(lab):
    page = {fn.__name__: fn for fn in attention.functions(lab)}["exported"]
    assert "Captured layers are 0, 3, 7" in page({"key": "recorded", **ask("A", 5)})["error"]
    assert "no longer open" in page({"key": "gone"})["error"]


def test_a_shared_run_opens_for_whoever_has_its_id_and_is_listed_for_its_owner_only():
    from lab.ui import runs

    lab = fixture.FakeLab(step_s=0)
    lab.public = True
    record, arrays = fixture.record_and_arrays("20260104-000000-shar")
    lab.keep(fixture.Outcome(record, arrays), "visitor-1")
    f, mine = {fn.__name__: fn for fn in runs.functions(lab)}, {"run_id": "20260104-000000-shar", "owner": "visitor-1"}
    assert "error" in f["share"]({**mine, "owner": "visitor-2"})
    assert f["share"](mine) == {"public": True} and f["listing"](mine)["rows"][0]["shared"]
    assert lab.shelf.get(lab.open(mine["run_id"], "visitor-2")) and f["listing"]({"owner": "visitor-2"})["rows"] == []
    f["share"]({**mine, "shared": False})
    with pytest.raises(Exception, match="no run"):
        lab.open(mine["run_id"], "visitor-2")
