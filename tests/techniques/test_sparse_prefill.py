"""Vertical-slash, XAttention, Rectified, SF-Attn, SWAT: each sheet's Test line; and Delta over any of them."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu_attention import materialised
from lab.engine.attend import general
from lab.engine.sparse import attend
from lab.techniques import minference
from lab.techniques.rectified import Rectified
from lab.techniques.sf_attn import SFAttn
from lab.techniques.swat import Swat, slopes
from lab.techniques.vertical_slash import VerticalSlash
from lab.techniques.xattention import XAttention, antidiagonals, smallest_sets
from techniques.reading import context, differs, random, run, same


def dense(ctx):
    return general(ctx, [], [], False, False).out


@pytest.mark.parametrize("spec", [
    "minference(share=1)",
    "vertical_slash(slash=1)", "vertical_slash(vertical=1)", "xattention(tau=1)", "rectified(share=1)", "sf_attn(group=1)",
    "swat(window=1000)",
])
def test_reading_everything_is_dense(spec):
    same(spec)
    same(spec, chunk=64)


@pytest.mark.parametrize("spec", [
    "minference(pattern=lines,share=0.125)", "minference(pattern=blocks,share=0.25)", "minference(pattern=a_shape,share=0.125)",
    "vertical_slash", "xattention(tau=0.5,block=16)", "rectified(block=8)", "sf_attn", "swat(window=32)",
    "swat(mode=sigmoid)", "swat(mode=swat)",
])
def test_reading_less_changes_something(spec):
    differs(spec)
    differs(spec, chunk=64)


SPARSE = ["minference(pattern=blocks)", "vertical_slash", "xattention(tau=0.3)", "sf_attn", "swat(window=32)"]


@pytest.mark.parametrize("spec", SPARSE)
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


def rectified_row(technique, q, k, v):
    """One generated token under Rectified, and what it was weighed by."""
    ctx = context(q, k, v)
    pick = technique.select(ctx)
    out = attend(ctx, [], [pick], [], None, False, False).out
    plan = dict(ctx.shared["rectified"])
    return technique.combine(ctx, out, None), plan


def test_rectified_decode_equals_its_formula():
    """R_i times attention over critical pages plus pooled mass times mean values, written out for each head."""
    n, b, d = 100, 16, 8
    q, k, v = 2 * random(1, 4, 1, d), random(1, 2, n, d, seed=1), random(1, 2, n, d, seed=2)
    k[:, :, 16:48] += 1.5 * q[:, ::2]  # pages the mean speaks for
    technique = Rectified(share=0.5, block=b, decode=True)
    got, plan = rectified_row(technique, q, k, v)
    for h in range(4):
        keys, values, query = k[0, h // 2], v[0, h // 2], q[0, h, 0]
        pages = [slice(i, min(i + b, n)) for i in range(0, n, b)]
        mean = torch.stack([keys[p].mean(0) for p in pages])
        deviation = torch.stack([(keys[p] - keys[p].mean(0)).abs().mean(0) for p in pages])
        mass = (mean @ query * d**-0.5).softmax(-1)
        critical = smallest_sets(mass, 0.5)
        critical[-1] = True
        trusted = ~critical & ((mean @ query).abs() > (deviation @ query).abs())
        assert torch.equal(plan["critical"][0, h, 0], critical) and torch.equal(plan["rectified"][0, h, 0], trusted)
        read = critical.repeat_interleave(b)[:n]
        want = (1 - mass[trusted].sum()) * (keys[read] @ query * d**-0.5).softmax(-1) @ values[read]
        for i in trusted.nonzero().flatten().tolist():
            want = want + mass[i] * values[pages[i]].mean(0)
        torch.testing.assert_close(got[0, h, 0], want)
    assert any(plan["rectified"][0, h].any() for h in range(4))


def test_rectified_decode_limits_and_reads():
    same("rectified(share=1,decode=true,block=16)")
    differs("rectified(share=0.3,decode=true,block=16)")
    q, k, v = random(1, 2, 1, 16), random(1, 2, 128, 16, seed=1), random(1, 2, 128, 16, seed=2)
    exact, errors = dense(context(q, k, v)), []
    for least in (1, 2, 4, 8):
        got, _ = rectified_row(Rectified(share=0.01, block=16, least=least, decode=True), q, k, v)
        errors.append(float((got - exact).norm() / exact.norm()))
    assert errors[-1] < 1e-5 and errors[0] > errors[2]
    session, _ = run("rectified(share=0.1,decode=true,block=16)", steps=4)
    assert all(layer.last_read < sum(layer.counts) and layer.last_probe > 0 for layer in session.cache.lab_layers)


@pytest.mark.parametrize("other", ["kivi(residual=32)", "int_codes(bits=8)"])
def test_rectified_decode_means_follow_the_cache(other):
    """Means kept up to date step by step are those of what is stored."""
    session, _ = run(f"rectified(share=0.3,decode=true,block=16)+{other}", prompt=150, steps=40)
    layer = session.cache.lab_layers[1]
    for name, stored in (("rectified/mean", layer.all_keys()), ("rectified/values/mean", layer.all_values())):
        want = torch.stack([stored[:, :, p * 16 : p * 16 + 16].mean(2) for p in range(9)], 2)
        torch.testing.assert_close(layer.state[name][:, :, :9], want, atol=0.06, rtol=0.1)


def test_the_jensen_option_is_closer_to_the_true_share():
    """A block's share by its mean logit alone is too low where its keys spread."""
    n, b = 256, 32
    q, k = 0.7 * random(1, 16, 1, 16), random(1, 16, n, 16, seed=1)
    k[:, :, 64:128] *= 2
    true = (q @ k.mT * 0.25).softmax(-1).unflatten(-1, (-1, b)).sum(-1)
    wrong = []
    for jensen in (False, True):
        _, plan = rectified_row(Rectified(share=0.3, decode=True, block=b, jensen=jensen), q, k, k)
        wrong.append(float((plan["p"] - true).abs().sum()))
    assert wrong[1] < 0.6 * wrong[0]
    same("rectified(share=1,jensen=true)")


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


