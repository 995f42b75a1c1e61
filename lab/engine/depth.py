"""Hidden states between layers: where prompt tokens stop, and where massive activations are met.

A pre-hook on every decoder layer, inert unless the forward's cache is the lab's and its stack has a technique that looks
at hidden states (`enters`) or trims the prompt (the `trim` slot).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch

from lab.engine.slots import Technique
from lab.errors import LabError


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's stack of decoder layers, in order. Raises LabError where none is found."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module
    raise LabError(
        f"The layers of {type(model).__name__} were not found", "Trimming and hidden states need a list of decoder layers"
    )


def install(model: torch.nn.Module) -> None:
    """Add the hooks once; they stay, and do nothing for other caches."""
    if getattr(model, "_lab_depth", False):
        return
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(_entering(index), with_kwargs=True)
    model.base_model.register_forward_pre_hook(_reading, with_kwargs=True)
    model._lab_depth = True


def _reading(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Note the tokens of this forward, for techniques that read the prompt once more before it goes on."""
    policy = getattr(kwargs.get("past_key_values"), "policy", None)
    if policy is not None and policy.trimmer is not None:
        policy.shared["ids"] = kwargs.get("input_ids", args[0] if args else None)


@contextmanager
def shallow(model: torch.nn.Module, depth: int) -> Iterator[None]:
    """Inside, the model consists of its first `depth` layers: the others pass their input on, uncomputed and unstored."""
    layers = decoder_layers(model)
    kind: dict[str, Any] = {}
    hook = layers[depth - 1].register_forward_hook(lambda module, args, out: kind.update(tuple=isinstance(out, tuple)))
    upper = [layers[i] for i in range(depth, len(layers))]
    own = [layer.__dict__.get("forward") for layer in upper]  # where accelerate put its own

    def passed(hidden_states: torch.Tensor, *args, **kwargs):
        return (hidden_states,) if kind.get("tuple") else hidden_states

    try:
        for layer in upper:
            layer.forward = passed
        yield
    finally:
        hook.remove()
        for layer, before in zip(upper, own):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.forward = before


def _entering(index: int):
    def hook(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        policy = getattr(cache, "policy", None)
        if policy is None or not (policy.enterers or policy.trimmer):
            return None
        if index == 0:
            policy.trimmed, policy.skipped = None, 0
        hidden = args[0] if args else kwargs["hidden_states"]
        for technique in policy.enterers:
            hidden = technique.enter(policy, index, hidden)
        if policy.trimmer is not None:
            hidden, kwargs = _trim(policy, policy.trimmer, index, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _trim(policy, technique: Technique, index: int, hidden: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, dict]:
    """Let only the chosen rows into layer `index` and those above, with their own rotary angles."""
    rows = hidden.shape[1]
    if policy.trimmed is None:
        if index != technique.depth(policy.layers) or rows < 2:
            return hidden, kwargs
        chosen = technique.trim(policy, hidden)
        if chosen is None or chosen.numel() >= rows:
            return hidden, kwargs
        policy.trimmed, policy.skipped = chosen, rows - chosen.numel()
        hidden = hidden[:, chosen]
    if policy.trimmed is not None:
        kwargs = {name: _rows(value, policy.trimmed, policy.trimmed.numel() + policy.skipped) for name, value in kwargs.items()}
    return hidden, kwargs


def _rows(value, chosen: torch.Tensor, full: int):
    """The chosen rows of what runs along them: position ids [B, T] and rotary tables [B, T, r] of the whole forward of
    `full` rows."""
    if isinstance(value, tuple) and value and all(isinstance(x, torch.Tensor) for x in value):
        return tuple(_rows(x, chosen, full) for x in value)
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == full and value.shape[1] != chosen.numel():
        return value[:, chosen.to(value.device)]
    return value
