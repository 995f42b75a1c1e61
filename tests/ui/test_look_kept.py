"""What is computed from a run is kept with it; replays are shared; what a person gives is understood or refused."""
from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from lab.errors import LabError
from lab.inspect.diagnostics import registry
from lab.ui import attention, grid, kept, maps, sessions
from lab.ui.opened import OpenRun, Shelf

from . import fixture


@pytest.fixture
def lab():
    return fixture.FakeLab(step_s=0)


@pytest.fixture
def run():
    return OpenRun(*fixture.record_and_arrays())


def finished(lab, run, letter):
    found = grid.grid(lab, run, {"letter": letter, "start": True})
    while "fraction" in found:
        time.sleep(0.05)
        found = grid.grid(lab, run, {"letter": letter})
    return found


def test_a_result_survives_packing_and_what_is_damaged_is_none():
    arrays = {"names": np.array(["a", "ß"]), "x": np.arange(3.0), "n": np.arange(3, dtype=np.int16), "one": np.array(2.5)}
    packed = kept.pack("A/diagnostic/x", {"given": {"a": "b"}}, arrays)
    assert all(name.startswith("look/A/diagnostic/x/") and a.dtype.kind in "iuf" for name, a in packed.items())
    about, back = kept.unpack("A/diagnostic/x", packed)
    assert about == {"given": {"a": "b"}} and back["names"].tolist() == ["a", "ß"] and back["n"].dtype == np.int16
    assert back["x"].dtype == np.float32 and float(back["one"]) == 2.5
    assert kept.names({**packed, "qk/A/0/q": arrays["x"]}) == ["A/diagnostic/x"] and kept.unpack("B/grid", packed) is None
    assert kept.unpack("A/diagnostic/x", {**packed, "look/A/diagnostic/x/about:text": np.array([255, 1], np.uint8)}) is None


def test_a_grid_is_there_again_when_its_run_is_opened_again_even_without_captures(lab):
    record, arrays = fixture.record_and_arrays("20260105-000000-grid")
    lab.keep(fixture.Outcome(record, arrays), "")
    first = lab.shelf.get(lab.open(record["run_id"], ""))
    drawn = finished(lab, first, "B")
    lab.shelf._runs.clear()
    again = lab.shelf.get(lab.open(record["run_id"], ""))
    assert again is not first and grid.grid(lab, again, {"letter": "B"})["thumbs"] == drawn["thumbs"]
    for name in [n for n in again.arrays if n.startswith("qk/")]:
        del again.arrays[name]
    assert grid.grid(lab, again, {"letter": "B"})["heads"] == drawn["heads"]
    lab.shelf.put(again)
    assert lab.shelf.find(record, "") is again and lab.shelf.find(record, "somebody") is None


def test_a_save_that_fails_loses_nothing(run):
    def refuse(prefix, arrays):
        raise OSError("disk full")
    run._save = refuse
    run.remember("A/grid", {"x": 1}, {"y": np.ones(2)})
    assert run.result("A/grid")[0] == {"x": 1} and run.results() == ["A/grid"]
    run.remember("A/grid", {"x": 2}, {"z": np.ones(1)})
    assert set(run.result("A/grid")[1]) == {"z"}, "the newer result replaces the older one whole"


def test_layers_combine_in_rows_cells_and_losses(run):
    ask = {"letter": "B", "layer": 3, "over": "max", "head": "mean", "row": 120}
    row = maps.row(run, ask)
    each = [run.lens("B", n, "mean").row(120) for n in (0, 3, 7)]
    best = row["bars"][0]
    assert best["weight"] == pytest.approx(max(float(np.nan_to_num(x)[best["col"]]) for x in each), abs=1e-6)
    gone = [run.evicted_at("B", n, "mean", 120) for n in (0, 3, 7)]
    assert row["lost"] == int(np.logical_and.reduce(gone).sum()) and row["bars"][0]["bits"] in (2, 16)
    assert "max over captured layers 0, 3, 7" in maps.captioned(run, ask)
    assert maps.largest(run, {**ask, "rows": [0, 999], "cols": [0, 999]})["cells"][0]["weight"] > 0


def test_a_life_names_what_a_token_was_merged_into_and_the_slider_stops_at_steps(run):
    told = maps.life(run, {"letter": "B", "token": 20})
    merged = [e for e in told["events"] if e["what"] == "merged"]
    assert merged and merged[0]["into"] == [[1, merged[0]["entries"]]]
    assert all(d["into"] == [[1, 1]] for d in told["detail"] if d["what"] == "merged") and merged[0]["shared"] == 1
    stops = maps.cache(run, {"letter": "B", "row": None})["stops"]
    prompt, n = len(run.record["prompt"]["tokens"]), attention.fed(run, "B")
    assert stops[0] == 0 and stops[1] == prompt - 1 and stops[2:] == list(range(prompt, n))
    with pytest.raises(LabError, match="KV heads 0 to 1"):
        maps.cache(run, {"letter": "B", "row": None, "kv": 7})


