"""Head statistics on planted heads, and thumbnails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import full
from planted import from_weights, induction, uniform

from lab.errors import LabError
from lab.inspect import heads
from lab.inspect.capture import NEVER, Capture
from lab.inspect.heads import grid, stats, table
from lab.inspect.view import view

torch.set_num_threads(1)


def test_sink_identity_previous_uniform():
    t = 24
    sink = torch.zeros(t, t)
    sink[:, 0] = 1
    previous = torch.diag(torch.ones(t - 1), -1)
    previous[0, 0] = 1
    s = stats(from_weights([sink, torch.eye(t), previous, uniform(t)]), local=4, sinks=1)
    np.testing.assert_allclose(s.sink_mass[:3], [1, 0, 1 / (t - 1)], atol=1e-4)
    np.testing.assert_allclose(s.sink_rate[:3], [1, 0, 1 / (t - 1)], atol=1e-4)
    np.testing.assert_allclose(s.mean_distance[:3], [np.arange(1, t).mean(), 0, 1], atol=1e-3)
    np.testing.assert_allclose(s.previous[:3], [1 / (t - 1), 0, 1], atol=1e-4)
    np.testing.assert_allclose(s.entropy, [0, 0, 0, np.log(np.arange(2, t + 1)).mean()], atol=1e-3)
    assert s.evenness[3] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(s.local_mass[1:3], [1, 1], atol=1e-4)
    n = np.arange(2, t + 1)
    assert s.tail_mass[3] == pytest.approx(np.mean(np.maximum(0, 1 - 8 / n)), abs=1e-4)
    near, first = np.minimum(4, n) / n, np.where(n > 4, 1 / n, 0)
    assert s.far_mass[3] == pytest.approx(np.mean(1 - near - first), abs=1e-4)
    assert np.isnan(s.induction).all() and s.rows == t - 1


def test_induction_head_is_found():
    ids = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
    s = stats(from_weights([induction(ids), uniform(len(ids))]), ids)
    assert s.induction[0] == pytest.approx(1, abs=1e-3) and s.induction[1] < 0.4
    assert np.isnan(stats(from_weights([uniform(4)]), [1, 2, 3, 4]).induction[0])


def test_sampling_agrees_with_every_row(monkeypatch):
    torch.manual_seed(0)
    capture = Capture(torch.randn(2, 600, 8), torch.randn(1, 600, 8))
    every, some = stats(capture, max_rows=None), stats(capture, max_rows=160)
    assert every.rows == 599 and some.rows == 160
    np.testing.assert_allclose(some.entropy, every.entropy, rtol=0.1)
    monkeypatch.setattr("lab.inspect.scores.CELLS_CPU", 1000)
    again = stats(Capture(capture.q, capture.k), max_rows=None)
    for name in heads.MEASURES:
        np.testing.assert_allclose(getattr(again, name), getattr(every, name), rtol=1e-4, atol=1e-5)


def test_evicted_entries_do_not_count():
    t = 12
    death = torch.full((1, t), NEVER)
    death[0, 0] = 3
    s = stats(Capture(torch.zeros(1, t, 4), torch.zeros(1, t, 4), death=death))
    assert s.sink_mass[0] == pytest.approx((1 / 2 + 1 / 3) / 11, abs=1e-5)
    assert s.evenness[0] == pytest.approx(1, abs=1e-5)


def test_table_names_heads_and_bad_ids_are_refused():
    capture = Capture(torch.randn(4, 9, 4), torch.randn(2, 9, 4), layer=7)
    rows = table([capture], range(9))
    assert [(r["layer"], r["head"], r["kv_head"]) for r in rows] == [
        (7, 0, 0),
        (7, 1, 0),
        (7, 2, 1),
        (7, 3, 1),
    ]
    with pytest.raises(LabError, match="needs its id"):
        stats(capture, [1, 2])


def test_grid_is_the_pooled_view():
    torch.manual_seed(1)
    death = torch.full((1, 50), NEVER)
    death[0, 4:12] = 20
    layers = [Capture(torch.randn(2, 50, 8), torch.randn(1, 50, 8), layer=n, death=death) for n in range(2)]
    g = grid(layers, 8)
    assert g.values.shape == (2, 2, 8, 8) and g.layers == (0, 1) and g.step == 7 and not g.sampled
    np.testing.assert_allclose(g.values[1, 1], view(layers[1], 1, width=8, height=8).values, rtol=1e-5, atol=1e-7)


def test_long_grid_samples_rows_of_each_cell():
    torch.manual_seed(2)
    capture = Capture(torch.randn(1, 2100, 4), torch.randn(1, 2100, 4))
    g = grid([capture], 8, rows_per_cell=4)
    assert g.sampled and g.values.shape == (1, 1, 8, 8)
    w, _, _ = full(capture, 0)
    end = min(4 * g.step, 2100)
    assert g.values[0, 0, 3, 1] == pytest.approx(w[end - 4 : end, g.step : 2 * g.step].max(), rel=1e-4)
    assert np.isnan(g.values[0, 0, 0, 1]) and np.isfinite(g.values[0, 0, 3, 3])
    with pytest.raises(LabError):
        grid([])
