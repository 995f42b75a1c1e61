"""A run too long to keep its queries and keys: what a replay showed of it is there tomorrow, without the model."""
from __future__ import annotations

import time

import numpy as np
import pytest

from lab.errors import LabError
from lab.inspect.diagnostics import registry
from lab.inspect.stored import pack
from lab.inspect.survey import survey
from lab.ui import attention, diagnostics, export, grid, kept, maps
from lab.ui.opened import OpenRun, overview_name
from lab.ui.tasks import Told

from . import fixture

EVERY = {"cols": [0, 999], "rows": [0, 999]}


@pytest.fixture
def lab():
    return fixture.FakeLab(step_s=0)


@pytest.fixture
def long_run(lab):
    """A saved run without queries and keys, opened and replayed."""
    record, arrays = fixture.record_and_arrays("20260107-000000-long")
    whole = {n: a for n, a in arrays.items() if n.startswith("qk/")}
    lab.keep(fixture.Outcome(record, {n: a for n, a in arrays.items() if n not in whole}), "")
    run = lab.shelf.get(lab.open(record["run_id"], ""))
    run.add(whole)
    return run


def drawn(lab, run, letter, **ask):
    while "fraction" in (found := grid.grid(lab, run, {"letter": letter, **ask})):
        time.sleep(0.02)
    return found


def tomorrow(lab, run):
    lab.shelf._runs.clear()
    again = lab.shelf.get(lab.open(run.record["run_id"], ""))
    assert again is not run and not again.layers("B")
    return again


def test_after_a_replay_the_heads_are_drawn_and_kept_by_themselves(lab, long_run):
    assert long_run.must_keep("B") and drawn(lab, long_run, "B")["heads"]
    sharp = maps.tile(long_run, {"letter": "B", "layer": 3, "head": 2, **EVERY})
    assert not sharp["stored"] and sharp["row_step"] == 1
    again = tomorrow(lab, long_run)
    assert again.overview_layers("B") == [0, 3, 7] and drawn(lab, again, "B")["heads"]
    ask = {"letter": "B", "layer": 3, "head": 2}
    tile = maps.tile(again, {**ask, **EVERY})
    assert tile["stored"] and tile["row_step"] == tile["col_step"] == 2 and "evicted" in tile and not tile["coarse"]
    lens = long_run.lens("B", 3, 2)
    want = lens.view(None, None, tile["w"], tile["h"], "max").values
    got = again.lens("B", 3, 2).view(None, None, 512, 512, "max").values
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=0.035, atol=1e-6)
    found = maps.cell(again, {**ask, "row": 100, "col": 0})
    assert found["kept"] == [2, 2] and found["pool"] == "max" and 0 < found["weight"] <= 1
    assert maps.cell(again, {**ask, "row": 3, "col": 90})["why"] == "future"
    with pytest.raises(LabError, match="replay it to zoom to single tokens"):
        maps.row(again, {**ask, "row": 100})
    figures = maps.stats(again, {"letter": "B", "layer": 3})
    np.testing.assert_allclose(figures["entropy"], [float(x) for x in long_run.stats("B", 3).entropy], rtol=1e-3)
    assert maps.largest(again, {**ask, **EVERY})["cells"] and maps.cache(again, {"letter": "B", "row": None})["totals"]
    with pytest.raises(LabError, match="overview does not hold layer 5"):
        again.lens("B", 5, 0).view(None, None, 64, 64, "max")
    with pytest.raises(LabError, match="was never drawn"):
        again.lens("B", 3, "rollout")


def test_reductions_over_layers_and_the_rollout_come_back_as_they_were_drawn(lab, long_run):
    drawn(lab, long_run, "B")
    for ask in ({"over": "mean", "head": "max", "layer": 3}, {"head": "rollout", "layer": 3}):
        maps.tile(long_run, {"letter": "B", **ask, **EVERY})
    want = long_run.lens("B", 3, "rollout").view(None, None, 128, 128, "max").values
    again = tomorrow(lab, long_run)
    seen = again.lens("B", 3, "rollout").view(None, None, 512, 512, "max").values
    np.testing.assert_allclose(seen, want, rtol=0.035, atol=1e-6)
    assert maps.tile(again, {"letter": "B", "over": "mean", "head": "max", "layer": 3, **EVERY})["stored"]
    assert maps.tile(again, {"letter": "B", "over": "max", "head": "max", "layer": 3, **EVERY})["stored"]
    assert "rollout of captured layers 0, 3, 7" in maps.captioned(again, {"letter": "B", "head": "rollout", "layer": 3})
    with pytest.raises(LabError, match="no captured attention of variant A"):
        again.lens("A", 3, "rollout")


def test_a_difference_of_two_kept_overviews(lab, long_run):
    drawn(lab, long_run, "A"), drawn(lab, long_run, "B")
    again = tomorrow(lab, long_run)
    ask = {"letter": "B", "minus": "A", "layer": 3, "head": 1}
    assert maps.tile(again, {**ask, **EVERY})["stored"] and "kept" in maps.cell(again, {**ask, "row": 90, "col": 0})
    again.add({n: a for n, a in long_run.arrays.items() if n.startswith("qk/A/")})
    with pytest.raises(LabError, match="needs queries and keys of both"):
        maps.tile(again, {**ask, **EVERY})