def test_two_pages_follow_one_replay_and_one_may_cancel_it(lab, run, monkeypatch):
    key, calls = lab.shelf.put(run), []

    def replay(run, letter, layer, report, cancelled):
        calls.append(letter)
        report(0.5, "Replaying")
        until = time.monotonic() + 600
        while not cancelled() and time.monotonic() < until:  # it ends by being cancelled alone
            time.sleep(0.01)
        raise LabError("The replay was stopped")
    monkeypatch.setattr(lab, "replay", replay)
    event = SimpleNamespace(_data={"key": key, "letter": "B", "layer": 5})
    first, second = (attention.replayer(lab)(event) for _ in range(2))
    next(first), next(second)
    assert calls == ["B"]
    told = {fn.__name__: fn for fn in attention.functions(lab)}["replays"]
    assert told({"key": key, "letter": "B"})["fraction"] in (0, 0.5) and told({"key": key, "letter": "A"})["fraction"] is None
    told({"key": key, "letter": "B", "drop": True})
    assert "cancelled" in list(second)[-1][1] and list(first)[-1][0]["failed"][0] == f"{key}/B/5"


def test_what_replays_brought_leaves_first_where_room_is_short():
    shelf, runs = Shelf(), [OpenRun(*fixture.record_and_arrays(f"r{n}")) for n in range(3)]
    for n, run in enumerate(runs):
        run.add({"qk/A/5/q": np.zeros((6, 10, 16), np.float16), "qk/A/5/k": np.zeros((2, 10, 16), np.float16)})
        shelf.put(run, f"k{n}")
    one = runs[0].replayed_bytes()
    shelf.make_room(2 * one)
    assert [r.replayed_bytes() for r in runs] == [0, one, one] and runs[0].layers("A") == [0, 3, 7]


@pytest.mark.parametrize("name, given, words", [
    ("rollout", {"output": "5000"}, "Positions are 0 to"), ("rollout", {"output": "third"}, "no position"),
    ("deviation", {"head": "x"}, "is no number"), ("deviation", {"layer": "5"}, "Captured layers are 0, 3, 7"),
    ("mixing", {"token": "0"}, "1 to 254"), ("iou", {"marked": "xylophone"}, "token of the prompt"),
])
def test_what_makes_no_sense_is_one_sentence(lab, run, name, given, words):
    from lab.inspect.diagnostics import run as compute

    with pytest.raises(LabError, match=words):
        compute(name, sessions.session(lab, run, "A", registry()[name], given))


def test_paragraphs_and_documents():
    tokens = ["One", " a", ".\n\n", "Two", " b", "\n\n", "Three", "\n", "\n", "Which", "?"]
    record = {"prompt": {"tokens": tokens}, "variants": []}
    assert sessions.paragraphs(OpenRun(record, {})) == [(0, 3), (3, 6), (6, 9)]
    assert sessions.paragraphs(OpenRun(record, {}), ".") is None
    assert sessions.parts_of("a b\nc\n\n d \n\n\ne") == ["a b c", "d", "e"] and sessions.parts_of("a\n b\nc") == ["a", "b", "c"]
    declared = registry()["groups"]
    told = sessions.heard(fixture.FakeLab(step_s=0), OpenRun(*fixture.record_and_arrays()), "A",
                          SimpleNamespace(name="x", inputs=()), {}, 9)
    assert told == {"options": {}}
    assert declared.missing(SimpleNamespace(groups=None, probe=None, prompts=None)) == ["probe", "prompts"]


def test_values_of_many_orders_are_drawn_by_order_of_magnitude():
    from lab.inspect.diagnostics import Figure
    from lab.ui import probes

    cells = np.array([[1.0, 2.0, 1.0], [1.0, 16000.0, 1.0]])
    arrays = {"bars": np.array([42.0, 1.2e7, 43.0]), "cells": cells, "even": np.arange(1, 9)}
    assert probes.draw(Figure("bars", "bars", ("x",), "t"), arrays, []).layout.yaxis.type == "log"
    heat = probes.draw(Figure("cells", "matrix", ("state", "token"), "t"), arrays, [])
    assert heat.data[0].z[1][1] == pytest.approx(np.log10(16000)) and heat.data[0].customdata[1][1] == 16000
    assert probes.draw(Figure("even", "bars", ("x",), "t"), arrays, []).layout.yaxis.type != "log"
    assert not probes.wide(np.array([0.0, 1e9])) and not probes.wide(np.array([np.nan, 1.0]))
