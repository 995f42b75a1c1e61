"""The short way of one-token steps: the same numbers, only where it applies, and hooks still work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch

from lab.engine.session import Session
from lab.models.norms import replace_norms
from lab.models.packed import find_siblings, pack
from lab.models.quick import QuickAttention, quicken

SERVED = ("llama", "mistral", "qwen2")
OTHERS = ("qwen3", "gemma2", "gpt2", "olmo2", "cohere", "phi3")


def pair(family: str, mode: str = "float32", **changes: Any) -> tuple[Any, Any, int]:
    """(packed model, its quickened twin, blocks replaced)."""
    plain = tiny_models.build(family, **changes)
    replace_norms(plain)
    pack(plain, mode, find_siblings(plain))
    quick = copy.deepcopy(plain)
    return plain, quick, quicken(quick)


def run(model: Any, spec: str, ids: list[int], samples: int = 1, steps: int = 12) -> torch.Tensor:
    session = Session(model, spec, new_tokens=steps)
    rows = [session.prefill(ids, samples=samples)]
    for step in range(steps):
        rows.append(session.step(torch.full((samples,), (7 * step + 3) % 50)))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["float32", "int8"])
@pytest.mark.parametrize("spec", ["dense", "h2o(budget=12)", "streaming_llm(budget=12)", "kivi(bits=4,residual=32)"])
def test_a_llama_gives_the_same_logits(spec: str, mode: str) -> None:
    plain, quick, replaced = pair("llama", mode)
    layers = plain.config.num_hidden_layers
    assert replaced == 2 * layers  # every attention block and every MLP
    ids = list(range(3, 40))
    wanted, found = run(plain, spec, ids), run(quick, spec, ids)
    assert torch.allclose(wanted, found, atol=1e-4 if mode == "float32" else 5e-2)


@pytest.mark.parametrize("family", SERVED)
def test_other_models_of_the_kind(family: str) -> None:
    plain, quick, replaced = pair(family)
    assert replaced
    ids = list(range(3, 40))
    assert torch.allclose(run(plain, "dense", ids), run(quick, "dense", ids), atol=1e-4)


@pytest.mark.parametrize("family", OTHERS)
def test_other_kinds_keep_their_attention_and_their_numbers(family: str) -> None:
    plain, quick, _ = pair(family)
    assert not any(isinstance(m.__dict__.get("forward"), QuickAttention) for m in quick.modules())
    ids = list(range(3, 30))
    assert torch.allclose(run(plain, "dense", ids), run(quick, "dense", ids), atol=1e-4)


def test_samples_of_one_prompt_go_together() -> None:
    plain, quick, _ = pair("llama")
    ids = list(range(3, 20))
    assert torch.allclose(run(plain, "dense", ids, samples=3), run(quick, "dense", ids, samples=3), atol=1e-4)


def test_a_hook_on_a_projection_is_still_called() -> None:
    _, quick, _ = pair("llama")
    attention = next(m for m in quick.modules() if isinstance(m.__dict__.get("forward"), QuickAttention))
    called = []
    handle = attention.q_proj.register_forward_hook(lambda *_: called.append(1))
    run(quick, "dense", [3, 4, 5], steps=2)
    handle.remove()
    assert len(called) == 3  # the prompt and two steps


def test_transformers_own_cache_takes_the_models_own_way() -> None:
    plain, quick, _ = pair("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(plain.generate(ids, **options), quick.generate(ids, **options))


def test_a_step_that_gives_other_numbers_is_not_replaced() -> None:
    plain = tiny_models.build("llama")
    pack(plain, "float32", find_siblings(plain))
    block = next(m for m in plain.modules() if hasattr(m, "q_proj"))
    own = block.forward

    def halved(*args, **kwargs):
        out, weights = own(*args, **kwargs)
        return out / 2, weights

    block.forward = halved
    mlps = plain.config.num_hidden_layers
    assert quicken(plain) == 2 * mlps - 1 and block.forward is halved


BY_POSITION = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.5,
                   beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
HIDDEN = {  # what three tokens in front of a text do not show: queries that grow with the position, numbers clipped where large
    "ministral3": dict(head_dim=16, rope_parameters=BY_POSITION), "olmo": dict(clip_qkv=6.0),
}


@pytest.mark.parametrize("family", HIDDEN)
def test_what_shows_far_on_or_in_large_numbers_only_is_found(family: str) -> None:
    plain, quick, replaced = pair(family, **HIDDEN[family])
    assert replaced == plain.config.num_hidden_layers  # the MLPs
    ids = list(range(3, 60))
    assert torch.allclose(run(plain, "dense", ids), run(quick, "dense", ids), atol=1e-4)


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "act_fn"])
def test_what_takes_a_parts_place_is_used(name: str) -> None:
    plain, quick, _ = pair("llama")
    for model in (plain, quick):
        torch.manual_seed(1)
        layer = model.model.layers[1]
        block = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
        old = getattr(block, name)
        setattr(block, name, torch.nn.Tanh() if name == "act_fn" else torch.nn.Linear(old.in_features, old.out_features))
    assert torch.allclose(run(plain, "dense", [3, 4, 5], steps=2), run(quick, "dense", [3, 4, 5], steps=2), atol=1e-4)


def test_a_forward_that_takes_a_projections_place_is_used() -> None:
    plain, quick, _ = pair("llama")
    for model in (plain, quick):
        model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    assert torch.allclose(run(plain, "dense", [3, 4, 5], steps=2), run(quick, "dense", [3, 4, 5], steps=2), atol=1e-4)


def test_a_model_that_was_cast_later_takes_its_own_way() -> None:
    plain, quick, _ = pair("llama")
    assert torch.equal(run(plain.bfloat16(), "dense", [3, 4, 5], steps=2), run(quick.bfloat16(), "dense", [3, 4, 5], steps=2))
