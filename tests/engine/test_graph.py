"""The body of a captured decode step, run eagerly: it gives what ordinary steps give; on a GPU, captured."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lab.engine.graph import GraphedDecode, why_not
from lab.engine.session import Session

GRAPHABLE = ["dense", "snapkv(budget=0.5,window=8)", "snapkv(budget=0.5,window=8)+pyramidkv(window=8)", "snapkv(budget=0.5,window=8)+adakv",
             "a_shape(sinks=2,window=16)", "head_pruning(heads=1)"]
OTHERS = ["h2o(budget=20)", "kivi(group=16,residual=16)", "int_codes", "zerotuning(gamma=2)", "quest", "streaming_llm(budget=20)", "moh"]


def prepared(model, spec, samples=1):
    session = Session(model, spec, new_tokens=16, record=True)
    ids = tiny_models.tokens(70, seed=5).tolist()
    return session, session.prefill(ids[:60], samples=samples), ids[60:]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("spec", GRAPHABLE)
def test_the_body_is_an_ordinary_step(spec, samples):
    model = tiny_models.llama()
    session, _, ids = prepared(model, spec, samples)
    other, _, _ = prepared(model, spec, samples)
    assert why_not(session.cache) is None
    with torch.inference_mode():
        graph = GraphedDecode(model, session.cache, samples, 10, capture=False)
        for token in ids:
            step = torch.full((samples,), token)
            assert torch.allclose(graph.step(step), other.step(step), atol=1e-4)
    graph.release()
    assert session.cache.kv_bytes == other.cache.kv_bytes and session.cache.kept_fraction == other.cache.kept_fraction
    for ours, theirs in zip(session.cache.lab_layers, other.cache.lab_layers):
        assert torch.equal(ours.positions(), theirs.positions()) and torch.allclose(ours.all_keys(), theirs.all_keys(), atol=1e-5)
    follow = torch.full((samples,), 9)
    assert torch.allclose(session.step(follow), other.step(follow), atol=1e-4)  # ordinary steps go on from there
    with pytest.raises(IndexError):
        graph.left = 0
        graph.step(follow)


@pytest.mark.parametrize("spec", OTHERS)
def test_other_stacks_say_why_not(spec):
    session, _, _ = prepared(tiny_models.llama(), spec)
    assert "the stack" in why_not(session.cache)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_sliding_layers_say_why_not(architecture):
    session, _, _ = prepared(tiny_models.build(architecture), "dense")
    assert "slides" in why_not(session.cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", GRAPHABLE)
def test_captured(spec):
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=2048).to("cuda")
    session, _, ids = prepared(model, spec)
    other, _, _ = prepared(model, spec)
    other.path = "step by step: asked for"
    for token in ids:
        step = torch.tensor([token], device="cuda")
        assert torch.allclose(session.step(step), other.step(step), atol=2e-2)
    assert session.path == "CUDA graph"
    twin = session.fork()
    step = torch.tensor([7], device="cuda")
    assert torch.allclose(twin.step(step), session.step(step), atol=2e-2)