def test_swat_memory_is_bounded_where_entries_outside_the_window_go():
    """With a cache that drops what the window no longer reads, memory stops growing and nothing changes."""
    want = run("swat(window=8)", prompt=60, steps=30)[1]
    session, got = run("swat(window=8)+streaming_llm(budget=10,sinks=0,renumber=false)", prompt=60, steps=30)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert all(layer.counts == [10, 10] for layer in session.cache.lab_layers)


def test_delta_makes_random_data_worse():
    """Its assumption, slow drift, does not hold there: what the sheet's check found (0.94 to 1.06)."""
    from lab.engine.attend import dense_rows
    from lab.engine.slots import Band
    from lab.techniques.delta import Delta

    q, k, v = random(1, 8, 512, 64), random(1, 8, 512, 64, seed=1), random(1, 8, 512, 64, seed=2)
    ctx = context(q, k, v)
    exact, sparse = dense(ctx), general(ctx, [Band(4, 32)], [], False, False).out
    fixed = Delta(gamma=8).combine(ctx, sparse, lambda rows: dense_rows(ctx, rows, []))
    body = slice(64, 380)  # before the rows that are dense at the end
    before, after = (float((x - exact)[:, :, body].norm() / exact[:, :, body].norm()) for x in (sparse, fixed))
    assert after > before > 0.5


# -- MInference --------------------------------------------------------------------------------------------------------
def mask_of(keep, rows):
    return keep(0, rows).flatten(1, 2) & torch.ones(rows, rows, dtype=torch.bool).tril()


