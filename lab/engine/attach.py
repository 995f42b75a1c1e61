"""The one hook: a registered attention function and mask function, switched on per model and reversibly."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from lab.engine.handle import Handle
from lab.engine.pipeline import Call, run, run_without_cache
from lab.engine.policy import Policy
from lab.errors import LabError

NAME = "lab"


def attention(
    module: torch.nn.Module, query: torch.Tensor, key, value, attention_mask: torch.Tensor | None = None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B,Hq,T,d]; key and value are the lab cache's handle, or tensors
    [B,Hk,N,d] where no lab cache is in use. Returns ([B,T,Hq,d], None)."""
    scale = scaling if scaling is not None else getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    call = Call(scale, softcap, sliding_window, s_aux, mask)
    if isinstance(key, Handle):
        if key.layer.witness is not None:
            key.layer.witness.note(query, key.k, key.v)
        return run(key.layer.policy, key, query, call), None
    return run_without_cache(query, key, value, call), None


def mask(batch_size: int, q_length: int, kv_length: int, q_offset=0, kv_offset: int = 0, attention_mask=None, **kwargs):
    """transformers' mask interface: nothing without padding, else the 2D padding mask [B, seen + T]; causality and
    windows follow from stored positions."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.all():
        return None
    return attention_mask.bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to the lab's attention, in place, and return it. `detach` switches back.

    Raises LabError where the architecture does not reach the attention interface.
    """
    if is_attached(model):
        return model
    refuse(model)
    model._lab_previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise LabError(
            f"{type(model).__name__} did not accept the lab's attention function",
            "Decoder models that call transformers' attention interface work", "Choose a Llama, Qwen, Gemma or similar model",
        )
    assert ALL_MASK_ATTENTION_FUNCTIONS[NAME] is mask
    model._lab_hook = model.base_model.register_forward_hook(_forward_done, with_kwargs=True)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model` its earlier attention implementation back."""
    if is_attached(model):
        model.set_attn_implementation(model._lab_previous)
        model._lab_hook.remove()
    return model


def _forward_done(module: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
    """After the last layer: tell the policy of the lab's cache, if one is in use and waits for it."""
    cache = kwargs.get("past_key_values")
    policy = getattr(cache if cache is not None else getattr(output, "past_key_values", None), "policy", None)
    if isinstance(policy, Policy) and (policy.watchers or policy.waits):
        policy.forward_done(kwargs.get("input_ids", args[0] if args else None), output[0])


def is_attached(model: PreTrainedModel) -> bool:
    return model.config.get_text_config(decoder=True)._attn_implementation == NAME


def refuse(model: PreTrainedModel) -> None:
    """Raise LabError, with the reason, for architectures whose attention the hook cannot serve."""
    config = model.config.get_text_config(decoder=True)
    name, works = type(model).__name__, "Decoder models such as Llama, Qwen, Gemma, Mistral, OLMo, Phi and GPT-2 work"
    if getattr(config, "kv_lora_rank", None):
        raise LabError(f"{name} uses multi-head latent attention, which expands keys after the cache returns them", works)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise LabError(f"{name} uses chunked attention, whose mask never reaches the attention function", works)
    if not model._can_set_attn_implementation():
        raise LabError(f"{name} does not call transformers' attention interface, so its attention cannot be replaced", works)
