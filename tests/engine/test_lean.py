"""The short decode step gives the model's own numbers, and knows which models it does not fit."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lab.engine import lean
from lab.engine.graph import GraphedDecode
from lab.engine.session import Session
from lab.engine.steady import step as steady_step
from lab.models.fuse import fuse

SHAPES = {
    "llama": dict(head_dim=16),
    "llama with biases": dict(name="llama", head_dim=16, attention_bias=True, mlp_bias=True),
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=None),
    "llama3 angles": dict(name="llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }),
}
OTHERS = {
    "granite, residuals": (dict(name="granite", residual_multiplier=0.5), "sum of layer"),
    "granite, embedding": (dict(name="granite", embedding_multiplier=3.0), "embedding"),
    "granite, logits": (dict(name="granite", logits_scaling=2.0), "logits"),
    "granite, heads": (dict(name="granite", attention_multiplier=0.1), None),  # the scale is read where the model has it
    "phi3": ({}, "put together"),
    "olmo2": ({}, "put together"),
    "gemma": ({}, "activation"),
    "stablelm": ({}, "put together|norms|fused"),
    "smollm3": (dict(no_rope_layers=[1, 0, 1]), "layer 1"),
    "cohere": ({}, "put together"),
    "ministral3": (dict(head_dim=16), "positions"),
}


def build(name: str):
    changes = dict(SHAPES[name] if name in SHAPES else OTHERS[name][0])
    model = tiny_models.build(changes.pop("name", name), **changes)
    fuse(model)
    return model


def graphed(model, spec="dense", samples=1, **options):
    session = Session(model, spec, new_tokens=16, record=True)
    ids = tiny_models.tokens(70, seed=5).tolist()
    session.prefill(ids[:60], samples=samples)
    with torch.inference_mode():
        return session, GraphedDecode(model, session.cache, samples, 12, capture=False, **options), ids[60:]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_models_own_numbers(name, samples):
    model = build(name)
    session, graph, ids = graphed(model, samples=samples)
    other, _, _ = graphed(model, samples=samples)
    other._leave_graph("asked for")
    assert graph.own is None and graph.lean is not None
    assert max(graph.lean.errors.values()) < 1e-4
    for token in ids:
        step = torch.full((samples,), token)
        with torch.inference_mode():
            assert torch.allclose(graph.step(step), other.step(step), atol=2e-4)
    for ours, theirs in zip(session.cache.lab_layers, other.cache.lab_layers):
        assert torch.allclose(ours.all_keys(), theirs.all_keys(), atol=1e-5) and torch.equal(ours.positions(), theirs.positions())


CODES = ["int_codes", "kivi(group=16,residual=16)", "h2o(budget=20)+int_codes(bits=4)"]


STACKS = ["snapkv(budget=0.5,window=8)+adakv", "head_pruning(heads=1)", "a_shape(sinks=2,window=16)", "zerotuning(gamma=3)",
          "streaming_llm(budget=20)", "streaming_llm(budget=20,renumber=false)", "h2o(budget=20)", *CODES]


@pytest.mark.parametrize("spec", STACKS)
def test_stacks(spec):
    model = build("llama")
    session, graph, ids = graphed(model, spec)
    other, own, _ = graphed(model, spec, shorten=False)
    assert graph.lean is not None and own.lean is None and own.own == "asked for"
    near = 2e-1 if spec in CODES else 2e-4  # one code may round the other way
    for token in ids:
        with torch.inference_mode():
            assert torch.allclose(graph.step(torch.tensor([token])), own.step(torch.tensor([token])), atol=near)
    for ours, theirs in zip(session.cache.lab_layers, other.cache.lab_layers):
        assert torch.equal(ours.positions(), theirs.positions())


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_their_own_modules(name):
    expected = OTHERS[name][1]
    _, graph, _ = graphed(build(name))
    assert (graph.lean is None) == (expected is not None)
    assert expected is None or any(word in graph.own for word in expected.split("|")), graph.own


def test_unfused_products_and_many_samples_are_left_to_the_modules():
    _, graph, _ = graphed(tiny_models.build("llama", head_dim=16))
    assert "not fused" in graph.own or "another kind" in graph.own
    _, graph, _ = graphed(build("llama"), samples=5)
    assert "at most 4" in graph.own


def test_a_part_that_differs_is_found():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    _, graph, _ = graphed(model)
    assert graph.lean is None and "mlp of layer 1" in graph.own


@pytest.mark.parametrize("spec", ["dense", "quest(budget=0.3,page=4,dense_layers=0)"])
def test_attention_is_compared_on_the_models_own_queries(spec, monkeypatch):
    """A rounding of the query may choose another page: every layer's attention is checked on the very query, key and value."""
    model, asked = build("llama"), []
    stored, project = steady_step.Step.stored, lean.Lean._project

    def rounded(self, layer, store):
        project(self, layer, store)
        self.q *= 1 + 1e-3

    def noted(self, q, call):
        rows = [x.rows.fields["x"].index_select(0, self.slot) for x in (self.store.exact_k, self.store.exact_v)]
        asked.append((q.clone(), *rows))
        return stored(self, q, call)

    monkeypatch.setattr(steady_step.Step, "stored", noted)
    monkeypatch.setattr(lean.Lean, "_project", rounded)
    _, graph, _ = graphed(model, spec)
    assert graph.own is None and len(asked) == 2 * len(graph.lean.layers)
    half = len(graph.lean.layers)
    for own, ours in zip(asked[:half], asked[half:]):
        assert all(torch.equal(a, b) for a, b in zip(own, ours))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_captured(name, dtype, tolerance, samples):
    model = tiny_models.build(name, head_dim=64, max_position_embeddings=2048).to("cuda", dtype)
    fuse(model)
    ids = tiny_models.tokens(70, seed=5).tolist()
    runs = []
    for shorten in (True, False):
        session = Session(model, "dense", new_tokens=16)
        session.shorten = shorten
        session.prefill(ids[:60], samples=samples)
        rows = [session.step(torch.full((samples,), token, device="cuda")) for token in ids[60:]]
        assert session.path == "CUDA graph" and session.own == (None if shorten else "asked for")
        runs.append(torch.stack(rows))
    assert float((runs[0] - runs[1]).norm() / runs[1].norm()) < tolerance
