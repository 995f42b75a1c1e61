"""The torch attention paths against float64 matrices: every shape of visibility, grouped heads, any chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import heads, visibility

from kernels import cpu_attention as core

SEEDS = st.integers(0, 10**6)


def qkv(seed: int, hq: int, hk: int, rows: int, n: int, d: int = 16, batch: int = 2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    make = lambda h, t: torch.randn(batch, h, t, d, generator=g).to(dtype)  # noqa: E731
    return make(hq, rows) * 2, make(hk, n), make(hk, n)


def same(got, want, atol=3e-5):
    return np.allclose(got.detach().double().numpy(), want, atol=atol)


@given(SEEDS, st.integers(1, 9), st.integers(1, 40), st.booleans())
@settings(max_examples=40)
def test_plain_and_materialised(seed, rows, n, causal):
    q, k, v = qkv(seed, 2, 2, rows, n)
    see = visibility(range(rows), range(n)) if causal else None
    for path in (core.plain, core.materialised):
        out, lse = path(q, k, v, 0.25, causal=causal)
        assert lse.dtype == torch.float32
        for b in range(2):
            want = heads(q[b], k[b], v[b], 0.25, see)
            assert same(out[b], want[0]) and same(lse[b], want[1])


@given(SEEDS, st.integers(1, 40))
@settings(max_examples=20)
def test_row_blocks_do_not_matter(seed, block):
    """Chunked exact attention (sparse sheet 1): every block size, non-divisors included."""
    q, k, v = qkv(seed, 2, 2, 33, 47)
    a, b = core.materialised(q, k, v, 0.25, causal=True), core.materialised(q, k, v, 0.25, causal=True, rows=block)
    assert torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1], b[1], atol=1e-6)


@pytest.mark.parametrize("dtype,atol", [
    (torch.float32, 3e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3), (torch.float64, 1e-5),
])
def test_dtypes(dtype, atol):
    q, k, v = qkv(1, 2, 2, 5, 12, dtype=dtype)
    out, lse = core.plain(q, k, v, 0.25)
    assert out.dtype == dtype
    want = heads(q[0].double(), k[0].double(), v[0].double(), 0.25)
    assert same(out[0], want[0], atol) and same(lse[0], want[1], atol)


def test_masks_boolean_and_additive_and_rows_without_keys():
    q, k, v = qkv(2, 2, 2, 4, 6)
    see = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    see[2] = False
    out, lse = core.plain(q, k, v, 0.25, mask=see)
    want = heads(q[0], k[0], v[0], 0.25, see)
    assert same(out[0], want[0]) and torch.isneginf(lse[:, :, 2]).all() and (out[:, :, 2] == 0).all()
    additive = torch.randn(1, 1, 1, 6)
    want = heads(q[1], k[1], v[1], 0.25, bias=np.broadcast_to(additive[0].numpy(), (2, 4, 6)))
    assert same(core.plain(q, k, v, 0.25, mask=additive)[0][1], want[0])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_causal(groups):
    q, k, v = qkv(3, 2 * groups, 2, 29, 29)
    out, lse = core.grouped_causal(q, k, v, 0.25)
    for b in range(2):
        want = heads(q[b], k[b], v[b], 0.25, visibility(range(29), range(29)))
        assert same(out[b], want[0]) and same(lse[b], want[1])


@given(SEEDS, st.integers(0, 12), st.integers(1, 50), st.integers(0, 30), st.integers(1, 40))
@settings(max_examples=60)
def test_band(seed, sinks, window, start, block):
    """A-shape: row i reads j < sinks or i - j < window, whatever the block of rows and the place in the sequence."""
    rows = 21
    q, k, v = qkv(seed, 4, 2, rows, start + rows, batch=1)
    out, lse = core.band(q, k, v, 0.25, sinks=sinks, window=window, start=start, block=block)
    see = visibility(range(start, start + rows), range(start + rows), bands=[(sinks, window)])
    want = heads(q[0], k[0], v[0], 0.25, see)
    assert same(out[0], want[0]) and same(lse[0], want[1])


@given(
    SEEDS, st.sampled_from([None, 5.0]), st.sampled_from([None, 1, 7, 100]), st.sampled_from([(), ((2, 5),), ((0, 9), (3, 4))]),
    st.integers(0, 20), st.integers(1, 30), st.booleans(),
)
@settings(max_examples=60)
def test_column_mass(seed, softcap, window, bands, start, block, biased):
    """Mass recomputed from row lse equals the sum of the weights, under everything that shaped them."""
    rows, n = 17, start + 17
    q, k, v = qkv(seed, 4, 2, rows, n, batch=1)
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0])
    dense_bias = np.zeros((4, rows, n))
    dense_bias[:, :, 0] = bias[:, None]
    see = visibility(range(start, n), range(n), window, bands)
    _, lse, weights = heads(q[0], k[0], v[0], 0.25, see, softcap=softcap, bias=dense_bias if biased else None)
    got = core.column_mass(
        q, k, torch.tensor(lse, dtype=torch.float32)[None], 0.25, start=start, softcap=softcap, window=window, bands=bands,
        biases=[(0, bias)] if biased else [], rows=block,
    )
    assert same(got[0], weights.reshape(2, 2, rows, n).sum((1, 2)), atol=1e-4)
