"""The `calibrate` slot: run a model once on sample text, let a technique look at keys and values, freeze the result."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from lab.engine.rope import rope_of
from lab.engine.sample_text import sample_ids
from lab.engine.slots import Technique
from lab.engine.stack import Stack

LENGTH = 128
_known: WeakKeyDictionary = WeakKeyDictionary()


def calibration(model: torch.nn.Module, technique: Technique, sequences: int) -> list[dict[str, torch.Tensor]]:
    """Per layer, what `technique.fit` froze from `sequences` pieces of sample text; computed once per model and technique.

    Keys are handed over as they were before rotation.
    """
    known = _known.setdefault(model, {})
    if technique not in known:
        with torch.inference_mode():
            known[technique] = [technique.fit(i, k, v) for i, (k, v) in enumerate(_collect(model, sequences))]
    return known[technique]


def calibrated(model: torch.nn.Module, stack: Stack) -> list[dict[str, torch.Tensor]]:
    """The calibration of the technique in the stack's `calibrate` slot that fits keys and values, or []."""
    for technique in stack.filling("calibrate"):
        sequences = technique.calibration_sequences
        if sequences:
            return calibration(model, technique, sequences)
    return []


def _collect(model: torch.nn.Module, sequences: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys before rotation, values), float32 [Hk, M, d], of every layer over the sample text."""
    from lab.engine.cache import LabCache

    ids = sample_ids(model, getattr(model, "lab_tokenizer", None), sequences, LENGTH)
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for row in ids:
        cache = LabCache(model)
        model.base_model(input_ids=row.view(1, -1), past_key_values=cache, use_cache=True)
        layers = []
        for layer in cache.lab_layers:
            keys = rope_of(model, layer.index).rotate(layer.all_keys(), -layer.positions())
            layers.append((keys[0].float(), layer.all_values()[0].float()))
        parts.append(layers)
    return [tuple(torch.cat([p[i][side] for p in parts], 1) for side in (0, 1)) for i in range(len(parts[0]))]
