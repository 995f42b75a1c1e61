"""The dense lab is the dense model: logits and generated tokens of many architectures against eager attention."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, build, tokens
from transformers import DynamicCache

from lab.engine.attach import attach, detach, is_attached
from lab.engine.cache import LabCache
from lab.errors import LabError

PROMPT, STEPS, PADS = 100, 6, 5  # the prompt exceeds every window by more than the block a window is trimmed in


def logits_of(model, cache, ids: torch.Tensor, mask: torch.Tensor | None, pieces: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of ids fed in pieces, positions counted from the first real token as `generate` does."""
    out, at = [], 0
    places = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for size in pieces:
            extra = {} if mask is None else dict(attention_mask=mask[:, : at + size], position_ids=places[:, at : at + size])
            out.append(model(ids[:, at : at + size], past_key_values=cache, use_cache=True, **extra).logits)
            at += size
    return torch.cat(out, 1)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request):
    """(eager model, the same weights attached)."""
    return build(request.param), attach(build(request.param))


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
def test_logits_equal_eager_through_prompt_and_decode(pair, padded):
    eager, lab = pair
    ids = tokens(2, PROMPT + STEPS)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :PADS] = 0
    pieces = [PROMPT] + [1] * STEPS
    want = logits_of(eager, DynamicCache(config=eager.config), ids, mask, pieces)
    got = logits_of(lab, LabCache(lab), ids, mask, pieces)
    assert want.std() > 0.05, "the model is too flat to test anything"
    assert close(got[:, PADS:], want[:, PADS:])


def test_logits_do_not_depend_on_chunks_of_the_prompt(pair):
    eager, lab = pair
    ids = tokens(1, PROMPT + 2, seed=3)
    whole = logits_of(eager, DynamicCache(config=eager.config), ids, None, [PROMPT, 1, 1])
    for pieces in ([33, 33, 34, 1, 1], [1, PROMPT - 2, 1, 1, 1], [7] * 14 + [2, 1, 1]):
        assert close(logits_of(lab, LabCache(lab, prompt=PROMPT), ids, None, pieces), whole)


def test_generate_is_token_identical(pair):
    eager, lab = pair
    ids = tokens(2, 24, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    for extra in (dict(attention_mask=torch.ones_like(ids)), dict(attention_mask=mask)):
        want = eager.generate(ids, max_new_tokens=16, do_sample=False, **extra)
        got = lab.generate(ids, max_new_tokens=16, do_sample=False, past_key_values=LabCache(lab, "dense"), **extra)
        assert torch.equal(got, want)


def test_forward_without_a_cache(pair):
    eager, lab = pair
    ids = tokens(2, 40, seed=2)
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    with torch.no_grad():
        assert close(lab(ids, use_cache=False).logits, eager(ids, use_cache=False).logits)
        extra = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False)
        assert close(lab(ids, **extra).logits[:, PADS:], eager(ids, **extra).logits[:, PADS:])


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_layers_that_read_another_layers_cache(name):
    """Gemma 3n and 4 let late layers read an early layer's cache, sliding ones included."""
    kinds = ["sliding_attention", "full_attention"] * 3
    changes = dict(num_hidden_layers=6, num_kv_shared_layers=2, sliding_window=8, head_dim=16, layer_types=kinds)
    if name == "gemma3n_text":
        changes |= dict(
            laurel_rank=4, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128, activation_sparsity_pattern=None,
            altup_num_inputs=2, intermediate_size=[96] * 6,
        )
    eager = build(name, **changes)
    ids = tokens(1, PROMPT + STEPS)
    pieces = [PROMPT] + [1] * STEPS
    want = logits_of(eager, DynamicCache(config=eager.config), ids, None, pieces)
    attach(eager)
    assert close(logits_of(eager, LabCache(eager), ids, None, pieces), want)
    with pytest.raises(LabError, match="share one layer's cache"):
        LabCache(eager, "h2o")


def test_attach_is_reversible():
    model = build("llama")
    ids = tokens(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        attach(model)
        assert is_attached(model) and model.config._attn_implementation == "lab"
        assert attach(model) is model  # a second time changes nothing
        detach(model)
        assert not is_attached(model) and model.config._attn_implementation == "eager"
        assert torch.equal(model(ids).logits, before)
        assert detach(model) is model


def test_a_cache_attaches_its_model():
    model = build("qwen3")
    LabCache(model)
    assert is_attached(model)


REFUSED = {
    "bloom": dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "falcon": dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "mpt": dict(vocab_size=128, d_model=64, n_layers=2, n_heads=4),
    "deepseek_v3": dict(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8, n_routed_experts=4,
        intermediate_size=96, moe_intermediate_size=32, first_k_dense_replace=1, num_experts_per_tok=2, n_group=1,
        topk_group=1,
    ),
    "llama4_text": dict(
        vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, intermediate_size_mlp=96, num_local_experts=2,
    ),
}
REASONS = {
    "deepseek_v3": "multi-head latent attention", "llama4_text": "chunked attention",
    **dict.fromkeys(["bloom", "falcon", "mpt"], "does not call transformers' attention interface"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_architectures_out_of_reach_are_refused_with_the_reason(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **REFUSED[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(LabError) as error:
        attach(model)
    assert REASONS[name] in str(error.value) and type(model).__name__ in str(error.value)
    assert not is_attached(model)