def test_the_page_and_what_the_browser_is_told(lab, long_run):
    drawn(lab, long_run, "B")
    again = tomorrow(lab, long_run)
    name, page = export.page(again, {"letter": "B", "layer": 3, "head": 2, "pool": "max", "log": True}, Told())
    assert '"stored":true' in page and '"looks":{}' in page and "layer-3-head-2" in name
    key = lab.shelf.put(again)
    told = {v["letter"]: v for v in attention.value(lab, key)["variants"]}
    assert told["B"]["overview"] == [0, 3, 7] and told["B"]["layers"] == [] and told["A"]["overview"] == []
    tile = next(f for f in attention.functions(lab) if f.__name__ == "tile")
    assert tile({"key": key, "letter": "B", "layer": 3, "head": 2, **EVERY})["replay"] is True
    assert "error" in tile({"key": key, "letter": "A", "layer": 3, "head": 2, **EVERY})


def test_what_the_run_holds_itself_is_not_kept_twice_and_a_dropped_drawing_stays_dropped(lab, long_run):
    record, arrays = fixture.record_and_arrays()
    run = OpenRun(record, arrays)
    assert grid.grid(lab, run, {"letter": "B"}) == {"idle": True}
    assert drawn(lab, run, "B", start=True)["heads"] and run.result(overview_name("B")) is None
    grid.grid(lab, long_run, {"letter": "B"})
    long_run.tasks["grid", "B"] = type("Slow", (), {"cancel": lambda self: None, "running": True, "fraction": 0.1})()
    grid.grid(lab, long_run, {"letter": "B", "drop": True})
    for name in [n for n in long_run.arrays if n.startswith(kept.PREFIX)]:
        del long_run.arrays[name]
    assert grid.grid(lab, long_run, {"letter": "B"}) == {"idle": True}


def test_thumbnails_are_the_largest_of_their_cells():
    x = np.arange(25, dtype=np.float32).reshape(5, 5)
    x[:2, 2:] = np.nan
    small = grid.thumbnail(x, 2)
    assert small.shape == (3, 3) and small[0, 0] == 6 and np.isnan(small[0, 1]) and small[2, 2] == 24


def test_kept_diagnostics_need_no_model(lab, long_run):
    declared = next(d for d in registry().values() if d.needs == ("captures",))
    task = diagnostics._task(lab, long_run, "B", declared, {})
    while task.running:
        time.sleep(0.02)
    assert task.problem is None
    again = tomorrow(lab, long_run)
    assert declared.name in diagnostics.kept(again)["B"]
    assert diagnostics.known(again, "B", declared, None)[1].keys() == task.result[1].keys()


def _bare(layers: int, tokens: int, **model):
    """An opened run without queries and keys, and what a replay of one of its layers would add."""
    record = {"run_id": "x", "model": {"layers": layers, "heads": 2, "kv_heads": 1, **model},
              "prompt": {"tokens": ["a"] * tokens, "token_ids": [1] * tokens}, "variants": [{"letter": "A", "token_ids": []}]}

    def replayed(n: int) -> dict:
        draw = np.random.default_rng(n)
        return {f"qk/A/{n}/q": draw.standard_normal((2, tokens, 8)).astype(np.float16),
                f"qk/A/{n}/k": draw.standard_normal((1, tokens, 8)).astype(np.float16),
                f"qk/A/{n}/meta": np.array([0.3, 0, model.get("sliding_window") or 0])}

    return OpenRun(record, {}), replayed


def test_what_was_kept_of_one_layer_gives_way_to_all_of_them():
    run, replayed = _bare(3, 64)
    ask = {"letter": "A", "layer": 0, "over": None, "head": "rollout", "rows": [0, 64], "cols": [0, 64]}
    run.add(replayed(0))
    maps.tile(run, ask)
    run.let_go()
    assert maps.captioned(run, ask) == "rollout of captured layers 0"
    for n in range(3):
        run.add(replayed(n))
    right = run.lens("A", 0, "rollout").view(None, None, 128, 128, "max").values
    maps.tile(run, ask)
    run.let_go()
    kept = run.lens("A", 0, "rollout").view(None, None, 128, 128, "max").values
    there = np.isfinite(right) & np.isfinite(kept)
    assert np.abs(right[there] - kept[there]).max() < 0.02
    assert maps.captioned(run, ask) == "rollout of all 3 layers"


def test_a_kept_overview_knows_which_layers_have_a_window():
    """What lies behind a sliding layer's window is nothing there, not a weight of 0."""
    run, replayed = _bare(3, 64, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    for n in range(3):
        run.add(replayed(n) | ({f"qk/A/{n}/meta": np.array([0.3, 0, 0])} if n == 1 else {}))
    live = run.lens("A", 0, 0).view(None, None, 64, 64, "max").values
    run.remember(overview_name("A"), *pack(survey([run.capture("A", n) for n in range(3)], 64)))
    run.let_go()
    kept_layer = run.stored("A", 0, 0)
    assert [c.window for c in kept_layer.captures] == [16, None, 16]
    assert np.array_equal(np.isnan(kept_layer.view(None, None, 64, 64, "max").values), np.isnan(live))


def test_who_reads_the_arrays_goes_on_while_a_replay_brings_more(long_run):
    run = OpenRun(long_run.record, dict(long_run.arrays))
    reading = iter(run.arrays.items())
    next(reading)
    run.add({"qk/D/0/q": np.zeros((1, 1, 4), np.float16)})
    run.let_go()
    assert len(list(reading)) == len(long_run.arrays) - 1
