"""Importance, MoH, Duo, AHA, QAdA, Flux, reuse: each sheet's Test line."""

from __future__ import annotations

import math

import pytest
import torch

from lab.engine.learnt import find
from lab.errors import LabError
from lab.measure.fitting.common import forward, loss, samples
from lab.measure.fitting.head_pruning import ablation, gradients
from lab.techniques.aha import AHA
from lab.techniques.duo_attention import DuoAttention, lowest
from lab.techniques.flux import Flux
from lab.techniques.moh import MoH
from lab.techniques.qada import bulk
from techniques.conftest import loaded
from techniques.reading import context, differs, random, run, same


def test_negative_controls_say_so():
    """A lesson, not a bug: their help names them as controls."""
    from lab.techniques import registry

    for name in ("moh", "gqa_conversion", "attention_reuse", "swat", "stable_sinks"):
        assert "negative control" in registry()[name].help, name
    for name, word in (("claa", "Controls"), ("block_topk", "controls"), ("head_pruning", "control"), ("random_score", "random")):
        assert word in registry()[name].help or word in registry()[name].title.lower(), name


# -- head importance and pruning ----------------------------------------------------------------------------------------
def test_gradient_matches_finite_difference_and_ablation_is_the_loss_without_the_head():
    model = loaded().model
    ids = samples(model, None, 1, 40)
    found = gradients(model, ids)

    def at(layer, head, gate):
        def probe(ctx, out):
            if ctx.layer != layer:
                return out
            out = out.clone()
            out[:, head] *= gate
            return out

        with torch.no_grad():
            return float(loss(forward(model, ids[0], probe=probe).double(), ids[0]))

    for layer, head in ((0, 1), (1, 3), (2, 0)):
        step = 1e-2
        slope = (at(layer, head, 1 + step) - at(layer, head, 1 - step)) / (2 * step)
        assert float(found[layer, head]) == pytest.approx(abs(slope), rel=0.1, abs=2e-3)
    removed = ablation(model, ids)
    assert float(removed[1, 3]) == pytest.approx(at(1, 3, 0.0) - at(1, 3, 1.0), abs=1e-4)


@pytest.mark.usefixtures("calibrations")
def test_pruning_by_importance_closes_the_least_important_heads():
    same("head_pruning(fraction=0,order=gradient)")
    differs("head_pruning(fraction=0.3,order=gradient)")
    from lab.techniques.head_pruning import HeadPruning

    technique = HeadPruning(fraction=0.25, order="ablation")
    learnt = find(technique, loaded().model).tensors
    closed = 0
    for layer in range(3):
        gate = technique.route(context(random(1, 4, 1, 16), random(1, 2, 5, 16), layer=layer, layers=3,
                                       shared={"learnt/head_pruning": learnt}))
        open_ = torch.ones(4) if gate is None else gate.flatten()
        closed += int((open_ == 0).sum())
        assert all(learnt["ablation"][layer][open_ == 0] <= learnt["ablation"].flatten().sort().values[2])
    assert closed == 3
    assert learnt["gradient"].norm(dim=1).allclose(torch.ones(3))


def test_groups_are_pruned_whole_by_the_sum_of_their_heads():
    from lab.techniques.head_pruning import HeadPruning

    score = torch.tensor([[9.0, 0.0, 2.0, 2.0], [1.0, 2.0, 5.0, 5.0], [0.5, 8.0, 7.0, 7.0]])  # groups 9 4, 3 10, 8.5 14
    technique, open_ = HeadPruning(fraction=0.34, order="gradient", unit="groups"), []
    for layer in range(3):
        gate = technique.route(context(random(1, 4, 1, 16), random(1, 2, 5, 16), layer=layer, layers=3,
                                       shared={"learnt/head_pruning": {"gradient": score}}))
        open_.append([1.0] * 4 if gate is None else gate.flatten().tolist())
    assert open_ == [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]


# -- MoH -------------------------------------------------------------------------------------------------------------
def test_moh_counts_heads_exactly_and_looks_at_its_own_token_only():
    q = random(1, 8, 12, 16)
    gate = MoH().route(context(q, random(1, 2, 12, 16)))
    assert (gate.sum(1) == 6).all() and (gate[:, :4] == 1).all()
    changed = q.clone()
    changed[:, :, 5] = random(1, 8, 16, seed=9)
    other = MoH().route(context(changed, random(1, 2, 12, 16)))
    rows = torch.arange(12) != 5
    assert torch.equal(gate[:, :, rows], other[:, :, rows])
    assert MoH(active=1.0).route(context(q, random(1, 2, 12, 16))) is None
    same("moh(active=1)")
    with pytest.raises(LabError, match="shared"):
        MoH(active=0.4, shared=0.5)


