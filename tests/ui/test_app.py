"""The app without a browser: the plan behind the cards, the maps' answers, presets, privacy, and the page's wiring."""
from __future__ import annotations

import base64

import numpy as np
import pytest

from lab.errors import LabError
from lab.ui import assets, attention, compare, controller, maps, runs
from lab.ui.app import build
from lab.ui.components import tables
from lab.ui.opened import OpenRun, Shelf

from . import fixture


@pytest.fixture(scope="module")
def lab():
    return fixture.FakeLab(step_s=0)


def test_plan_predicts_names_and_blocks_with_a_reason(lab):
    cards = [lab.cards_of("dense"), lab.cards_of("h2o(budget=0.5)"), {"techniques": [{"name": "h2o", "params": {"budget": 7}}]}]
    plan = lab.plan({"variants": cards, "prompt_tokens": 100, "max_new_tokens": 29})["variants"]
    assert plan[0]["title"] == "Dense" and plan[0]["kv"]["text"] == "256.0 KiB" and plan[0]["kv"]["ratio"] == ""
    assert plan[1]["spec"] == "h2o(budget=0.5)" and plan[1]["kv"]["ratio"] == "0.25×"
    assert "score" in plan[1]["blocked"]["streaming"] and "kivi" not in plan[1]["blocked"]
    assert "out of range" in plan[2]["error"]


def test_plan_counts_continuations_and_the_prompt_they_share_once(lab):
    ask = {"variants": [lab.cards_of("dense")], "prompt_tokens": 100, "max_new_tokens": 29, "samples": 3}
    kv = lab.plan(ask)["variants"][0]["kv"]
    assert kv["text"] == "368.0 KiB" and kv["at"] == "128 tokens, 3 continuations"  # 2 KiB for each of 100 + 3 * 28


def test_plan_without_prompt_says_what_it_waits_for(lab):
    assert "prompt" in lab.plan({"variants": [{"techniques": []}]})["variants"][0]["pending"]


@pytest.mark.parametrize("spec, short, long", [
    ("snapkv(budget=0.4)+kivi(bits=4,residual=32)", 63, 82),  # the card a first visitor finds
    ("streaming_llm(budget=3)", 100, 3),
    ("random_score(budget=0.1,window=16)", 100, 200),
])
def test_a_card_says_before_a_run_what_its_column_would_say_after(spec, short, long):
    from lab.engine.cache import LabCache
    from lab.engine.stack import Stack
    from lab.ui.library import StoreLibrary
    from tiny_models import build as tiny

    def card(tokens):
        return lab.plan({"variants": [lab.cards_of(spec)], "prompt_tokens": tokens, "max_new_tokens": 29})["variants"][0]

    lab = controller.Lab(StoreLibrary.memory())
    with pytest.raises(LabError, match="must protect") as column:
        LabCache(tiny("llama", head_dim=16), Stack.parse(spec), prompt=short)
    assert card(short)["error"] == str(column.value) and "kv" not in card(short)
    assert "kv" in card(long) and "error" not in card(long)
    LabCache(tiny("llama", head_dim=16), Stack.parse(spec), prompt=long)


def test_conflicting_cards_are_refused_before_the_model_is_touched(lab):
    both = {"techniques": [*lab.cards_of("h2o")["techniques"], *lab.cards_of("streaming")["techniques"]]}
    assert lab.plan({"variants": [both]})["variants"][0]["conflicts"]
    with pytest.raises(LabError):
        compare.describe(lab, both)


def test_presets_parse_with_the_real_registry():
    from lab.engine.stack import Stack

    entries = assets.presets()
    assert len(entries) >= 6 and len({e["id"] for e in entries}) == len(entries)
    for entry in entries:
        assert 1 <= len(entry["variants"]) <= 4 and entry["about"]
        assert [Stack.parse(spec) for spec in entry["variants"]]
        assert len(assets.prompt_of(entry)) > 60
    assert "amber key is in box seven" in assets.prompt_of(assets.preset("needle"))


