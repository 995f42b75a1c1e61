"""Expected Attention (eviction sheet 8)."""

import math

import torch
from tiny_models import llama, tokens

from lab.engine.rope import rope_of
from lab.engine.session import Session
from lab.techniques.expected_attention import ExpectedAttention


def draw(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    keys, mean = torch.randn(1, 2, 12, 16, generator=g), torch.randn(1, 4, 1, 16, generator=g)
    root = torch.randn(1, 4, 16, 16, generator=g) / 4
    return keys, mean, root @ root.mT, root


def test_no_spread_leaves_the_mean_query():
    """Sigma = 0: softmax of mu'.k, with mu' the mean query turned to the coming position."""
    rope, (keys, mean, _, _) = rope_of(llama(), 0), draw()
    technique = ExpectedAttention(future=1)
    z = technique.logits(rope, mean, torch.zeros(1, 4, 16, 16), keys, 50, 0.25)
    turned = rope.rotate(mean, 50).view(1, 2, 2, 1, 16)
    assert torch.allclose(z, (turned @ keys.mT.unsqueeze(2)).squeeze(3) * 0.25, atol=1e-4)


def test_gaussian_queries_in_closed_form_agree_with_monte_carlo():
    """F = 1 and Gaussian q: z = ln E exp(q.k scale)."""
    rope, (keys, mean, spread, root) = rope_of(llama(), 0), draw(1)
    z = ExpectedAttention(future=1).logits(rope, mean, spread, keys, 50, 0.25)
    noise = torch.randn(1, 4, 200_000, 16, generator=torch.Generator().manual_seed(2)) @ root.mT
    q = rope.rotate(mean + noise, 50).view(1, 2, 2, -1, 16)
    sampled = torch.logsumexp(q @ keys.mT.unsqueeze(2) * 0.25, 3) - math.log(200_000)
    assert torch.allclose(z, sampled, atol=0.02)


def test_the_mean_rotation_is_the_mean_of_the_rotations():
    rope, (keys, mean, _, _) = rope_of(llama(), 0), draw(2)
    z = ExpectedAttention(future=100).logits(rope, mean, None, keys, 30, 0.25)
    turned = torch.stack([rope.rotate(mean, t) for t in range(30, 130)]).mean(0).view(1, 2, 2, 1, 16)
    assert torch.allclose(z, (turned @ keys.mT.unsqueeze(2)).squeeze(3) * 0.25, atol=1e-4)


def test_moments_do_not_depend_on_chunks_and_leave_no_trace():
    ids = tokens(90, seed=4).tolist()
    kept = []
    for chunk in (None, 17):
        session = Session(llama(), "expected_attention(budget=30)", chunk=chunk)
        session.prefill(ids)
        kept.append([layer.positions().tolist() for layer in session.cache.lab_layers])
        assert all(not layer.state for layer in session.cache.lab_layers)
        assert all({0, 1, 2, 3} <= set(layer.positions()[0, 0].tolist()) for layer in session.cache.lab_layers)
    assert kept[0] == kept[1]
