"""The overview that a run keeps: what it holds equals the view it was made from, and what it lacks it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_map_view import make

from lab.errors import LabError
from lab.inspect import store, stored, survey
from lab.inspect.capture import NEVER, Capture
from lab.inspect.view import view

torch.set_num_threads(1)


@pytest.fixture
def layers():
    out = [make(n, death=n != 1, window=9 if n == 2 else None) for n in range(3)]
    for n, c in enumerate(out):
        c.layer = n
        c.bits = torch.where(torch.arange(37) % 5 == n, 4, 16).to(torch.uint8).expand(2, 37)
    return out


def kept(layers, size=8):
    about, arrays = stored.pack(survey.survey(layers, size))
    return stored.unpack(about, arrays)


def bare(layers):
    """The same layers as a run without queries and keys knows them (no window there: only the cache's record)."""
    return [Capture(torch.zeros(1).expand(4, 37, 1), torch.zeros(1).expand(2, 37, 1), scale=1.0, layer=c.layer, death=c.death,
                    bits=c.bits, window=c.window) for c in layers]


def test_bytes_hold_weights_to_a_few_percent():
    x = np.float32([0, 1e-9, 1e-7, 3e-5, 0.02, 0.5, 1, np.nan])
    back = stored.decode(stored.encode(x))
    assert back[0] == back[1] == back[7] == 0
    np.testing.assert_allclose(back[2:7], x[2:7], rtol=0.034)


@pytest.mark.parametrize("head, layer, pool", [
    (2, 1, "max"), (2, 1, "mean"), (0, 0, "max"), ("mean", 2, "max"), ("max", 0, "max"), ("mean", 0, "mean"),
    ("max", "max", "max"), (3, "max", "max"), ("mean", "mean", "mean"), (1, "mean", "mean")])
@pytest.mark.parametrize("window", [None, (11, 31)])
def test_what_is_kept_is_what_a_view_shows(layers, head, layer, pool, window):
    lens = stored.Stored(kept(layers), bare(layers), head, layer)
    got = lens.view(window, window, 512, 512, pool)
    assert got.pool == pool and got.row_step == got.col_step == 5
    some = layers if isinstance(layer, str) else layers[layer]
    over = layer if isinstance(layer, str) else None
    whole = view(some, head, got.rows, got.cols, got.shape[1], got.shape[0], pool, layers=over)
    assert whole.shape == got.shape and whole.row_step == 5
    np.testing.assert_array_equal(got.evicted, whole.evicted)
    np.testing.assert_array_equal(got.bits, whole.bits)
    np.testing.assert_array_equal(np.isnan(got.values), np.isnan(whole.values))
    np.testing.assert_allclose(got.values, whole.values, rtol=0.05, atol=2e-6)
    small = lens.view(None, None, 3, 3, pool)
    assert small.row_step == 15 and small.shape == (3, 3)
    ref = view(some, head, None, None, 3, 3, pool, layers=over)
    if ref.row_step == 15:
        np.testing.assert_allclose(small.values, ref.values, rtol=0.05, atol=2e-6)


def test_what_was_not_kept_is_said(layers):
    found = kept(layers)
    assert stored.Stored(found, bare(layers), "mean", "mean").view(None, None, 8, 8, "max").pool == "mean"
    assert stored.Stored(found, bare(layers), "max", "max").view(None, None, 8, 8, "mean").pool == "max"
    with pytest.raises(LabError, match="mixture"):
        stored.Stored(found, bare(layers), "max", "mean").view(None, None, 8, 8, "max")
    with pytest.raises(LabError, match="does not hold layer 7"):
        stored.Stored(found, bare(layers), 0, 7).view(None, None, 8, 8, "max")
    with pytest.raises(LabError, match="Heads are numbered"):
        stored.Stored(found, bare(layers), 9, 1).view(None, None, 8, 8, "max")
    lens = stored.Stored(found, bare(layers), 0, 1)
    for ask in (lambda: lens.row(3), lambda: lens.cell(3, 2)):
        with pytest.raises(LabError, match="replay it to zoom to single tokens"):
            ask()


def test_a_damaged_overview_is_none(layers):
    about, arrays = stored.pack(survey.survey(layers, 8))
    assert about["layers"] == [0, 1, 2] and arrays["largest"].nbytes == 3 * 4 * 36
    for bad in ({**about, "side": 9}, {**about, "step": 0}, {k: v for k, v in about.items() if k != "tokens"}):
        assert stored.unpack(bad, arrays) is None
    assert stored.unpack(about, {"largest": arrays["largest"]}) is None
    assert stored.unpack(about, {**arrays, "mean": arrays["mean"][..., :5]}) is None


def test_sampled_rows_never_exceed_all_rows(layers, monkeypatch):
    whole, some = survey.survey(layers, 8), survey.survey(layers, 8, read=2)
    seen = np.isfinite(some.largest)
    assert some.read == 2 and (some.largest[seen] <= whole.largest[seen] + 1e-6).all()
    monkeypatch.setattr(survey, "MOST_CPU", 37 * 37 // 2 * 4 * 3 // 2)
    assert survey.rows_to_read(layers, 8) in (2, 3) and survey.rows_to_read(layers[:1], 8) is None


def test_light_captures_know_what_the_cache_did():
    death = np.full((2, 1, 6), NEVER, np.int32)
    death[1, 0, 2] = 4
    found = stored.light({"cache/A/death": death, "cache/A/bits": np.full((2, 1, 6), 8, np.uint8)}, "A", 1, 6, 3, 1)
    assert found.heads == 3 and int(found.death[0, 2]) == 4 and found.demoted is None
    assert stored.light({}, "A", 1, 6, 3, 1).death is None


def test_a_map_seen_before_comes_back():
    weights = np.tril(np.random.default_rng(0).random((4, 4))).astype(np.float32)
    lens = stored.Seen({"tokens": 15, "row_step": 4, "col_step": 4, "pool": "max", "group": 2}, stored.encode(weights), "rollout")
    v = lens.view((5, 11), (0, 15), 512, 512, "mean")
    assert v.rows == (4, 12) and v.cols == (0, 15) and v.shape == (2, 4) and v.pool == "max" and v.group == 2
    assert np.isnan(v.values[0, 2:]).all()
    np.testing.assert_allclose(v.values[0, :2], weights[1, :2], rtol=0.034)


def test_more_layers_than_the_store_holds_are_drawn_the_same(monkeypatch):
    """Log-sum-exps that were forgotten while others were computed are computed again, never taken as nothing."""
    tokens = 256
    captures = [Capture(torch.randn(4, tokens, 8), torch.randn(2, tokens, 8), scale=0.3, layer=n) for n in range(4)]
    want = view(captures, "mean", None, None, 64, 64, "max", layers="mean").values
    for capture in captures:
        store.drop(capture.serial)
    monkeypatch.setattr(store, "LIMIT_BYTES", 3 * 4 * tokens * 4)
    got = view(captures, "mean", None, None, 64, 64, "max", layers="mean").values
    assert np.isfinite(want).any() and np.array_equal(got, want, equal_nan=True)
