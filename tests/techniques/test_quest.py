"""Quest: the bound never lies (I9), single-token pages are exact top-k, full budget is dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lab.engine.stack import Stack
from lab.techniques.quest import Quest, extremes, upper_bound
from techniques.reading import context, differs, ledger_agrees, model, random, run, same


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40))
def test_bound_is_never_below_the_truth(seed, page, entries):
    k, q = random(2, 2, entries, 8, seed=seed), random(2, 2, 3, 8, seed=seed + 1)
    pages = -(-entries // page)
    padded = torch.nn.functional.pad(k, (0, 0, 0, pages * page - entries)).unflatten(2, (pages, page))
    inside = (torch.arange(pages * page) < entries).view(pages, page).expand(2, 2, -1, -1)
    bound = upper_bound(q, **extremes(padded, inside))
    truth = (q @ k.mT)
    for p in range(pages):
        assert (truth[..., p * page : (p + 1) * page].amax(-1) <= bound[..., p] + 1e-4).all()


def test_single_token_pages_are_exact_top_k():
    k, q = random(1, 2, 60, 8), random(1, 2, 1, 8, seed=1)
    ctx = context(q, k)
    pick = Quest(budget=9.0, page=1).select(ctx)
    scores = (q @ k.mT)[:, :, 0]
    scores[..., -1] = torch.inf
    expected = scores.topk(10).indices.sort(-1).values
    assert torch.equal(pick.index, expected)


def test_full_budget_is_dense():
    same("quest(budget=1,dense_layers=0)")
    same("quest(budget=100000,dense_layers=0)")
    differs("quest(budget=0.1,dense_layers=0)")


def test_first_layers_stay_dense():
    session, _ = run("quest(budget=0.1,dense_layers=2)")
    read = [layer.last_read for layer in session.cache.lab_layers]
    assert read[0] == read[1] > read[2]


@pytest.mark.parametrize("spec", ["quest(budget=0.25,dense_layers=0)", "quest(budget=40,page=8)", "quest(budget=0.3,page=1)"])
def test_ledger(spec):
    ledger_agrees(spec)


@pytest.mark.parametrize("other", ["kivi(residual=32)", "int_codes(bits=8)", "snapkv(budget=0.5)"])
def test_bounds_follow_the_cache(other):
    """Whatever the cache side does, incremental bounds equal bounds built afresh."""
    session, _ = run(f"quest(budget=0.2,dense_layers=0)+{other}", prompt=150, steps=40)
    layer = session.cache.lab_layers[1]
    low = layer.state["quest/low"]
    pages = low.shape[2]
    keys = layer.all_keys()[:, :, : pages * 16]
    for p in range(pages - 2):
        exact = keys[:, :, p * 16 : p * 16 + 16].amin(2)
        torch.testing.assert_close(low[:, :, p], exact, atol=0.06 if other.startswith("int") else 1e-5, rtol=0.1)


def test_forks_and_samples_keep_their_own_bounds():
    ids = list(range(2, 102))
    from lab.engine.session import Session

    session = Session(model(), Stack.parse("quest(budget=0.2,dense_layers=0)"))
    session.prefill(ids, samples=2)
    session.step(torch.tensor([3, 4]))
    twin = session.fork()
    a, b = session.step(torch.tensor([5, 6])), twin.step(torch.tensor([5, 6]))
    assert torch.equal(a, b)