# -- DuoAttention ----------------------------------------------------------------------------------------------------
def test_quantile_split_is_exact():
    gates = random(5, 4)
    for fraction in (0.0, 0.25, 0.5, 1.0):
        flags = lowest(gates, fraction)
        assert int(flags.sum()) == round(20 * fraction)
        if flags.any() and not flags.all():
            assert gates[flags].max() <= gates[~flags].min()


@pytest.mark.usefixtures("calibrations")
def test_duo_attention():
    same("duo_attention(fraction=0)")
    same("duo_attention(sinks=64,window=256)", prompt=200, steps=8)  # N <= S + W
    differs("duo_attention(sinks=4,window=20)")
    session, _ = run("duo_attention(sinks=4,window=20)", prompt=200, steps=8)
    streams = lowest(find(DuoAttention(), loaded().model).tensors["trained"], 0.5)
    for layer, flags in zip(session.cache.lab_layers, streams):
        assert layer.counts == [24 if f else 208 for f in flags]
    for gates in ("trained", "quick"):
        assert run(f"duo_attention(gates={gates},sinks=4,window=20)")[0].cache.kv_bytes < run("dense")[0].cache.kv_bytes


# -- AHA -------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("calibrations")
def test_aha_limits_and_monotone_in_its_bias():
    same("aha(window=16,bias=1000)")
    closed, want = run("aha(window=16,bias=-1000)")[1], run("swat(window=16)")[1]
    torch.testing.assert_close(closed, want, atol=1e-4, rtol=1e-4)
    session, _ = run("aha(window=16,bias=-1000)")
    assert all(layer.last_read == 16 * layer.heads for layer in session.cache.lab_layers)
    ctx = context(random(1, 4, 30, 16), random(1, 2, 30, 16), layer=1, layers=3,
                  shared={"learnt/aha": find(AHA(), loaded().model).tensors})
    opened = [float((AHA(bias=b).gates(ctx) > 0).float().mean()) for b in (-4.0, 0.0, 4.0)]
    assert opened == sorted(opened)


def test_aha_gates_close_as_their_price_rises():
    from lab.measure.fitting.aha import gate

    q, error = random(2, 200, 8), random(2, 200, seed=1).abs()
    shares = []
    for weight in (0.0, 0.2, 2.0):
        w, b = gate(q, error, 150, weight)
        shares.append(float(((q * w[:, None]).sum(-1) + b[:, None] > 0).float().mean()))
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] < 0.2


# -- QAdA ------------------------------------------------------------------------------------------------------------
def test_the_gaussian_estimate_holds_for_gaussian_keys():
    k = random(1, 1, 6000, 16)
    q = random(1, 1, 5, 16, seed=1)
    scale = 16**-0.5
    mean, covariance = k.mean(2), torch.cov(k[0, 0].mT)[None, None]
    truth = (q @ k.mT * scale).logsumexp(-1)
    assert ((q @ k.mT * scale).std(-1) <= 1.5).all()
    assert (bulk(q, mean, covariance, 6000, scale) - truth).abs().max() < 0.1


def test_qada_limits_and_monotone():
    same("qada(tau=0,sinks=2,window=8)")
    same("qada(sinks=16,window=500)")
    reads = []
    for tau in (0.05, 0.5, 0.999, 1.0):
        session, _ = run(f"qada(tau={tau},sinks=2,window=8)", prompt=100, steps=3)
        reads.append(sum(layer.last_read for layer in session.cache.lab_layers))
    assert reads == sorted(reads, reverse=True) and reads[-1] == 3 * 2 * 10


@pytest.mark.parametrize("other", ["", "+int_codes(bits=8)", "+h2o(budget=0.6)"])
def test_qada_moments_are_those_of_the_far_keys(other):
    session, _ = run("qada(tau=1,sinks=2,window=8)" + other, prompt=100, steps=6)
    layer = session.cache.lab_layers[1]
    far = layer.state["qada/far"]
    if not other:
        torch.testing.assert_close(layer.state["qada/sum"], layer.all_keys()[:, :, 2 : 2 + far].sum(2), atol=1e-3, rtol=1e-3)
    assert far >= 50


# -- Flux ------------------------------------------------------------------------------------------------------------
def routers(sparse: bool):
    w = {"mean": torch.zeros(3, 16), "std": torch.ones(3, 16), "in_weight": torch.zeros(3, 4, 16), "in_bias": torch.zeros(3, 4),
         "out_weight": torch.zeros(3, 2, 4), "out_bias": torch.tensor([0.0, 1.0 if sparse else -1.0]).expand(3, 2)}
    return {"learnt/flux": w}