def test_patterns_read_about_equally_much():
    """No pattern reads more than share x prompt entries in the mean row, and none is cheap by much."""
    n = 256
    ctx = context(random(1, 4, n, 8), random(1, 2, n, 8, seed=1))
    for share in (0.125, 0.25):
        for name, keep in minference.keeps(ctx, share, list(minference.PATTERNS), 64).items():
            read = mask_of(keep, n).expand(1, 4, n, n).sum(-1).float()
            assert read.max() <= share * n + minference.BLOCK, name
            assert read[:, :, n // 2 :].mean() >= 0.4 * share * n, name


def test_a_planted_block_is_found():
    """Block 3 holds what the rows of block 6 ask for; block 0 and the diagonal are always read."""
    n, b = 256, minference.BLOCK
    q, k = 0.05 * random(1, 1, n, 8), 0.05 * random(1, 1, n, 8, seed=1)
    q[0, 0, 6 * b : 7 * b, 0] = k[0, 0, 3 * b : 4 * b, 0] = 4
    chosen = minference.top_blocks(context(q, k), 3)[0, 0, 0]
    assert chosen[6].nonzero().flatten().tolist() == [0, 3, 6]
    assert all(chosen[i, i] and chosen[i, 0] and not chosen[i, i + 1 :].any() for i in range(8))
    late = minference.top_blocks(context(q[:, :, 200:], k), 3)[0, 0, 0]  # fed in pieces: blocks stay those of the prompt
    assert torch.equal(late[0], chosen[6])


def test_heads_keep_their_own_patterns():
    """Two heads of a group on different patterns read what each would read alone."""
    n = 128
    q, k, v = random(1, 4, n, 8), random(1, 2, n, 8, seed=1), random(1, 2, n, 8, seed=2)
    names = ["a_shape", "blocks", "diagonals", "sinks"]
    table = torch.tensor([[list(minference.PATTERNS).index(x) for x in names]]).expand(10, -1)
    ctx = context(q, k, v, shared={"learnt/minference": {"pattern_250": table}})
    rows = minference.MInference().select(ctx)
    got = attend(ctx, [], [rows], [], None, False, False).out
    kept = minference.keeps(ctx, 0.25, names, 64)
    for h, name in enumerate(names):
        mask = mask_of(kept[name], n).expand(1, 4, n, n)[:, h : h + 1]
        want, _ = materialised(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1], ctx.scale, mask=mask)
        torch.testing.assert_close(got[:, h : h + 1], want)


def test_each_head_gets_the_pattern_with_the_least_error(calibrations):
    """Three planted heads: local, one far column, one far diagonal; and what was learnt is the smallest error."""
    from lab.engine.learnt import find
    from lab.measure.fitting.minference import error
    from techniques.conftest import loaded

    tensors = find(minference.MInference(), loaded().model).tensors
    for share in (125, 250, 500):
        assert torch.equal(tensors[f"pattern_{share}"], tensors[f"error_{share}"].argmin(0))
        assert (tensors[f"error_{share}"] >= 0).all() and tensors[f"pattern_{share}"].shape == (3, 4)
    n, d = 256, 24
    line = torch.nn.functional.normalize(random(n, d, seed=3), dim=-1) * 9
    k, v = line[None, None].clone(), random(1, 1, n, d, seed=4)
    q = torch.zeros(1, 3, n, d)
    q[0, 0, 8:] = line[: n - 8]  # eight tokens back: inside the window
    q[0, 1] = line[77] + line[141]  # two columns in the middle
    q[0, 2, 120:] = line[: n - 120]  # 120 tokens back: only a diagonal reaches it
    ctx = context(2 * q, k, v)
    full = dense(ctx)
    errors = {p: error(ctx, keep, full) for p, keep in minference.keeps(ctx, 0.25, list(minference.PATTERNS), 64).items()}
    assert errors["a_shape"][0] < 0.1 and errors["a_shape"][2] > 0.3
    for p in ("columns", "lines", "diagonals"):
        assert errors[p][1] < errors["a_shape"][1] and errors[p][2] < errors["a_shape"][2]
    differs("minference")
