"""Vertical-slash, XAttention, Rectified, SF-Attn, SWAT: each sheet's Test line; and Delta over any of them."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu_attention import materialised
from lab.engine.attend import general
from lab.engine.sparse import attend
from lab.techniques.rectified import Rectified
from lab.techniques.sf_attn import SFAttn
from lab.techniques.swat import Swat, slopes
from lab.techniques.vertical_slash import VerticalSlash
from lab.techniques.xattention import XAttention, antidiagonals, smallest_sets
from techniques.reading import context, differs, random, run, same


def dense(ctx):
    return general(ctx, [], [], False, False).out


@pytest.mark.parametrize("spec", [
    "vertical_slash(slash=1)", "vertical_slash(vertical=1)", "xattention(tau=1)", "rectified(share=1)", "sf_attn(group=1)",
    "swat(window=1000)",
])
def test_reading_everything_is_dense(spec):
    same(spec)
    same(spec, chunk=64)


@pytest.mark.parametrize("spec", [
    "vertical_slash", "xattention(tau=0.5,block=16)", "rectified(block=8)", "sf_attn", "swat(window=32)",
    "swat(mode=sigmoid)", "swat(mode=swat)",
])
def test_reading_less_changes_something(spec):
    differs(spec)
    differs(spec, chunk=64)


@pytest.mark.parametrize("spec", ["vertical_slash", "xattention(tau=0.3)", "sf_attn", "swat(window=32)"])
def test_delta_with_every_row_an_anchor_is_dense(spec):
    same(f"{spec}+delta(gamma=1)" if "swat" not in spec else "swat(window=1000)+delta(gamma=1)")


def test_only_chosen_columns_are_fetched():
    """The engine's gathered attention equals masked attention for a ragged choice."""
    q, k, v = random(1, 4, 90, 8), random(1, 2, 90, 8, seed=1), random(1, 2, 90, 8, seed=2)
    ctx = context(q, k, v)
    technique = VerticalSlash(vertical=3.0, slash=4.0, window=8)
    rows = technique.select(ctx)
    got = attend(ctx, [], [rows], [], None, True, True)
    mask = rows.keep(0, 90).flatten(1, 2) & torch.ones(90, 90, dtype=torch.bool).tril()
    want, _ = materialised(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), ctx.scale, mask=mask)
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.mass.sum(), torch.tensor(4 * 90.0))


def test_planted_column_and_diagonal_are_found():
    n, d = 128, 16
    k = 0.05 * random(1, 1, n, d)
    q = 0.05 * random(1, 1, n, d, seed=1)
    q[..., 0] = 4
    k[0, 0, 37, 0] = 8  # everyone looks at 37
    line = torch.nn.functional.normalize(random(n, d - 1, seed=3), dim=-1) * 6
    k[0, 0, :, 1:] += line
    q[0, 0, 20:, 1:] += line[: n - 20]  # and 20 tokens back
    columns, offsets = VerticalSlash(vertical=1.5, slash=2.0, sinks=0, window=32).lines(context(q, k))
    assert columns[0, 0, 37]
    assert offsets[0, 0, 20] and offsets[0, 0, 0]


def test_antidiagonal_sums_equal_brute_force():
    q, k = random(1, 4, 40, 8), random(1, 2, 52, 8, seed=1)
    stride = 4
    got = antidiagonals(q, k, stride)
    s = q @ k.repeat_interleave(2, 1).mT
    for a in range(10):
        for b in range(13):
            square = s[..., a * 4 : a * 4 + 4, b * 4 : b * 4 + 4]
            want = sum(square[..., i, stride - 1 - i] for i in range(stride))
            torch.testing.assert_close(got[..., a, b], want)


def test_xattention_keeps_tau_and_grows_with_it():
    q, k = random(1, 4, 256, 8), random(1, 2, 256, 8, seed=1)
    ctx = context(2 * q, k)
    mass, _ = XAttention().block_mass(ctx)
    before = None
    for tau in (0.3, 0.6, 0.9):
        kept = smallest_sets(mass, tau)
        assert ((mass * kept).sum(-1) >= tau * mass.sum(-1) - 1e-5).all()
        assert before is None or not (before & ~kept).any()
        before = kept


def test_rectified_mass_is_one_and_error_falls_with_blocks():
    q, k, v = random(1, 2, 128, 16), random(1, 2, 128, 16, seed=1), random(1, 2, 128, 16, seed=2)
    exact = dense(context(q, k, v))
    errors = []
    for least in (1, 2, 4):
        ctx = context(q, k, v)
        technique = Rectified(share=0.01, block=16, least=least)
        out = attend(ctx, [], [technique.select(ctx)], [], None, False, False).out
        plan = dict(ctx.shared["rectified"])
        torch.testing.assert_close(plan["p"].sum(-1), torch.ones_like(plan["p"].sum(-1)))
        out = technique.combine(ctx, out, None)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)


def test_rectified_with_every_block_critical_is_dense():
    q, k, v = random(1, 2, 64, 16), random(1, 2, 64, 16, seed=1), random(1, 2, 64, 16, seed=2)
    ctx = context(q, k, v)
    technique = Rectified(share=1.0, block=16)
    out = attend(ctx, [], [technique.select(ctx)], [], None, False, False).out
    torch.testing.assert_close(technique.combine(ctx, out, None), dense(ctx))


def test_sf_attn_mask():
    q, k = random(1, 4, 16, 8), random(1, 4, 16, 8)
    keep = SFAttn(group=4.0, sinks=2).select(context(q, k)).keep(0, 16)[0, :, 0]
    assert keep.shape[0] == 4
    assert bool(keep[0, 7, 4]) and not bool(keep[0, 8, 7])  # groups of four
    assert bool(keep[3, 8, 7]) and not bool(keep[3, 6, 5])  # the last head is shifted by two
    assert not bool(keep[3, 15, 2]) and bool(keep[:, :, :2].all())  # no wrap-around; sinks for all


def test_swat_slopes_and_weights():
    a = slopes(8)
    assert torch.equal(a[:4], -a[4:]) and a[0] == 2**-2
    q, k = random(1, 2, 20, 8), random(1, 2, 20, 8, seed=1)
    technique = Swat(mode="swat", window=5, slopes=False)
    got = attend(context(q, k), [technique.select(None)], [], [], technique.weigh, True, True)
    assert (got.last >= 0).all() and (got.last < 1).all() and (got.last[..., :15] == 0).all()
    want = torch.sigmoid((q @ k.mT)[0, 0, -1, 15:] * 8**-0.5)
    torch.testing.assert_close(got.last[0, 0, 15:], want)


def test_swat_far_tokens_have_no_effect():
    """Beyond layers x window nothing reaches the last row, and no step reads more than the window."""
    session, base = run("swat(window=8)", prompt=120, steps=0)
    import tiny_models
    from lab.engine.session import Session
    from techniques.reading import model

    ids = tiny_models.tokens(120).tolist()
    ids[:60] = reversed(ids[:60])
    other = Session(model(), "swat(window=8)").prefill(ids)
    torch.testing.assert_close(base, other)
    session, _ = run("swat(window=8)", prompt=120, steps=3)
    assert all(layer.last_read == 8 * layer.heads for layer in session.cache.lab_layers)
