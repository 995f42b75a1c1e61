"""Budgets: equal, AdaKV (sheet 6), global ranking, D2O (sheet 12), portfolios (statistics sheet 10)."""

import re

import pytest
import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama, tokens

from lab.engine.policy import Policy
from lab.engine.session import Session
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.techniques import hrp, min_variance, registry
from lab.techniques.d2o_budget import D2OBudget
from lab.techniques.head_returns import covariance
from lab.techniques.shares import split

IDS = tokens(140, seed=9).tolist()


def session(spec: str) -> Session:
    s = Session(llama(), spec, chunk=50)
    s.prefill(IDS[:120])
    return s


@given(st.integers(1, 400), st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 10), st.integers(10, 60))
@settings(max_examples=200)
def test_split_keeps_total_and_bounds(total, weights, floor, cap):
    got = split(total, weights, floor, cap)
    assert all(floor <= g <= cap for g in got)
    assert sum(got) == max(len(weights) * floor, min(total, len(weights) * cap))
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(got[a] <= got[b] + 1 for a, b in zip(order, order[1:]))


BUDGETED = [kind for kind in registry().values() if "score" in kind.slots and "budget" in {p.name for p in kind.parameters()}]


@given(st.sampled_from(BUDGETED), st.integers(2, 300), st.floats(0.01, 0.99))
@settings(max_examples=300)
def test_the_budget_that_a_refusal_names_is_accepted(kind, prompt, share):
    try:
        Policy(Stack.of([kind(budget=share)]), 2).check(prompt)
    except LabError as refused:
        named = re.search(r"to (\d+) entries \(([\d.]+) of the prompt", refused.fix)
        assert named or "budget=1" in refused.fix
        for budget in map(float, named.groups() if named else (1,)):
            Policy(Stack.of([kind(budget=budget)]), 2).check(prompt)


def test_equal_budgets_are_what_a_score_does_alone():
    a, b = session("snapkv(budget=40)"), session("uniform(budget=40)+snapkv(budget=10)")
    assert all(torch.equal(x.positions(), y.positions()) for x, y in zip(a.cache.lab_layers, b.cache.lab_layers))


def test_adakv_total_floor_and_kept_score():
    """Sum over heads is Hk B, alpha = 1 is uniform, each head has its share, and the kept score is at least uniform's."""
    scores, kept = {}, {}
    for alpha in (0.0, 0.2, 0.6, 1.0):
        drive = Drive(f"adakv(alpha={alpha})+h2o(budget=20,recent=0)", 60, prompt=60)
        drive.feed(60)
        kept[alpha] = [drive.stored(h)[0] for h in range(2)]
        assert sum(drive.layer.counts) == 40 and min(drive.layer.counts) >= max(1, int(alpha * 20))
        p = torch.einsum("hid,hjd->hij", drive.q[0], drive.k[0].repeat_interleave(2, 0)) * drive.scale
        p = p.masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).softmax(-1).view(2, 2, 60, 60).sum((1, 2))
        scores[alpha] = sum(float(p[h][kept[alpha][h]].sum()) for h in range(2))
    assert scores[0.0] >= scores[0.2] >= scores[0.6] >= scores[1.0]
    uniform = Drive("h2o(budget=20,recent=0)", 60, prompt=60)
    uniform.feed(60)
    assert kept[1.0] == [uniform.stored(h)[0] for h in range(2)]


