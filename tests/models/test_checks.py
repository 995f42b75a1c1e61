"""Which architectures are served and which are refused, on small random models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lab.errors import LabError
from lab.models.checks import check_config, check_hook

SMALL = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
LATENT = dict(SMALL, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
              v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=2)
REFUSED = {
    "bloom": ({}, "never calls transformers' attention interface"),
    "falcon": ({}, "never calls transformers' attention interface"),
    "mpt": ({}, "never calls transformers' attention interface"),
    "gptj": ({}, "never calls transformers' attention interface"),
    "mamba": ({}, "never calls transformers' attention interface"),
    "mamba2": ({}, "never calls transformers' attention interface"),
    "rwkv": ({}, "never calls transformers' attention interface"),
    "deepseek_v2": (LATENT, "multi-head latent attention"),
    "deepseek_v3": (LATENT, "multi-head latent attention"),
    "kimi_linear": ({}, "multi-head latent attention"),
    "minicpm3": ({}, "multi-head latent attention"),
    "llama4_text": (dict(SMALL, layer_types=["chunked_attention", "full_attention"]), "chunked_attention"),
    "deepseek_v4": ({}, "layers of type"),
    "bert": ({}, "is an encoder"),
    "roberta": ({}, "is an encoder"),
    "electra": ({}, "is an encoder"),
    "t5": ({}, "an encoder and a decoder"),
    "bart": ({}, "an encoder and a decoder"),
    "whisper": ({}, "an encoder and a decoder"),
    "vit": ({}, "does not generate text"),
    "clip": ({}, "does not generate text"),
}
# The engine's own list, and families whose flags look like those of refused ones.
SERVED = [*tiny_models.ARCHITECTURES, "gpt_neox", "opt", "stablelm"]


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_any_weight_is_read(kind: str) -> None:
    settings, reason = REFUSED[kind]
    with pytest.raises(LabError, match=reason) as caught:
        check_config(AutoConfig.for_model(kind, **settings))
    assert "Decoder-only models such as Llama" in str(caught.value)


@pytest.mark.parametrize("kind", SERVED)
def test_configs_of_served_families_pass(kind: str) -> None:
    config = tiny_models.config_of(kind)
    assert check_config(config).config_class is type(config)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_hybrids_of_linear_and_full_attention_pass(kind: str) -> None:
    check_config(AutoConfig.for_model(kind))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mistral", "cohere", "gpt_oss"])
def test_the_hook_reproduces_served_models(kind: str) -> None:
    from lab.engine.attach import is_attached

    model = tiny_models.build(kind)
    check_hook(model)
    assert is_attached(model)


def test_a_model_that_changes_cached_keys_is_refused_by_running_it() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **LATENT)).eval()
    with pytest.raises(LabError, match="latent|returns"):
        check_hook(model)


def test_a_model_that_masks_inside_its_forward_is_refused_by_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flag of such a model says so; its logits do."""
    from lab.engine.attach import is_attached

    model = tiny_models.build("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def only_without_a_lab_cache(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        return (out if is_attached(model) else out * 0.5), weights

    monkeypatch.setattr(attention, "forward", only_without_a_lab_cache)
    with pytest.raises(LabError, match="other logits"):
        check_hook(model)
    assert not is_attached(model)


def test_a_model_that_fails_by_itself_is_not_blamed_on_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("strides should be multiple of 16 bytes")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(LabError, match="even with transformers' own attention"):
        check_hook(model)


def test_running_out_of_memory_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    calls: list[int] = []
    forward = model.forward

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise torch.cuda.OutOfMemoryError("full")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        check_hook(model)


def test_the_tiny_llama_is_served(tiny_config: Callable[..., Any]) -> None:
    assert check_config(tiny_config()).__name__ == "LlamaForCausalLM"
