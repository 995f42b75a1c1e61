"""ZeroTuning per head, ACT, massive activations, focus directions, stable sinks: each sheet's Test line."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from lab.engine.cache import LabCache
from lab.engine.sparse import attend
from lab.errors import LabError
from lab.measure.fitting.common import forward
from lab.measure.fitting.focus_directions import mass
from lab.measure.fitting.prompts import passkey
from lab.measure.fitting.labelled import batches, labelled, preference
from lab.measure.fitting.replay import Trials
from lab.measure.fitting.zerotuning import by_entropy, by_label, search
from lab.techniques.act import ACT, LEAST_ROWS, calibrated
from lab.techniques.focus_directions import split_softmax
from lab.techniques.massive_activations import MassiveActivations, massive
from lab.techniques.stable_sinks import stable
from techniques.conftest import loaded
from techniques.reading import context, differs, random, run, same


# -- ZeroTuning ------------------------------------------------------------------------------------------------------
def test_zerotuning_search_scales_the_majority_and_takes_the_best_factor():
    """An objective that likes less attention on token 0 in head 1 of layer 0 and nothing else."""
    def objective(stack, layer):
        if not stack.techniques:
            return 0.0
        technique = stack.techniques[0]
        if hasattr(technique, "table"):
            return float((technique.table[0, 1].log() + 1.0).abs())
        return 1.0 if (technique.layers, technique.heads) == ("0", "1") else -0.1

    found = search(loaded().model, objective, lambda f, t: None)
    assert found["effect"][0, 1] > 0 and (found["effect"] < 0).sum() == found["effect"].numel() - 1
    assert (found["gamma"] == 1.0)[0, 1]  # the majority type is "up", so head 1 of layer 0 stays
    assert len(found["objective"]) == 10


def test_replaying_the_layers_below_is_exact():
    """A change in layer l measured from layer l on equals the whole forward."""
    from lab.engine.stack import Stack

    model = loaded().model
    inputs = [tiny_models.tokens(20).view(1, -1), tiny_models.tokens(12, seed=1)]
    trials = Trials(model, inputs)
    for layer in range(3):
        stack = Stack.parse(f"zerotuning(gamma=4,layers={layer})")
        for got, ids in zip(trials.under(stack, layer), inputs):
            torch.testing.assert_close(got, forward(model, ids, stack))
    for got, base, ids in zip(trials.under(Stack(), 3), trials.base, inputs):
        torch.testing.assert_close(got, base)
        torch.testing.assert_close(base, forward(model, ids))
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_labelled_questions_have_one_right_option_and_a_score():
    class Model(torch.nn.Module):
        def get_input_embeddings(self):
            return torch.nn.Embedding(200, 4)

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [sum(map(ord, word)) % 200 for word in text.split()]}

    tasks = labelled(Model(), tokenizer, 20)
    assert {t.kind for t in tasks} == {"recall", "choice"}
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(tasks, labelled(Model(), tokenizer, 20)))
    for task in tasks:
        assert len(set(task.options)) == len(task.options) > task.answer >= 0
    again = [t for group in batches(tasks) for t in group]
    assert sorted(map(id, again)) == sorted(map(id, tasks)) and all(len({len(t.ids) for t in g}) == 1 for g in batches(tasks))
    task, logits = tasks[0], torch.zeros(1, 200)
    score, right = preference(logits, [task])
    assert float(score[0]) == pytest.approx(-math.log(len(task.options)))
    logits[0, task.options[task.answer]] = 5.0
    score, right = preference(logits, [task])
    assert float(right[0]) == 1 and float(score[0]) > -0.1


def test_both_objectives_measure_the_model():
    from lab.engine.stack import Stack

    model = loaded().model
    for objective in (by_entropy(model, None, 2, 24), by_label(model, None, 6)):
        base, tuned = objective(Stack(), 0), objective(Stack.parse("zerotuning(gamma=6)"), 0)
        assert math.isfinite(base) and base > 0 and base != tuned
        stack = Stack.parse("zerotuning(gamma=6,layers=2)")
        assert objective(stack, 2) == pytest.approx(objective(stack, 0), abs=1e-5)


@pytest.mark.usefixtures("calibrations")
def test_calibrated_zerotuning_uses_its_table():
    from lab.engine.learnt import find
    from lab.techniques.zerotuning import ZeroTuning

    technique = ZeroTuning(calibrated=True)
    learnt = find(technique, loaded().model).tensors
    assert learnt["gamma_labelled"].shape == (3, 4) and 0 <= float(learnt["accuracy"].min())
    gamma = learnt["gamma_entropy"].clone()
    assert gamma.shape == (3, 4) and (gamma > 0).all()
    gamma[1] = torch.tensor([2.0, 1.0, 0.5, 1.0])
    for layer, expected in ((1, gamma[1].log()), (2, None)):
        gamma[2] = 1.0
        shared = {"learnt/zerotuning": {"gamma_entropy": gamma}}
        ctx = context(random(1, 4, 1, 16), random(1, 2, 9, 16), layer=layer, layers=3, shared=shared)
        edits = technique.edit(ctx)
        assert edits == [] if expected is None else torch.equal(edits[0].bias, expected)
    with pytest.raises(LabError, match="labelled objective"):
        ZeroTuning(calibrated=True, objective="labelled").edit(ctx)


# -- ACT -------------------------------------------------------------------------------------------------------------
def test_act_moves_mass_and_rows_still_sum_to_one():
    p = random(2, 3, 7).softmax(-1)
    sinks = torch.zeros(7, dtype=torch.bool)
    sinks[[2, 5]] = True
    got = calibrated(p, sinks, 0.4)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(got[..., sinks], 0.4 * p[..., sinks])
    others = got[..., ~sinks] / p[..., ~sinks]
    torch.testing.assert_close(others, others[..., :1].expand_as(others))
    assert torch.equal(calibrated(p, sinks & False, 0.4), p)
    only = torch.tensor([0.0, 0.3, 0.7])
    assert torch.equal(calibrated(only, torch.tensor([False, True, True]), 0.4), only)


def test_act_finds_the_second_sink_only_and_is_causal():
    n, d = 120, 8
    q, k = 0.1 * random(1, 1, n, d), 0.1 * random(1, 1, n, d, seed=1)
    q[..., 0] = 3
    k[0, 0, 0, 0] = k[0, 0, 40, 0] = 4
    technique = ACT(alpha=0.1, beta=0.4)
    ctx = context(q, k, layer=5)
    got = attend(ctx, [], [], [], technique.weigh, False, True).last[0, 0]
    plain = (q[0, 0, -1] @ k[0, 0].mT * d**-0.5).softmax(-1)
    assert got[40] == pytest.approx(0.4 * float(plain[40]), rel=1e-4) and got[0] > plain[0]
    early = attend(context(q[:, :, :100], k[:, :, :100], layer=5), [], [], [], technique.weigh, False, True)
    late = attend(context(q, k, layer=5), [], [], [], technique.weigh, False, True)
    torch.testing.assert_close(early.out, late.out[:, :, :100])
    assert LEAST_ROWS == 32


def test_act_decode_continues_the_prompt_column_sums():
    whole, _ = run("act(alpha=0.02)", prompt=112, steps=0)
    pieces, rows = run("act(alpha=0.02)", prompt=100, steps=12)
    a, b = (s.cache.lab_layers[2].state.get("act/sums") for s in (whole, pieces))
    assert (a is None) == (b is None)
    if a is not None:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_act_neutral_beta_is_dense():
    same("act(beta=1)")


def test_act_with_whole_prompt_means_judges_every_row_alike():
    """causal=false: a column is a sink by its mean over all rows, whatever the chunks; later tokens change earlier rows."""
    n, d = 120, 8
    q, k = 0.1 * random(1, 2, n, d), 0.1 * random(1, 2, n, d, seed=1)
    q[..., 0] = 3
    k[0, :, 0, 0] = k[0, :, 40, 0] = 4
    technique = ACT(alpha=0.1, beta=0.4, causal=False)
    got = attend(context(q, k, layer=5), [], [], [], technique.weigh, False, False).out
    s = (q @ k.mT * d**-0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    means = s.sum(2) / torch.arange(n, 0, -1)
    sinks = (means > 0.1) & (torch.arange(n, 0, -1) >= LEAST_ROWS)
    sinks &= sinks.cumsum(-1) > 1
    assert sinks.nonzero()[:, 2].unique().tolist() == [40]
    torch.testing.assert_close(got, calibrated(s, sinks.unsqueeze(2), 0.4) @ k)
    early = attend(context(q[:, :, :60], k[:, :, :60], layer=5), [], [], [], technique.weigh, False, False).out
    assert (early[:, :, 45:] - got[:, :, 45:60]).abs().max() > 1e-3
    ctx = context(q[:, :, 70:], k, layer=5)  # a later chunk goes on from the sums of the earlier one
    first = context(q[:, :, :70], k[:, :, :70], layer=5)
    attend(first, [], [], [], technique.weigh, False, False)
    ctx.state.update(first.state)
    torch.testing.assert_close(attend(ctx, [], [], [], technique.weigh, False, False).out, got[:, :, 70:])


def test_heads_without_a_second_sink_are_not_tried():
    """The finder changes nothing and names exactly the heads that ACT would change."""
    from lab.measure.fitting.act import _Finder

    n, d = 120, 8
    q, k = 0.1 * random(1, 4, n, d), 0.1 * random(1, 2, n, d, seed=1)
    q[..., 0], q[:, 3, :, 0] = 3, 0
    k[0, :, 0, 0] = 4
    k[0, 1, 40, 0] = 4  # a second sink for heads 2 and 3, which head 3 does not look at
    finder, technique = _Finder(ACT(alpha=0.1), 10, 4), ACT(alpha=0.1)
    got = attend(context(q, k, layer=5), [], [], [], finder.weigh, False, False).out
    plain = attend(context(q, k, layer=5), [], [], [], None, False, False).out
    torch.testing.assert_close(got, plain)
    acted = attend(context(q, k, layer=5), [], [], [], technique.weigh, False, False).out
    changed = (acted - plain).abs().amax((0, 2, 3)) > 1e-5
    assert finder.seen[5].tolist() == changed.tolist() == [False, False, True, False]


@pytest.mark.usefixtures("calibrations")
def test_act_acts_on_its_learnt_heads_only():
    from lab.engine.learnt import find
    from lab.measure.fitting.act import Listed

    technique = ACT(heads="learnt", alpha=0.01)
    learnt = find(technique, loaded().model).tensors
    assert learnt["heads"].shape == (3, 4) and ((learnt["heads"] > 0) == (learnt["effect"] > 1e-3)).all()
    assert (learnt["heads"][0] == 0).all() and len(learnt["accuracy"]) == 2
    same("act(heads=learnt,beta=1)")
    table = torch.zeros(3, 4)
    q, k = random(1, 4, 80, 8), random(1, 2, 80, 8, seed=1)
    for heads in ([], [2]):
        table[2, heads] = 1
        ctx = context(q, k, layer=2, layers=3, shared={"learnt/act": {"heads": table}})
        assert technique.weighs(ctx) == bool(heads)
        plain = attend(context(q, k, layer=2, layers=3), [], [], [], None, False, False).out
        for one in (technique, Listed(technique, table)) if heads else ():
            got = attend(ctx, [], [], [], one.weigh, False, False).out
            changed = (got - plain).abs().amax((0, 2, 3)) > 1e-6
            assert changed.nonzero().flatten().tolist() == heads


# -- massive activations -----------------------------------------------------------------------------------------------
def test_a_planted_spike_is_found():
    hidden = random(1, 10, 64)
    hidden[0, 3, 7] = 5000.0
    found = massive(hidden)
    assert found.sum() == 1 and found[0, 3, 7]
    assert not massive(hidden.clamp(-50, 50)).any()


def test_the_default_model_has_its_massive_activation_at_token_0_from_state_12_on():
    """From the shipped calibration: share of sample texts in which token 0 is flagged, per hidden state."""
    from lab.engine.learnt import SHIPPED, Calibration, file_name

    shipped = SHIPPED / file_name("massive_activations", "HuggingFaceTB/SmolLM2-135M-Instruct")
    flagged = Calibration.load(shipped).tensors["massive"]
    assert (flagged[:12] < 0.5).all() and (flagged[12:-2] > 0.99).all()


def test_overwriting_with_its_own_value_changes_nothing():
    class Policy:
        shared = {}

    hidden = random(1, 10, 64)
    hidden[0, 0, 7] = 5000.0
    policy = Policy()
    technique = MassiveActivations(mode="mean", calibration="unused")
    policy.shared[f"learnt/{technique.name}"] = {"hidden": hidden[0, 0][None]}
    assert torch.equal(technique.enter(policy, 0, hidden), hidden)
    zeroed = MassiveActivations().enter(policy, 0, hidden)
    assert zeroed[0, 0, 7] == 0 and (zeroed != hidden).sum() == 1


def test_only_the_first_appearance_is_touched():
    class Policy:
        shared = {}

    technique, policy, hidden = MassiveActivations(), Policy(), random(1, 10, 64)
    hidden[0, 0, 7] = 5000.0
    calm = hidden.clamp(-9, 9)
    assert torch.equal(technique.enter(policy, 0, calm), calm)
    assert technique.enter(policy, 1, hidden)[0, 0, 7] == 0
    assert technique.enter(policy, 2, hidden)[0, 0, 7] == 5000.0


def test_kv_bias_stands_for_an_evicted_first_token():
    """With token 0's own key and value as the bias, dropping token 0 changes nothing."""
    q, k, v = random(1, 4, 1, 8), random(1, 2, 30, 8, seed=1), random(1, 2, 30, 8, seed=2)
    technique = MassiveActivations(mode="bias", calibration="unused")
    table = {"key": k[0, None, :, 0].expand(10, -1, -1), "value": v[0, None, :, 0].expand(10, -1, -1)}
    full = context(q, k, v)
    want = attend(full, [], [], [], None, False, False)
    gone = context(q, k, v, shared={f"learnt/{technique.name}": table})
    gone.store.start_tracking()
    keep = torch.ones(1, 2, 30, dtype=torch.bool)
    keep[..., 0] = False
    gone.store.keep(keep, 29)
    got = attend(gone, [], [], [], technique.weigh, False, False)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    full.shared.update(gone.shared)
    torch.testing.assert_close(attend(full, [], [], [], technique.weigh, False, False).out, want.out)


