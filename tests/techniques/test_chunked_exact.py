"""Chunked exact attention (Rabe & Staats): the LSE merge over key chunks, the reference of every partial attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from kernels.cpu_attention import materialised
from kernels.merge import merge
from techniques.reading import random, run


def chunked(q, k, v, scale, size, order=None):
    """Attention over key chunks of `size`, merged by their log-sum-exps; order permutes the chunks."""
    n, rows = k.shape[2], q.shape[2]
    i = torch.arange(n - rows, n)[:, None]
    parts = []
    for at in range(0, n, size):
        j = torch.arange(at, min(at + size, n))
        parts.append(materialised(q, k[:, :, at : at + size], v[:, :, at : at + size], scale, mask=j <= i))
    if order is not None:
        parts = [parts[o] for o in order(len(parts))]
    return merge([p[0] for p in parts], [p[1] for p in parts])


@given(st.integers(1, 70), st.integers(0, 1000))
def test_any_chunk_size_equals_dense(size, seed):
    q, k, v = random(1, 2, 20, 8, seed=seed), random(1, 2, 50, 8, seed=seed + 1), random(1, 2, 50, 8, seed=seed + 2)
    want = chunked(q, k, v, 0.3, 50)
    got = chunked(q, k, v, 0.3, size)  # late chunks are fully masked for early rows
    assert torch.isfinite(got[0]).all()
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("seed", range(3))
def test_chunks_may_come_in_any_order(seed):
    q, k, v = random(1, 2, 20, 8), random(1, 2, 50, 8, seed=1), random(1, 2, 50, 8, seed=2)
    shuffled = chunked(q, k, v, 0.3, 7, lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())
    torch.testing.assert_close(shuffled[0], chunked(q, k, v, 0.3, 7)[0])


def test_rows_that_see_nothing_are_zero_never_nan():
    q, k, v = random(1, 1, 3, 4), random(1, 1, 5, 4), random(1, 1, 5, 4)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    out, lse = materialised(q, k, v, 1.0, mask=nothing)
    both = merge([out, out], [lse, lse])
    assert (both[0] == 0).all() and (both[1] == -torch.inf).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 199, 200, None])
def test_prompts_fed_in_chunks_give_the_same_logits(chunk):
    torch.testing.assert_close(run("dense", chunk=chunk)[1], run("dense")[1], atol=1e-4, rtol=1e-4)
