"""Views equal brute-force attention, whatever the window, zoom, reduction and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import check, full
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from lab.inspect import bundle, pooled, scores, store
from lab.inspect.capture import NEVER, Capture
from lab.inspect.scores import Cancelled, row_lse
from lab.inspect.view import cell, difference, overview, row, view

torch.set_num_threads(1)


def make(
    seed: int,
    t: int = 37,
    heads: int = 4,
    kv: int = 2,
    d: int = 8,
    death: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sharp: float = 2.0,
) -> Capture:
    g = torch.Generator().manual_seed(seed)
    dead = None
    if death:
        own = torch.arange(t).expand(kv, t)
        dead = torch.where(
            torch.rand(kv, t, generator=g) < 0.5, own + torch.randint(0, t, (kv, t), generator=g), NEVER
        )
    extra = None
    if bias:
        extra = torch.randn(heads, t, generator=g)
        extra[0, 3 % t] = -torch.inf
    return Capture(
        torch.randn(heads, t, d, generator=g) * sharp,
        torch.randn(kv, t, d, generator=g),
        death=dead,
        key_bias=extra,
        softcap=softcap,
        window=window,
        layer=0,
        letter="A",
    )


def heads_of(head, captures):
    if isinstance(head, str):
        return [(c, h) for c in range(len(captures)) for h in range(captures[0].heads)], head
    return [(c, head) for c in range(len(captures))], "mean"


@pytest.fixture(params=["direct", "stored"])
def route(request, monkeypatch):
    """Both ways a view is made: afresh, and from the stored level; with blocks small enough to be cut many
    times."""
    monkeypatch.setattr(scores, "CELLS_CPU", 64)
    if request.param == "stored":
        monkeypatch.setattr(pooled, "DIRECT_CPU", 0)
    return request.param


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    t=st.integers(1, 40),
    death=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    window=st.sampled_from([None, 1, 5]),
    pool=st.sampled_from(["max", "mean"]),
    head=st.sampled_from([0, 1, "mean", "max"]),
    direct=st.booleans(),
    cells=st.sampled_from([16, 100, 1 << 20]),
    fine=st.sampled_from([4, 16]),
)
def test_any_view_equals_brute_force(
    data, seed, t, death, bias, softcap, window, pool, head, direct, cells, fine
):
    capture = make(seed, t, heads=2, kv=1, death=death, bias=bias, softcap=softcap, window=window)
    r0, c0 = data.draw(st.integers(0, t - 1)), data.draw(st.integers(0, t - 1))
    r1, c1 = data.draw(st.integers(r0 + 1, t)), data.draw(st.integers(c0 + 1, t))
    w, h = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(scores, "CELLS_CPU", cells)
        m.setattr(pooled, "FINE", fine)
        m.setattr(pooled, "DIRECT_CPU", 10**9 if direct else 0)
        v = view(capture, head, (r0, r1), (c0, c1), w, h, pool)
    assert v.shape[0] <= h and v.shape[1] <= w
    assert v.rows[0] <= r0 and v.rows[1] >= r1 and v.cols[0] <= c0 and v.cols[1] >= c1
    check(v, [capture], *heads_of(head, [capture]))


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("head", [3, "mean", "max"])
@pytest.mark.parametrize("size", [1, 5, 37, 512])
def test_every_zoom_of_the_whole_run(route, head, pool, size):
    capture = make(1, death=True, bias=True, softcap=5.0, window=20)
    v = view(capture, head, width=size, height=size, pool=pool)
    assert max(v.shape) <= size
    assert v.exact == (size >= 37)
    check(v, [capture], *heads_of(head, [capture]))


@pytest.mark.parametrize("head", [1, "mean", "max"])
def test_layers_combine_before_pooling(route, head):
    layers = [make(1, death=True), make(2, window=9), make(3)]
    v = view(layers, head, (4, 33), (0, 30), 6, 7)
    check(v, layers, *heads_of(head, layers))


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("head", [1, "mean", "max"])
@pytest.mark.parametrize("window", [((0, 37), (0, 37), 37), ((4, 33), (0, 30), 6), ((0, 37), (0, 37), 9)])
def test_heads_and_layers_reduce_in_that_order(route, head, over, pool, window):
    layers = [make(1, death=True), make(2, window=9), make(3)]
    rows, cols, size = window
    v = view(layers, head, rows, cols, size, size, pool, layers=over)
    every, reduce = heads_of(head, layers)
    check(v, layers, every, reduce, layers=over)
    got = row(layers, head, 30, over)
    seen = np.isfinite(got)
    exact = view(layers, head, (30, 31), None, 512, 512, layers=over).values[0]
    np.testing.assert_allclose(got[seen], exact[seen], atol=1e-6)
    assert cell(layers, head, 30, 30, over).weight == pytest.approx(float(got[30]), abs=1e-6)


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize("heads, over, step", [("max", "max", 5), ("mean", "mean", 5), ("mean", "max", 1), ("max", "mean", 1)])
def test_what_the_kernel_pools_head_by_head_is_what_is_drawn(heads, over, step, kind):
    layers = [make(1, death=True, bias=True), make(2, window=9, softcap=4.0)]
    sources = [pooled.Source(c, h) for c in layers for h in range(c.heads)]
    frame, reduce = pooled.Frame((3, 33), (0, 30), step, step), pooled.Reduce(heads, over)
    commutes = step == 1 or heads == over == ("max" if kind == "max" else "mean")
    assert (step == 1 or pooled._only(sources, reduce, "max" if kind == "max" else "mean")) == commutes
    if commutes:
        got = pooled._kernel(sources, reduce, frame, kind, None, None, impl="torch")
        want = pooled.draw(sources, reduce, frame, (kind,))[kind]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_grouped_heads_read_their_kv_head():
    capture = make(5, heads=6, kv=2)
    assert [capture.kv_head(h) for h in range(6)] == [0, 0, 0, 1, 1, 1]
    for h in (0, 2, 3, 5):
        np.testing.assert_allclose(
            np.nan_to_num(np.asarray(view(capture, h))), full(capture, h)[0], atol=3e-5
        )


def test_large_logits_stay_exact():
    capture = make(6, sharp=60.0)
    check(view(capture, 0, width=9, height=9), [capture], [(0, 0)], "mean", atol=3e-4)


def test_evicted_is_never_zero():
    capture = make(7, t=16, heads=1, kv=1)
    capture.death = torch.full((1, 16), NEVER, dtype=torch.int32)
    capture.death[0, 2:6] = 8
    v = view(capture, 0)
    assert np.isnan(v.values[8:, 2:6]).all() and (v.evicted[8:, 2:6] == 255).all()
    assert np.isfinite(v.values[6:8, 2:6]).all() and (v.evicted[:8] == 0).all()
    assert np.isnan(v.values[0, 1:]).all() and (v.evicted[0] == 0).all(), "the future is blank, not evicted"
    coarse = view(capture, 0, width=4, height=4)
    assert coarse.evicted[2, 1] == 128 and np.isfinite(coarse.values[2, 1])


def test_a_row_that_sees_nothing_is_blank():
    capture = make(8, t=6, heads=1, kv=1)
    capture.death = torch.zeros(1, 6, dtype=torch.int32)
    v = view(capture, 0, pool="mean")
    assert np.isnan(v.values).all() and np.isneginf(row_lse(capture, 0)).all()
    assert np.isnan(row(capture, 0, 3)).all()


def test_bits_are_those_read():
    capture = Capture(
        torch.randn(1, 8, 4),
        torch.randn(1, 8, 4),
        bits=torch.tensor([[16, 4, 2, 8, 16, 0, 16, 16]]),
        demoted=torch.tensor([[NEVER, 5, 6, 4, NEVER, NEVER, NEVER, NEVER]]),
        death=torch.tensor([[NEVER] * 5 + [7] + [NEVER] * 2]),
    )
    exact = view(capture, 0).bits
    assert (
        exact[4, 1] == 16
        and exact[5, 1] == 4
        and exact[5, 2] == 16
        and exact[6, 2] == 2
        and exact[3, 3] == 16
    )
    coarse = view(capture, 0, width=2, height=2).bits
    assert coarse.tolist() == [[16, 16], [2, 16]]
    assert (
        cell(capture, 0, 7, 1).bits == 4
        and cell(capture, 0, 7, 5).bits == 0
        and cell(capture, 0, 6, 5).bits == 16
    )
    assert view(make(1), 0).bits is None


def test_row_and_cell():
    capture = make(9, death=True)
    w, seen, _ = full(capture, 2)
    got = row(capture, 2, 30)
    assert got.dtype == np.float32 and (np.isfinite(got) == seen[30]).all()
    np.testing.assert_allclose(np.nan_to_num(got), w[30], atol=3e-5)
    best = int(w[30].argmax())
    hit = cell(capture, 2, 30, best)
    assert (
        hit.rank == 1
        and hit.visible == seen[30].sum()
        and hit.row_max == pytest.approx(w[30].max(), abs=1e-5)
    )
    assert hit.tail == pytest.approx(np.sort(w[30])[::-1][8:].sum(), abs=1e-5)
    assert cell(capture, 2, 3, 4).why == "future"
    lost = int(np.argmax(~seen[30][:31]))
    assert cell(capture, 2, 30, lost).why == f"evicted at row {int(capture.death[1, lost])}"
    assert cell(make(9, window=4), 0, 30, 2).why == "window"


def test_row_lse_matches():
    capture = make(10, bias=True)
    i = 20
    s = (capture.q[1].double() @ capture.k[0].double().T * capture.scale + capture.key_bias[1].double())[
        i, : i + 1
    ]
    assert row_lse(capture, 1)[i] == pytest.approx(float(torch.logsumexp(s, 0)), abs=1e-5)


def test_difference_needs_the_same_window():
    a, b = make(11), make(12, death=True)
    va, vb = view(a, 0, (3, 20), (0, 20), 5, 5), view(b, 0, (3, 20), (0, 20), 5, 5)
    d = difference(va, vb)
    np.testing.assert_allclose(d.values, vb.values - va.values)
    assert (d.evicted == vb.evicted).all()
    with pytest.raises(LabError, match="different windows"):
        difference(va, view(b, 0, (3, 21), (0, 20), 5, 5))


def test_cells_and_tokens_name_each_other():
    v = view(make(1), 0, (3, 30), (1, 22), 4, 5)
    for y in range(v.shape[0]):
        for x in range(v.shape[1]):
            (r0, r1), (c0, c1) = v.tokens_of(y, x)
            assert v.cell_of(r0, c0) == v.cell_of(r1 - 1, c1 - 1) == (y, x)
    assert v.cell_of(2, 5) is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: view(c, 4), "Heads are numbered 0 to 3"),
        (lambda c: view(c, -1), "Head -1 does not exist in layer 0 of A"),
        (lambda c: view(c, "median"), 'no head "median"'),
        (lambda c: view(c, 0, (0, 99)), "no rows 0 to 99"),
        (lambda c: view(c, 0, None, (5, 5)), "no columns 5 to 5"),
        (lambda c: view(c, 0, width=0), "width 0"),
        (lambda c: view(c, 0, pool="sum"), 'no pooling "sum"'),
        (lambda c: view([c, c], 0, layers="sum"), 'combined by "sum"'),
        (lambda c: view([], 0), "No layer"),
        (lambda c: view([c, make(1, t=5)], 0), "different length"),
        (lambda c: row(c, 0, 37), "Position 37"),
    ],
)
def test_bad_requests_say_what_is_possible(call, words):
    with pytest.raises(LabError, match=words):
        call(make(1))


def test_progress_rises_and_cancel_stops(monkeypatch):
    monkeypatch.setattr(scores, "CELLS_CPU", 64)
    monkeypatch.setattr(pooled, "DIRECT_CPU", 0)
    seen: list[float] = []
    overview(make(1), "mean", 8, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 2
    with pytest.raises(Cancelled):
        overview(make(1), 0, 8, cancel=lambda: True)


def test_no_block_is_larger_than_the_bound(monkeypatch):
    """The largest matrix of logits ever made stays at the bound, for a run many times larger."""
    largest = 0
    real = bundle.buffer

    def spy(size, device):
        nonlocal largest
        largest = max(largest, size)
        return real(size, device)

    monkeypatch.setattr(bundle, "buffer", spy)
    monkeypatch.setattr(scores, "CELLS_CPU", 1 << 14)
    monkeypatch.setattr(pooled, "DIRECT_CPU", 0)
    capture = make(1, t=1500, heads=1, kv=1)
    overview(capture, 0, 64, "mean")
    view(capture, 0, (700, 1400), (0, 700), 64, 64)
    row(capture, 0, 1499)
    assert 0 < largest <= 1 << 14


def test_the_store_forgets_captures_and_stays_bounded(monkeypatch):
    before = store.stored_bytes()
    capture = make(1, t=64)
    view(capture, "mean")
    assert store.stored_bytes() > before
    store.drop(capture.serial)
    assert store.stored_bytes() == before
    monkeypatch.setattr(store, "LIMIT_BYTES", before + 1000)
    for i in range(5):
        store.put(((-1,), i), b"", 400)
    assert store.get(((-1,), 4)) is not None and store.get(((-1,), 0)) is None
    store.drop(-1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head, over", [("mean", "mean"), ("max", "max"), ("mean", "max")])
def test_any_number_of_threads_draws_the_same(monkeypatch, head, over, threads):
    monkeypatch.setattr(scores, "CELLS_CPU", 256)
    layers = [make(n, death=True, window=None if n else 11) for n in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        v = view(layers, head, (2, 37), (0, 31), 16, 16, layers=over)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    check(v, layers, *heads_of(head, layers), layers=over)


def test_a_large_level_is_kept_in_half_precision(monkeypatch):
    monkeypatch.setattr(pooled, "DIRECT_CPU", 0)
    monkeypatch.setattr(pooled, "SMALL", 1)
    capture = make(2, death=True, sharp=6.0)
    for kind in ("max", "mean"):
        check(view(capture, "mean", width=6, height=6, pool=kind), [capture], *heads_of("mean", [capture]), atol=5e-4)
    sources, reduce = pooled.Source(capture, 0), pooled.Reduce("mean", "mean")
    level = pooled.fine([sources], reduce)
    assert level.largest.dtype == torch.float16
    small = level.frame(pooled.Frame((0, 36), (0, 36), level.step, level.step), "max")
    exact = pooled.draw([sources], reduce, pooled.Frame((0, 36), (0, 36), level.step, level.step), ("max",))["max"]
    far = (exact > 1e-8) & (exact < 1e-4)
    assert far.any() and ((small - exact).abs() <= exact * 2**-10)[far].all(), "small weights keep their digits"


def test_a_dtype_of_16_bits_is_scaled_after_widening():
    wide = make(3)
    half = Capture(wide.q.half(), wide.k.half(), scale=0.3)
    same = Capture(wide.q.half().float(), wide.k.half().float(), scale=0.3)
    np.testing.assert_allclose(np.nan_to_num(view(half, 1).values), np.nan_to_num(view(same, 1).values), atol=1e-7)