def test_uneven_heads_really_free_memory_and_stay_within_budget():
    """R7: bytes are those of the entries, not of padded lanes; decode keeps each head at its own budget."""
    for spec in ("adakv(alpha=0)+h2o(budget=30)", "adakv(alpha=0)+h2o(budget=30)+int_codes(bits=4)"):
        s = session(spec)
        layers = s.cache.lab_layers
        assert any(len(set(layer.counts)) > 1 for layer in layers)
        before = [layer.counts for layer in layers]
        for t in IDS[120:]:
            s.step(torch.tensor([t]))
        assert [layer.counts for layer in layers] == before and s.cache.entries == 3 * 2 * 30
        row = 2 * 16 * 4 if "int" not in spec else 2 * (16 // 2 + 4)
        assert s.cache.kv_bytes == s.cache.entries * (row + 8)  # position and mass
        assert s.cache.slack_bytes < (0.05 if "int" not in spec else 3) * s.cache.kv_bytes + 6 * 32 * row


def test_global_ranking_spends_the_total_where_scores_are_best():
    s = session("global_top+snapkv(budget=40,window=8)")
    counts = [n for layer in s.cache.lab_layers for n in layer.counts]
    assert sum(counts) == 40 * 6 and len(set(counts)) > 1 and min(counts) >= 8


def test_d2o_layers_with_even_attention_keep_more():
    shares = D2OBudget().shares([0.5, 1.0, 4.0])
    assert shares[0] > shares[1] > shares[2] and D2OBudget(strength=0).shares([1, 5]) == [1, 1]
    s = session("d2o_budget+snapkv(budget=40,window=8)")
    counts = [layer.counts[0] for layer in s.cache.lab_layers]
    assert sum(counts) == 120 and all(len(set(layer.counts)) == 1 for layer in s.cache.lab_layers)
    flat = session("d2o_budget(strength=0)+snapkv(budget=40,window=8)")
    assert [layer.counts[0] for layer in flat.cache.lab_layers] == [40, 40, 40]


def random_covariance(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return covariance(torch.randn(n, 3 * n, generator=g).abs() + torch.rand(n, 1, generator=g) * 3)


@pytest.mark.parametrize("weigh", [min_variance.weights, hrp.weights])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_portfolio_weights_are_weights(weigh, n):
    w = weigh(random_covariance(n, n))
    assert float(w.sum()) == pytest.approx(1) and bool((w >= 0).all())


def test_diagonal_covariance_gives_inverse_variances():
    """HRP equals inverse variance on a diagonal covariance; so does minimum variance."""
    s = torch.diag(torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0], dtype=torch.float64))
    want = (1 / s.diagonal()) / (1 / s.diagonal()).sum()
    assert torch.allclose(min_variance.weights(s), want) and torch.allclose(hrp.weights(s), want)


def test_minimum_variance_is_minimal_where_nothing_is_clipped():
    s = random_covariance(6, 3)
    w = min_variance.weights(s)
    if bool((torch.linalg.solve(s, torch.ones(6, 1, dtype=s.dtype)) > 0).all()):
        others = torch.rand(500, 6, dtype=s.dtype, generator=torch.Generator().manual_seed(1))
        others = others / others.sum(1, keepdim=True)
        assert float(w @ s @ w) <= float(torch.einsum("ni,ij,nj->n", others, s, others).min()) + 1e-12
    assert float(w @ s @ w) <= float(hrp.weights(s) @ s @ hrp.weights(s)) + 1e-12


def test_linked_order_puts_twins_side_by_side():
    g = torch.Generator().manual_seed(4)
    base = torch.randn(3, 200, generator=g, dtype=torch.float64)
    x = torch.cat([base, base + 0.05 * torch.randn(3, 200, generator=g, dtype=torch.float64)])
    order = hrp.linked_order(((1 - torch.corrcoef(x)) / 2).clamp_min(0).sqrt())
    assert sorted(order) == list(range(6))
    assert all(abs(order.index(i) - order.index(i + 3)) == 1 for i in range(3))


@pytest.mark.parametrize("name", ["min_variance", "hrp"])
@pytest.mark.parametrize("scope", ["all", "layer"])
def test_portfolio_budgets_spend_the_total(name, scope):
    s = session(f"{name}(scope={scope},rows=64)+snapkv(budget=40,window=8)")
    counts = [layer.counts for layer in s.cache.lab_layers]
    assert sum(map(sum, counts)) == 240 and min(map(min, counts)) >= 9
    if scope == "layer":
        assert all(sum(c) == 80 for c in counts)
