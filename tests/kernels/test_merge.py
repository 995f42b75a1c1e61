"""Exact merging of partial attentions (I5), and corrections of a finished attention."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention

from kernels.merge import merge, scale_columns, sink_logit


def case(seed: int, rows: int, n: int, spread: float = 2.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 8, generator=g) * spread, torch.randn(n, 8, generator=g), torch.randn(n, 8, generator=g))


def tensors(out, lse, *rest):
    return torch.tensor(out, dtype=torch.float32), torch.tensor(lse, dtype=torch.float32)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(1, 4), st.floats(0.1, 30))
@settings(max_examples=60)
def test_i5_any_partition_merges_to_the_whole(seed, owner, rows, spread):
    """I5, with parts that may be empty, in any number; large logits do not overflow."""
    q, k, v = case(seed, rows, len(owner), spread)
    owner = np.array(owner)
    whole, lse, _ = attention(q, k, v, 0.3)
    outs, lses = zip(*(tensors(*attention(q, k, v, 0.3, np.broadcast_to(owner == o, (rows, len(owner))))) for o in range(3)))
    got, got_lse = merge(list(outs), list(lses))
    assert np.allclose(got, whole, atol=2e-5) and np.allclose(got_lse, lse, atol=1e-4)
    back, back_lse = merge(list(outs[::-1]), list(lses[::-1]))
    assert torch.allclose(back, got, atol=1e-6) and torch.allclose(back_lse, got_lse, atol=1e-5)


def test_rows_that_saw_nothing_stay_empty():
    nothing, minus = torch.zeros(2, 4), torch.full((2,), -torch.inf)
    out, lse = merge([nothing, nothing], [minus, minus])
    assert torch.equal(out, nothing) and torch.equal(lse, minus)
    some, some_lse = torch.ones(2, 4), torch.tensor([0.5, -700.0])
    out, lse = merge([nothing, some], [minus, some_lse])
    assert torch.equal(out, some) and torch.allclose(lse, some_lse)


def test_a_single_part_is_returned_as_it_is():
    out, lse = torch.randn(3, 4), torch.randn(3)
    got, got_lse = merge([out], [lse])
    assert got is out and got_lse is lse


@given(st.integers(0, 10**6), st.floats(-4, 4))
@settings(max_examples=40)
def test_scaled_columns_equal_a_biased_softmax(seed, bias):
    q, k, v = case(seed, 5, 9)
    visible = np.tril(np.ones((5, 9)), 2).astype(bool)
    want_bias = np.zeros((5, 9))
    want_bias[:, [0, 4]] = bias
    want, want_lse, _ = attention(q, k, v, 0.3, visible, bias=want_bias)
    out, lse = tensors(*attention(q, k, v, 0.3, visible))
    logits = ((q @ k.T) * 0.3).masked_fill(torch.tensor(~visible), -torch.inf)[:, [0, 4]]
    got, got_lse = scale_columns(out, lse, logits, v[[0, 4]], torch.tensor(bias))
    assert np.allclose(got, want, atol=2e-5) and np.allclose(got_lse, want_lse, atol=2e-5)


@given(st.integers(0, 10**6), st.floats(-6, 6))
@settings(max_examples=30)
def test_a_sink_logit_joins_the_denominator_only(seed, logit):
    q, k, v = case(seed, 4, 7)
    want, want_lse, weights = attention(q, k, v, 0.3, sink=logit)
    out, lse = tensors(*attention(q, k, v, 0.3))
    got, got_lse = sink_logit(out[None, None], lse[None, None], torch.tensor([logit]))
    assert np.allclose(got[0, 0], want, atol=2e-5) and np.allclose(got_lse[0, 0], want_lse, atol=2e-5)
    assert (weights.sum(1) < 1).all()


def test_a_sink_logit_leaves_empty_rows_empty():
    out, lse = sink_logit(torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -torch.inf), torch.tensor([0.3]))
    assert torch.equal(out, torch.zeros(1, 1, 1, 4)) and torch.allclose(lse, torch.tensor(0.3))