@pytest.mark.usefixtures("calibrations")
def test_kv_bias_in_a_model_is_idle_while_token_0_is_there():
    same("massive_activations(mode=bias)")


# -- focus directions ----------------------------------------------------------------------------------------------------
def test_split_softmax():
    p = random(3, 8).softmax(-1)
    inside = torch.arange(8) < 3
    assert torch.equal(split_softmax(p, inside, 1.0), p) or torch.allclose(split_softmax(p, inside, 1.0), p)
    got = split_softmax(p, inside, 0.5)
    torch.testing.assert_close(got.sum(-1), torch.ones(3))
    torch.testing.assert_close(got[..., inside].sum(-1), p[..., inside].sum(-1).sqrt())


@pytest.mark.usefixtures("calibrations")
def test_focus_neutral_settings_are_dense_and_learnt_ones_are_not():
    same("focus_directions(alpha=0)")
    same("focus_directions(mode=oracle,tau=1,relevant=3-9)")
    differs("focus_directions(alpha=0.5)")
    differs("focus_directions(mode=oracle,tau=0.3,relevant=3-9)")
    with pytest.raises(LabError, match="relevant"):
        run("focus_directions(mode=oracle)")


@pytest.mark.usefixtures("calibrations")
def test_mass_on_the_relevant_span_rises_with_alpha_on_training_prompts():
    from lab.engine.stack import Stack

    model = loaded().model
    from lab.engine.learnt import find
    from lab.techniques.focus_directions import FocusDirections

    learnt = find(FocusDirections(), model).tensors
    tasks = [passkey(model, None, 256, seed=500 + i) for i in range(8)]
    head, got = int(learnt["gain"][0].argmax()), []  # the first layer's inputs do not depend on other heads' shifts
    for alpha in (0.0, 0.5, 1.0):
        total = []
        for task in tasks:
            def probe(ctx, out):
                if ctx.layer == 0:
                    rows = slice(task.answer - 1, task.ids.numel() - 1)
                    k = ctx.store.exact_k.decode()[0].repeat_interleave(ctx.groups, 0)
                    total.append(float(mass(ctx.q[0, :, rows], k, task, ctx.scale)[head].mean()))
                return out

            with torch.no_grad():
                forward(model, task.ids, Stack.parse(f"focus_directions(alpha={alpha})"), probe)
        got.append(sum(total) / len(total))
    assert got[0] < got[1] < got[2]
    assert math.isfinite(got[2])


# -- stable sinks --------------------------------------------------------------------------------------------------------
def test_stable_needs_most_votes():
    votes = torch.tensor([10.0, 8.0, 7.9, 0.0])
    assert stable(votes, 10, 0.8).tolist() == [True, True, False, False]


def test_stable_sinks_keeps_the_recent_window_and_its_ledger():
    session, _ = run("stable_sinks(budget=20)", prompt=100, steps=5)
    for layer in session.cache.lab_layers:
        assert layer.counts == [20] * len(layer.counts)
        assert (layer.positions().amax(-1) == 104).all()
        assert layer.state["stable_sinks/rows"] == 37
    found, _ = run("stable_sinks(budget=1)", prompt=60, steps=2)
    assert all(layer.counts == [62] * len(layer.counts) for layer in found.cache.lab_layers)
    assert isinstance(found.cache, LabCache)


def test_stable_sinks_full_budget_is_dense():
    same("stable_sinks(budget=1)")
