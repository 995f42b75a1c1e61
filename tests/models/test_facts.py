"""Facts read from configs of different shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

from lab.models import facts


def of(kind: str, **settings: Any) -> Any:
    return facts.text_config(AutoConfig.for_model(kind, **settings))


def test_head_dim_given_and_implied() -> None:
    assert facts.head_dim(of("qwen3", hidden_size=64, num_attention_heads=4, head_dim=32)) == 32
    assert facts.head_dim(of("gpt2", n_embd=64, n_head=4)) == 16


def test_nested_text_configs_are_found() -> None:
    config = of("gemma3", text_config=dict(num_hidden_layers=6, sliding_window=17, hidden_size=64, head_dim=16))
    assert config.num_hidden_layers == 6 and facts.window(config) == 17
    assert set(facts.layer_types(config)) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("kind, settings, window, kinds", [
    ("mistral", dict(sliding_window=8), 8, {"sliding_attention"}),
    ("mistral", dict(sliding_window=None), None, {"full_attention"}),
    ("llama", {}, None, {"full_attention"}),
    ("gemma2", dict(sliding_window=8), 8, {"sliding_attention", "full_attention"}),
    ("qwen2", dict(sliding_window=8, use_sliding_window=False), None, {"full_attention"}),
])
def test_windows_and_layer_types(kind: str, settings: dict[str, Any], window: int | None, kinds: set[str]) -> None:
    config = of(kind, num_hidden_layers=4, **settings)
    assert facts.window(config) == window and set(facts.layer_types(config)) == kinds
    assert len(facts.layer_types(config)) == 4


def test_kv_bytes_match_a_real_cache(tiny_model: Callable[..., Any], tiny_config: Callable[..., Any]) -> None:
    import torch
    from transformers import DynamicCache

    config = tiny_config()
    cache = DynamicCache(config=config)
    tiny_model(config)(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * facts.kv_bytes_per_token(config, "float32")
    assert facts.kv_bytes_per_token(config, "bfloat16") * 2 == facts.kv_bytes_per_token(config, "float32")


def test_linear_layers_hold_no_keys() -> None:
    config = of("qwen3_next", num_hidden_layers=4)
    full = facts.layer_types(config).count("full_attention")
    expected = 2 * full * config.num_key_value_heads * config.head_dim * 2
    assert 0 < full < 4 and facts.kv_bytes_per_token(config, "bfloat16") == expected


def test_facts_of_a_model_are_json(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = facts.describe(model, parameters, id="x", source="y", revision="z", dtype="float32", weights="int8",
                           weights_kl=0.01)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["layers"] == 2 and values["heads"] == 4 and values["kv_heads"] == 2 and values["head_dim"] == 32
    assert values["vocab"] == 288 and values["context"] == 256 and values["device"] == "cpu"
    assert values["layer_types"] == ["full_attention"] * 2 and values["architecture"] == "LlamaForCausalLM"
    assert values["weights_kl"] == 0.01 and values["parameters"] == model.num_parameters()
