"""Hidden states between layers: where prompt tokens stop, and where massive activations are met.

A pre-hook on every decoder layer, inert unless the forward's cache is the lab's and its stack has a technique that looks
at hidden states (`enters`) or trims the prompt (the `trim` slot).
"""

from __future__ import annotations

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
    model._lab_depth = True


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
        return value[:, chosen]
    return value
