"""MoA: what deleting an entry costs, plans under a density, and the plan that is kept (the sheet's Test line)."""

from __future__ import annotations

import pytest
import torch

from lab.engine.learnt import find
from lab.measure.fitting.common import samples
from lab.measure.fitting.moa import beats, effect, influence
from lab.techniques.moa import MoA, plan
from techniques.conftest import loaded
from techniques.reading import context, differs, random, run


def test_effect_is_the_first_order_effect_of_deleting_an_entry():
    """d loss of removing key j with renormalisation, against a direct derivative."""
    s, g = random(6).double(), random(6, seed=1).double()
    a = s.softmax(-1)
    for j in range(6):
        keep = torch.arange(6) != j
        without = torch.zeros(6).double()
        without[keep] = s[keep].softmax(-1)
        assert float(effect(a, g)[j]) == pytest.approx(float((g * (without - a)).sum()), rel=1e-9)
    one = torch.tensor([1.0])
    assert float(effect(one, torch.tensor([2.0]))) == -2.0


def test_influence_reaches_every_distance():
    model = loaded().model
    got = influence(model, samples(model, None, 1, 60)[0], first=4)
    assert got.shape == (2, 3, 2, 60) and (got[0] >= got[1].abs()).all() and got[0, :, :, :50].sum() > 0
    assert (got[..., 57:] == 0).all()  # distances that only the first four columns have


COST = torch.tensor([[1.0, 1.0], [0.7, 0.6], [0.5, 0.5], [0.3, 0.4], [0.1, 0.2]])


def test_plan_stays_within_density_and_is_fair():
    loss_ = random(6, 4, 5).abs().sort(-1).values
    for density in (0.25, 0.5, 0.8, 1.0):
        chosen = plan(loss_, COST, density)
        assert (COST[chosen].mean((0, 1)) <= density + 1e-6).all()
        assert all(len(layer.unique()) <= 2 for layer in chosen)  # at most two rules per layer
        assert all(len(layer.unique()) == 1 for layer in plan(loss_, COST, density, most=1))
    assert (plan(loss_, COST, 1.0) == 0).all()
    assert (plan(loss_, COST, 0.05) == 4).all()  # out of reach: the cheapest
    for density in (0.25, 0.5, 0.65, 0.9):  # heads that lose alike get alike
        assert len(plan(torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0]).expand(6, 4, 5), COST, density).unique()) == 1


def test_plan_is_close_to_the_best_one():
    """Against all plans of a small case: never better, and near."""
    import itertools

    loss_ = random(2, 2, 5).abs().sort(-1).values
    for density in (0.3, 0.5, 0.7):
        def total(chosen):
            return float(loss_.gather(2, chosen.unsqueeze(-1)).sum())

        found = total(plan(loss_, COST, density))
        all_ = (torch.tensor(c).view(2, 2) for c in itertools.product(range(5), repeat=4))
        best = min(total(c) for c in all_ if (COST[c].mean((0, 1)) <= density + 1e-9).all())
        assert best - 1e-6 <= found <= best + 0.25 * float(loss_.max())


def test_a_denser_plan_never_loses_more():
    loss_ = random(6, 4, 5).abs().sort(-1).values
    totals = [float(loss_.gather(2, plan(loss_, COST, d).unsqueeze(-1)).sum()) for d in (0.3, 0.5, 0.7, 0.9)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.usefixtures("calibrations")
def test_moa_takes_the_plan_that_does_best_on_an_unseen_length():
    """The kept plan is the measured best of its density, and its densities keep the bound."""
    tensors = find(MoA(), loaded().model).tensors
    plans = tensors["plans"]
    assert plans.shape[1] == 4 and set(plans[:, 0].tolist()) == {25.0, 50.0, 75.0}
    for density in (25, 50, 75):
        mine = plans[plans[:, 0] == density]
        assert not any(beats(tuple(a[1:3].tolist()), tuple(b[1:3].tolist())) for a in mine for b in mine)
        assert (mine[:, 1] <= density / 100 + 1e-6).all()
        rules = torch.stack([tensors[f"alpha_{density}"], tensors[f"beta_{density}"]], -1)
        assert all(len(layer.unique(dim=0)) <= 2 for layer in rules)
    assert beats((0.4, 1.0), (0.5, 1.0)) and not beats((0.4, 1.0), (0.4, 1.0))


@pytest.mark.usefixtures("calibrations")
def test_moa_in_a_model():
    differs("moa(density=0.25,first=4)")
    everything = {f"{n}_50": torch.full((3, 2), x) for n, x in (("alpha", 0.0), ("beta", 1.0))}
    ctx = context(random(1, 4, 20, 16), random(1, 2, 20, 16), layer=1, layers=3, shared={"learnt/moa": everything})
    technique = MoA()
    assert technique.select(ctx) is None and (technique.allocate(ctx, 10, None) > 10**6).all()
    session, _ = run("moa(density=0.5,first=4)", prompt=200, steps=6)
    spans = [technique.spans(context(random(1, 4, 1, 16), random(1, 2, 5, 16), layer=i, layers=3,
             shared={"learnt/moa": find(technique, loaded().model).tensors}), 200) for i in range(3)]
    for layer, span in zip(session.cache.lab_layers, spans):
        expected = [206 if s >= 200 else min(206, int(s) + 4) for s in span]
        assert layer.counts == expected
