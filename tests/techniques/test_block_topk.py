"""Block top-k: a centroid's score is its page's mean logit; pages of one token are token top-k."""

from __future__ import annotations

import pytest
import torch

from lab.techniques.block_topk import BlockTopK, centroids
from techniques.reading import context, differs, ledger_agrees, random, same


def test_centroid_score_is_the_mean_logit():
    k, q = random(1, 2, 4, 16, 8), random(1, 2, 3, 8, seed=1)
    mean = centroids(k, torch.ones(1, 2, 4, 16, dtype=torch.bool))["mean"]
    group = q.mean(2, keepdim=True) @ mean.mT
    torch.testing.assert_close(group[:, :, 0], (q[:, :, None] @ k.mT).mean((-1, -2)))


def test_single_token_pages_are_token_top_k():
    k, q = random(1, 2, 80, 8), random(1, 2, 1, 8, seed=1)
    for mode in ("centroid", "oracle"):
        pick = BlockTopK(budget=7.0, page=1, sinks=2, local=10, mode=mode).select(context(q, k))
        scores = (q @ k.mT)[:, :, 0, 2:70]
        chosen = scores.topk(7).indices + 2
        expected = torch.cat([torch.tensor([0, 1]).expand(1, 2, 2), chosen, torch.arange(70, 80).expand(1, 2, 10)], 2)
        assert torch.equal(pick.index, expected.sort(-1).values)


def test_oracle_finds_what_a_mean_hides():
    k = 0.1 * random(1, 1, 300, 8)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    k[0, 0, 100, 0] = 3.0  # one needle; its page's mean is pulled down by a neighbour
    k[0, 0, 101, 0] = -3.0
    ctx = context(q, k)
    assert 100 in BlockTopK(budget=32.0, mode="oracle").select(ctx).index
    assert 100 not in BlockTopK(budget=32.0, mode="local").select(ctx).index


def test_full_budget_is_dense_and_a_small_one_is_not():
    same("block_topk(budget=1)")
    differs("block_topk(budget=0.1)")


@pytest.mark.parametrize("mode", ["centroid", "oracle", "random", "local"])
def test_ledger(mode):
    ledger_agrees(f"block_topk(budget=0.1,mode={mode},local=32)")


def test_random_pages_are_new_each_step_and_follow_the_seed():
    k = random(1, 2, 400, 8)
    picks = {}
    for seed, n in ((0, 400), (0, 399), (1, 400)):
        ctx = context(random(1, 2, 1, 8), k[:, :, :n], seed=seed)
        picks[seed, n] = BlockTopK(budget=64.0, local=32, sinks=4, mode="random").select(ctx)
        assert picks[seed, n].probe == 0
        again = BlockTopK(budget=64.0, local=32, sinks=4, mode="random").select(ctx)
        assert torch.equal(picks[seed, n].index, again.index)
    pages = {key: [set(((lane[4:68] - 4) // 16).tolist()) for lane in pick.index[0]] for key, pick in picks.items()}
    assert all(len(lane) == 4 for lanes in pages.values() for lane in lanes)
    assert pages[0, 400] != pages[0, 399] and pages[0, 400] != pages[1, 400] and pages[0, 400][0] != pages[0, 400][1]
