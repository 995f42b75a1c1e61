"""Diagnostics that question a model: a linear toy with known answers, and a tiny random decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import from_weights

from lab.errors import LabError
from lab.inspect.diagnostics import Session, faithfulness, importance, mixing, run
from lab.inspect.diagnostics.probe import ModelProbe

torch.set_num_threads(1)


class Linear:
    """log p(target 0) is exactly linear in the embeddings; the neutral token embeds to zero."""

    neutral_id, device, layers, heads = 0, "cpu", 1, 2

    def __init__(self, t: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.table = torch.rand(9, 4, generator=g)
        self.table[0] = 0
        self.w = torch.rand(t, 4, generator=g)

    def embed(self, ids):
        return self.table[ids]

    def logits(self, x, gates=None, last=False):
        f = -5 + (x * self.w[: x.shape[1]]).sum((1, 2)) * 0.1
        return torch.stack([f, torch.log1p(-f.exp())], -1)[:, None]


def test_linear_toy_makes_all_methods_agree():
    probe, ids = Linear(6), torch.tensor([3, 5, 1, 8, 2, 7])
    loo = faithfulness.leave_one_out(probe, ids, 0)
    want = (probe.table[ids] * probe.w).sum(1).numpy() * 0.1
    np.testing.assert_allclose(loo, want, atol=1e-5)
    np.testing.assert_allclose(faithfulness.shapley(probe, ids, 0, permutations=3), want, atol=1e-5)
    saliency, product = faithfulness.gradients(probe, ids, 0)
    np.testing.assert_allclose(product, want, atol=1e-5)
    np.testing.assert_allclose(saliency, probe.w.sum(1).numpy() * 0.1, atol=1e-5)
    found = faithfulness.agreement({"same": product, "reversed": -want + 2}, loo)
    np.testing.assert_allclose(found[:, :2], [[1, 1], [-1, -1]], atol=1e-6)


def test_marked_words_and_chance():
    hits, chance = faithfulness.marked_overlap(
        {"a": np.array([3.0, 1, 2, 0]), "b": np.array([0.0, 1, np.nan, 9])}, [0, 2]
    )
    assert hits.tolist() == [1, 0] and chance == 0.5


@pytest.fixture(scope="module")
def probe() -> ModelProbe:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    return ModelProbe(transformers.LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def session(probe) -> Session:
    ids = torch.randint(1, 50, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    maps = probe.attention(torch.tensor(ids))
    return probe.session(ids, captures=[from_weights(list(m)) for m in maps], prompt_tokens=10, marked=[2, 3])


def test_session_holds_what_the_model_says(probe, session):
    assert len(session.hidden) == 4 and session.hidden[0].shape == (14, 32)
    assert len(session.values) == 3 and session.values[0].shape == (2, 14, 8)
    assert session.attention_out[2].shape == session.mlp_out[2].shape == (14, 32)
    for layer in range(2):
        together = session.hidden[layer] + session.attention_out[layer] + session.mlp_out[layer]
        torch.testing.assert_close(together, session.hidden[layer + 1], atol=1e-5, rtol=1e-4)
    x = probe.embed(torch.tensor(session.token_ids)[None])
    want = torch.log_softmax(probe.logits(x)[0, 4], -1)[session.token_ids[5]]
    assert session.logprobs[5] == pytest.approx(want.item(), abs=1e-5) and np.isnan(session.logprobs[0])
    assert probe.model.config._attn_implementation == "sdpa", "the model's own attention is restored"


def test_gates_at_one_change_nothing_and_close_heads(probe):
    x = probe.embed(torch.tensor([[4, 5, 6, 7]]))
    plain = probe.logits(x)
    torch.testing.assert_close(probe.logits(x, torch.ones(3, 4)), plain)
    closed = torch.ones(3, 4)
    closed[1, 2] = 0
    assert (probe.logits(x, closed) - plain).abs().max() > 1e-6


def test_gate_gradient_predicts_leaving_out(probe):
    ids = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(2))
    gates = torch.ones(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(importance.loss(probe, ids, gates), gates)
    out = importance.leave_one_out(probe, ids)
    # At random initialisation heads act almost linearly: removing one moves the loss by minus its gradient.
    assert np.corrcoef(out.flatten(), -grad.flatten())[0, 1] > 0.95
    found = run("head_importance", Session(probe=probe, token_ids=ids.tolist()))
    assert found["curve"].shape == (2, 11) and found["curve"][0, 0] == found["curve"][1, 0]
    np.testing.assert_allclose(np.linalg.norm(found["importance"], axis=1), 1, rtol=1e-5)


def test_a_duplicated_head_costs_the_same_as_its_twin(probe):
    attention = probe.model.model.layers[1].self_attn
    with torch.no_grad():
        saved = [p.clone() for p in (attention.q_proj.weight, attention.o_proj.weight)]
        attention.q_proj.weight[8:16] = attention.q_proj.weight[:8]
        attention.o_proj.weight[:, 8:16] = attention.o_proj.weight[:, :8]
        out = importance.leave_one_out(probe, torch.arange(1, 30))
        for p, s in zip((attention.q_proj.weight, attention.o_proj.weight), saved):
            p.copy_(s)
    assert out[1, 0] == pytest.approx(float(out[1, 1]), abs=1e-6)


def test_faithfulness_on_a_model(session):
    session.options = {"permutations": 2, "output": 13}
    found = run("faithfulness", session)
    assert (
        found["methods"].shape == (12,)
        and found["agreement"].shape == (12, 3)
        and found["scores"].shape == (12, 13)
    )
    at = list(found["methods"]).index("mask one")
    np.testing.assert_allclose(found["agreement"][at], 1)
    assert np.isnan(found["scores"][0, 10:]).all(), "prompt methods say nothing of generated tokens"
    assert found["overlap"].shape == (12,) and found["chance"] == pytest.approx(2 / 13)
    session.options = {"output": 99}
    with pytest.raises(LabError, match="cannot be explained"):
        run("faithfulness", session)
    session.options = {}


def test_mixing_spreads_only_forwards(probe, session):
    change = mixing.spread(probe, torch.tensor(session.token_ids), 4)
    assert (change[:, :4] == 0).all() and (change[1:, 5:] > 0).all() and change[0, 5:].max() == 0
    found = run("mixing", session)
    assert found["lines"].shape == (2, 4) and not np.allclose(found["visible"], found["hidden"])
    session.options = {"token": 0}
    with pytest.raises(LabError, match="cannot be changed"):
        run("mixing", session)
    session.options = {}


@pytest.mark.parametrize(
    "name", ["massive", "subspace", "embedding", "limits", "counterfactual", "shapes", "hallucination"]
)
def test_the_rest_runs_on_a_models_session(session, name):
    session.options = {"steps": 3, "permutations": 3}
    assert run(name, session)
    session.options = {}


def test_unknown_architecture_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("C", (), {"num_attention_heads": 2, "num_hidden_layers": 2})
            self.x = torch.nn.Linear(2, 2)

    with pytest.raises(LabError, match="cannot|no list"):
        ModelProbe(Odd())