def test_flux_routes_once_and_reuses_its_decision():
    for sparse in (True, False):
        technique = Flux(sinks=2, window=8)
        ctx = context(random(1, 4, 40, 16), random(1, 2, 40, 16), layer=1, layers=3, shared=routers(sparse))
        assert (technique.select(ctx) is not None) == sparse
        later = context(random(1, 4, 1, 16, seed=5), random(1, 2, 41, 16), layer=1, layers=3, shared=routers(not sparse))
        later.store.state.update(ctx.state)
        assert (technique.select(later) is not None) == sparse


def test_routers_learn_what_can_be_told_from_the_features():
    from lab.measure.fitting.flux import scores, train
    from lab.techniques.flux import router

    x = random(2, 40, 6)
    labels = torch.stack([(x[0, :, 0] > 0).long(), torch.ones(40, dtype=torch.long)])  # one feature decides; always sparse
    w = train(x, labels, 8, 150)
    assert (scores(x, w).argmax(-1) == labels).float().mean() > 0.95
    uneven = torch.stack([(torch.arange(40) < n).long() for n in (30, 10)])
    blind = train(torch.zeros(2, 40, 6), uneven, 8, 150)  # nothing to tell prompts apart: the layer's usual answer
    assert scores(torch.zeros(2, 1, 6), blind)[:, 0].argmax(-1).tolist() == [1, 0]
    own = {"mean": torch.zeros(6), "std": torch.ones(6), **{n: t[0] for n, t in w.items()}}
    torch.testing.assert_close(router(x[0], own), scores(x, w)[0])


@pytest.mark.usefixtures("calibrations")
def test_flux_labels_are_costs_below_tolerance():
    from lab.measure.fitting.flux import TOLERANCE

    tensors = find(Flux(), loaded().model).tensors
    assert torch.equal(tensors["labels"] == 1, tensors["cost"] < TOLERANCE) and (tensors["cost"] >= -1e-6).all()
    assert tensors["cost"].max() > 0 and ((0 <= tensors["held_out"]) & (tensors["held_out"] <= 1)).all()


def test_flux_sequences_of_a_batch_route_independently():
    technique = Flux(sinks=2, window=8)
    shared = routers(True)
    shared["learnt/flux"] = {
        **shared["learnt/flux"], "out_bias": torch.zeros(3, 2), "in_weight": torch.eye(4, 16).expand(3, 4, 16),
        "out_weight": torch.tensor([[0.0] * 4, [1.0] * 4]).expand(3, 2, 4),
    }
    q = torch.cat([torch.full((1, 4, 40, 16), 1.0), torch.full((1, 4, 40, 16), -1.0)])
    ctx = context(q, random(2, 2, 40, 16), layer=1, layers=3, shared=shared)
    rows = technique.select(ctx)
    assert ctx.state["flux/sparse"].tolist() == [True, False]
    assert bool(rows.keep(0, 40)[1].all()) and not bool(rows.keep(0, 40)[0].all())


@pytest.mark.usefixtures("calibrations")
def test_flux_in_a_model():
    same("flux(margin=1000)")
    differs("flux(margin=-1000,window=16,sinks=2)")
    want = run("swat(window=16)")[1]
    torch.testing.assert_close(run("flux(margin=-1000,window=16,sinks=0)", chunk=None)[1], want, atol=1e-4, rtol=1e-4)


# -- reuse -----------------------------------------------------------------------------------------------------------
def test_reuse_every_step_is_dense_and_skipped_steps_read_nothing():
    same("attention_reuse(every=1)")
    differs("attention_reuse(every=3)")
    for steps, reads in ((2, True), (3, True), (4, False), (5, True)):
        session, _ = run("attention_reuse(every=2,exact_first=2)", steps=steps)
        assert all((layer.last_read > 0) == reads for layer in session.cache.lab_layers), steps
        assert all(layer.counts == [200 + steps] * 2 for layer in session.cache.lab_layers)  # stored every step


@pytest.mark.usefixtures("calibrations")
def test_paced_reuse_slows_the_steadiest_layers_most():
    from lab.techniques.attention_reuse import AttentionReuse

    learnt = find(AttentionReuse(paced=True), loaded().model).tensors
    order = learnt["change"].argsort()
    assert learnt["every"][order].tolist() == sorted(learnt["every"].tolist(), reverse=True)
    assert math.isfinite(float(run("attention_reuse(paced=true)")[1].sum()))