def test_the_preset_of_fewer_bits_predicts_fewer_bytes():
    from lab.measure import cost
    from lab.ui import recorded

    facts, tokens = recorded.load().record["model"], 700
    sizes = [cost.stored(facts, spec, tokens, tokens + 63) for spec in assets.preset("codes")["variants"]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_the_second_of_two_presses_is_told_to_wait_before_the_first_has_begun():
    lab = fixture.FakeLab(step_s=0)
    assert [lab.wait("first"), lab.wait("second"), lab.wait("first")] == [0, 1, 1]
    lab._waiting["second"] -= 60  # pressed a minute ago while nothing ran: that page is closed
    assert not lab.wait("first")


def test_who_waits_hears_of_everybody_who_pressed_before_and_has_not_gone():
    from types import SimpleNamespace

    lab = fixture.FakeLab(step_s=0)
    for visitor in ("gone", "first", "second"):
        lab.wait(visitor)
    lab.begin("first")
    for visitor in lab._waiting:
        lab._waiting[visitor] -= 60
    lab._turn -= 60
    assert lab.wait("third") == 2  # the first and the second; the queue serves in turn, so the page that was before is closed
    told = compare.waiter(lab)(SimpleNamespace(session_hash="fourth"))[2]
    assert "3 runs were before yours when you pressed" in told  # it stands while they end


def test_tile_is_bytes_and_hatches_what_was_evicted():
    run = OpenRun(*fixture.record_and_arrays())
    ask = {"letter": "B", "layer": 3, "head": 0, "rows": [0, 999], "cols": [-5, 999], "width": 512, "height": 512}
    tile = maps.tile(run, ask)
    data = np.frombuffer(base64.b64decode(tile["data"]), np.uint8).reshape(tile["h"], tile["w"])
    assert tile["row_step"] == 1 and data[0, 1] == 0 and data[5, 0] > 0
    lost = np.frombuffer(base64.b64decode(tile["evicted"]), np.uint8).reshape(data.shape)
    assert (data[lost == 255] == 0).all() and (lost == 255).any()


def test_row_and_cell_agree():
    run = OpenRun(*fixture.record_and_arrays())
    ask = {"letter": "B", "layer": 3, "head": 1}
    row = maps.row(run, {**ask, "row": 120, "top": 5, "strip": [0, 130]})
    best = row["bars"][0]
    cell = maps.cell(run, {**ask, "row": 120, "col": best["col"]})
    assert cell["rank"] == 1 and cell["weight"] == pytest.approx(best["weight"], abs=1e-6)
    gone = maps.cell(run, {**ask, "row": 120, "col": row["gone"][0]})
    assert gone["weight"] is None and gone["why"].startswith("evicted")
    assert sum(b["weight"] for b in row["bars"]) + row["tail"] == pytest.approx(1, abs=1e-3)


def test_cache_map_through_time():
    run = OpenRun(*fixture.record_and_arrays())
    before = maps.cache(run, {"letter": "B", "row": 50, "width": 2000})
    after = maps.cache(run, {"letter": "B", "row": 128, "width": 2000})
    assert set(np.frombuffer(base64.b64decode(before["data"]), np.uint8)) == {16, 255}
    assert {0, 2, 16} == set(np.frombuffer(base64.b64decode(after["data"]), np.uint8))
    assert maps.life(run, {"letter": "B", "token": 5})["events"][0]["what"] == "written"


def test_server_functions_answer_in_one_sentence(lab):
    tile = next(f for f in attention.functions(lab) if f.__name__ == "tile")
    assert "no longer open" in tile({"key": "guess"})["error"]
    missing = tile({"key": "recorded", "letter": "A", "layer": 5, "head": 0, "rows": [0, 9], "cols": [0, 9]})
    assert "Captured layers are 0, 3, 7" in missing["error"] and missing["replay"] is True
    assert "error" in tile({"key": "recorded", "letter": "A", "layer": 3, "head": 99, "rows": [0, 9], "cols": [0, 9]})


def test_unexpected_failures_never_show_a_traceback():
    text = controller.sentence(ValueError("secret path /root/x"))
    assert "secret" not in text and "Traceback" not in text


def test_shelf_keeps_the_recorded_run_and_forgets_the_oldest():
    shelf = Shelf(keep=3)
    shelf.put(OpenRun({}, {}), "recorded")
    keys = [shelf.put(OpenRun({}, {})) for _ in range(5)]
    assert shelf.get("recorded") and shelf.get(keys[-1]) and shelf.get(keys[0]) is None


def test_runs_table_verbs():
    lab = fixture.FakeLab(step_s=0)
    f = {fn.__name__: fn for fn in runs.functions(lab)}
    row = f["listing"]({})["rows"][0]
    ident = {"run_id": row["run_id"]}
    assert row["name"] == "older run" and row["tags"] == ["kivi"]
    f["rename"]({**ident, "name": "<b>new</b>"})
    f["tag"]({**ident, "tags": ["a", "b"]})
    assert f["listing"]({})["rows"][0]["name"] == "<b>new</b>"
    exported = f["export"]({**ident, "format": "json"})
    f["delete"](ident)
    assert f["listing"]({})["rows"] == []
    f["restore"](ident)
    assert len(f["listing"]({})["rows"]) == 1
    assert f["take"]({"name": "x.json", "data": exported["data"]})["run_id"] == row["run_id"]
    assert "error" in f["take"]({"name": "x.json", "data": base64.b64encode(b"{}").decode()})
    assert "error" in f["take"]({"name": "x.json", "data": "%%%"})
    assert "error" in f["export"]({"run_id": "nope", "format": "json"})


def test_on_a_space_visitors_see_their_own_runs_only():
    lab = fixture.FakeLab(step_s=0)
    lab.public = True
    record, arrays = fixture.record_and_arrays("20260103-000000-mine")
    key, problem = lab.keep(fixture.Outcome(record, arrays), "visitor-1")
    assert problem is None and lab.shelf.get(key)
    listing = next(fn for fn in runs.functions(lab) if fn.__name__ == "listing")
    assert [r["run_id"] for r in listing({"owner": "visitor-1"})["rows"]] == ["20260103-000000-mine"]
    assert listing({"owner": "visitor-2"})["rows"] == [] and listing({})["rows"] == []
    with pytest.raises(Exception, match="no run"):
        lab.open("20260103-000000-mine", "visitor-2")


def test_nothing_is_a_public_endpoint(lab):
    demo = build(lab)
    assert [d for d in demo.get_config_file()["dependencies"] if d.get("api_visibility") == "public"] == []
    assert all(fn.queue or fn.concurrency_id for fn in demo.fns.values() if fn.concurrency_id == "model")


def test_a_second_job_of_one_visitor_is_refused(lab):
    job = lab.begin("v")
    assert job and lab.begin("v") is None and lab.begin("w")
    reached = []
    assert lab.stop("v") and job.stopped
    job.attach(lambda: reached.append(1))
    assert reached == [1]
    lab.end("v"), lab.end("w")
    assert lab.begin("v").stopped is False
    lab.end("v")
    assert lab.stop("v") is False


def test_who_leaves_the_queue_may_press_run_again_at_once(lab):
    assert lab.unqueue("v") is False
    other = lab.begin("other")
    assert lab.wait("v") and lab.has("v")
    assert lab.unqueue("v") and not lab.has("v")
    assert lab.wait("v")  # pressed again: the queue holds two presses, of which the first is to be passed over
    lab.end("other")
    assert lab.passes("v") and not lab.passes("v")
    job = lab.begin("v")
    assert job and not job.stopped and not other.stopped
    assert lab.unqueue("v") is False and lab.stop("v") and job.stopped
    lab.end("v"), lab.wait("v"), lab.unqueue("v")
    lab.leave("v")  # the queue let go of that press: the next one is not passed over
    assert not lab.passes("v")


def test_a_column_that_could_not_run_is_told_in_the_status_line():
    from lab.ui import compare
    from lab.ui.controller import Outcome

    class Broken(fixture.FakeLab):
        def run(self, *args, **kwargs):
            for event in super().run(*args, **kwargs):
                if isinstance(event, Outcome):
                    event.record["variants"][1]["error"] = "the budget is too small"
                yield event

    lab = Broken(step_s=0)
    dense = {"techniques": []}
    frames = list(compare._run(lab, "a prompt", {"variants": [dense, dense]}, dict(compare.DEFAULT, max_new_tokens=2), "",
                               lab.begin("v")))
    assert "Done, but B could not run" in frames[-1][1]


def test_a_refused_run_leaves_the_results_before_it_in_sight():
    from lab.errors import LabError
    from lab.ui import compare

    class Refusing(fixture.FakeLab):
        def run(self, *args, **more):
            raise LabError("The prompt is longer than the context", "8,192 tokens", "Shorten it")
            yield

    lab = Refusing(step_s=0)
    job, dense = lab.begin("v"), {"techniques": []}
    settings = dict(compare.DEFAULT, max_new_tokens=2)
    frames = []
    with pytest.raises(LabError):
        for frame in compare._run(lab, "a prompt", {"variants": [dense]}, settings, "", job):
            frames.append(frame)
    assert frames and all("cols" not in columns for columns, *_ in frames)


def test_a_prompt_is_counted_as_the_model_reads_it():
    from types import SimpleNamespace

    from lab.ui.compare import token_counter
    from lab.ui.controller import Lab
    from lab.ui.library import StoreLibrary

    class Words:
        chat_template = "made up"

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": text.split()}

        def apply_chat_template(self, messages, **_):
            return f"user : {messages[0]['content']} assistant :"

    lab = Lab(StoreLibrary.memory())
    lab._model = SimpleNamespace(tokenizer=Words(), facts=SimpleNamespace(to_dict=lambda: {"context": 6}))
    assert lab.count_tokens("a b c") == 3 and lab.count_tokens("a b c", chat=True) == 7
    assert token_counter(lab)("a b c", {"chat": False}) == {"tokens": 3, "over": False, "text": "3 tokens"}
    assert token_counter(lab)("a b c", {"chat": True})["over"] is True
    Words.chat_template = None
    assert lab.count_tokens("a b c", chat=True) == 3  # Run tells that there is no template


def test_a_run_that_is_being_generated_is_not_called_interrupted():
    from lab.ui import runs

    lab = fixture.FakeLab(step_s=0)
    listing = runs.functions(lab)[0]
    job = lab.begin("visitor")
    walk = lab.run("a prompt", [{"techniques": []}], {"max_new_tokens": 2}, job)
    next(walk)
    assert {r["run_id"]: r["status"] for r in listing({})["rows"]}[job.run_id] == "being generated"
    lab.end("visitor")
    assert {r["run_id"]: r["status"] for r in listing({})["rows"]}[job.run_id] == "interrupted"


def test_what_feeds_the_model_has_one_limit_whatever_is_pressed_first(lab):
    """Gradio takes a group's limit from the events that were pressed so far."""
    limits = {f.name: f.concurrency_limit for f in build(lab).fns.values() if f.concurrency_id == "model"}
    assert {"run", "change", "replay", "work"} <= set(limits) and set(limits.values()) == {1}


def test_stop_is_said_before_the_job_is_asked_to_end():
    from types import SimpleNamespace

    lab, who = fixture.FakeLab(step_s=0), SimpleNamespace(session_hash="visitor")
    job = lab.begin("visitor")
    assert "Stopping" in compare.stopping(lab)(who) and not job.stopped
    compare.stopper(lab)(who)
    assert job.stopped
    lab.end("visitor")
    assert "over already" in compare.stopper(lab)(who)[2]
    lab.begin("another"), lab.wait("visitor")
    run, stop, told, unfinished = compare.stopper(lab)(who)
    assert run.interactive and not stop.interactive and "Taken out of the queue" in told and unfinished == compare.OVER


def test_results_of_another_model_are_said_to_be(lab):
    run = OpenRun(*fixture.record_and_arrays("mine"))
    assert compare.banner_of(lab, run) == "" and compare.banner_of(lab, None) == ""
    run.record["model"] = {**run.record["model"], "id": "somebody/another-model", "weights": "int8"}
    told = compare.banner_of(lab, run)
    assert "Made with another-model (int8)" in told and f"Run are of {compare.model_words(lab.facts())}" in told
    run.recorded = True
    assert compare.EXAMPLE in compare.banner_of(lab, run)


def test_a_page_that_arrives_names_the_model_that_is_loaded_now(lab, monkeypatch):
    from types import SimpleNamespace

    from lab.ui import app

    monkeypatch.setattr(lab, "facts", lambda: {"id": "somebody/newer", "device": "cpu"})
    monkeypatch.setattr(lab, "source", "somebody/newer")
    found = app.arrival(lab)("nobody", SimpleNamespace(query_params={}))
    assert "newer" in found[1] and found[2] == "somebody/newer"


def test_a_variant_without_attention_is_named_with_its_reason(lab):
    record, arrays = fixture.record_and_arrays("mine")
    record["variants"][1]["error"] = "H2O would keep 2 of 40 entries."
    record["variants"][2]["tokens"] = []
    bare = {name: array for name, array in arrays.items() if "/C/" not in name}
    shown = attention.value(lab, lab.shelf.put(OpenRun(record, bare)))
    assert [v["letter"] for v in shown["variants"]] == ["A"]
    assert shown["absent"] == [{"letter": "B", "why": "H2O would keep 2 of 40 entries."},
                               {"letter": "C", "why": "The run ended before this variant began."}]
    assert "would keep 2 of 40" in tables.costs(record)
