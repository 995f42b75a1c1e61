"""Refusing, with the reason, models that the lab's hook into attention cannot serve."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lab.errors import LabError, out_of_memory
from lab.models.facts import text_config

WORKS = "Decoder-only models such as Llama, Qwen, Gemma, Mistral, OLMo, Phi, SmolLM and GPT-2 work"

# Layer types whose masks follow from stored positions alone, or that hold no attention cache at all.
_SERVED_LAYERS = frozenset({
    "full_attention", "sliding_attention", "linear_attention", "conv", "mlp", "moe", "sparse", "dense",
})
_CALLS_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("
_FAILURES = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, ImportError)
_PROBE_TOKENS = 11
_PROBE_ERROR = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def check_config(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that will be built for ``config``, if the hook can serve it; called before weights are read.

    Raises:
        LabError: encoder or encoder-decoder, no attention interface, latent attention, or a mask the attention
            function never sees.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if config.is_encoder_decoder:
        raise LabError(f"A {kind} model has an encoder and a decoder", WORKS,
                       "The lab follows one causal sequence; choose a decoder-only model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LabError(f"A {kind} model does not generate text token by token", WORKS)
    chosen = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = chosen[0] if isinstance(chosen, (tuple, list)) else chosen
    source = _source(model_class)
    if getattr(config, "is_decoder", None) is False and "self.is_decoder" in source:
        raise LabError(f"This {kind} model is an encoder: every token sees the whole text, so there is no causal "
                       "cache to study", WORKS)
    if _CALLS_INTERFACE not in source and not _composite(config):
        raise LabError(f"{model_class.__name__} computes its token mixing itself and never calls transformers' "
                       "attention interface, so nothing can be toggled in it", WORKS)
    _check_attention(config, model_class.__name__, source)
    return model_class


def check_hook(model: PreTrainedModel) -> None:
    """Run a few tokens through the model with and without the lab's attention and compare the logits.

    This catches what no flag announces: masks built inside a model's forward, or keys touched after the cache
    returned them. It costs two short forwards and leaves the model on the lab's attention.

    Raises:
        LabError: the lab's attention fails on this model or changes its logits.
    """
    from lab.engine.attach import attach, detach
    from lab.engine.cache import LabCache

    name = type(model).__name__
    detach(model)
    vocab = text_config(model.config).vocab_size
    device = model.get_input_embeddings().weight.device
    # Spread over the vocabulary, so that no two tokens are alike and none is a special low id.
    ids = (torch.arange(1, _PROBE_TOKENS + 1, device=device) * 7919 % vocab)[None]
    with torch.inference_mode():
        try:
            dense = model(ids, use_cache=False).logits[:, -2:].float()
        except _FAILURES as error:
            _pass_on_memory(error)
            raise LabError(f"{name} cannot be run even with transformers' own attention ({_brief(error)})") from error
        try:
            attach(model)
            cache = LabCache(model)
            first = model(ids[:, :-1], past_key_values=cache).logits[:, -1:]
            hooked = torch.cat([first, model(ids[:, -1:], past_key_values=cache).logits[:, -1:]], 1).float()
        except _FAILURES as error:
            _pass_on_memory(error)
            detach(model)
            raise LabError(f"{name} works on the keys or values that its cache returns, which the lab's cache keeps "
                           f"to itself ({_brief(error)})", WORKS) from error
    spread = (dense - dense.mean(-1, keepdim=True)).norm().clamp_min(1e-6)
    error = float((hooked - dense).norm() / spread)
    if not error < _PROBE_ERROR.get(model.dtype, 0.1):
        detach(model)
        raise LabError(f"{name} gives other logits under the lab's attention (relative difference {error:.2g}): "
                       "it masks or changes attention in a way the attention function does not see", WORKS)


def _pass_on_memory(error: Exception) -> None:
    """Re-raise what says nothing about the architecture."""
    if out_of_memory(error):
        raise error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


def _check_attention(config: PreTrainedConfig, name: str, source: str) -> None:
    """Refuse latent attention, per-layer shapes and layer types the pipeline does not know."""
    text = text_config(config)
    if _setting(text, "kv_lora_rank") or "expand_kv(" in source:
        raise LabError(f"{name} uses multi-head latent attention: it expands keys and values after the cache returned "
                       "them, so the lab's cache cannot stand in", WORKS)
    if _varies(text):
        raise LabError(f"{name} has layers of different shapes, and the lab's cache expects one shape", WORKS)
    unknown = sorted(set(_setting(text, "layer_types") or ()) - _SERVED_LAYERS)
    if unknown:
        raise LabError(f"{name} has layers of type {', '.join(unknown)}, whose masks or states never reach the "
                       "attention function", WORKS)


def _composite(config: PreTrainedConfig) -> bool:
    """Whether the class only wraps a text model, whose own module then holds the attention."""
    return text_config(config) is not config


def _setting(config: PreTrainedConfig, name: str) -> Any:
    """A setting's value, or None where it is absent or differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own class for per-layer settings is not public
        return None


def _varies(config: PreTrainedConfig) -> bool:
    """Whether the head shape differs between layers."""
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        try:
            getattr(config, name, None)
        except Exception:  # as above
            return True
    return False


def _source(model_class: type) -> str:
    """The text of the file that defines ``model_class``, empty where it is not at hand."""
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError, KeyError):
        return ""
