"""Which heads should be shared: the gradient importance of head pruning."""

from __future__ import annotations

import torch

from lab.measure.fitting.common import samples
from lab.measure.fitting.head_pruning import gradients

GRADIENTS = True


def fit(technique, model, tokenizer, progress, *, sequences: int = 12, length: int = 160) -> dict[str, torch.Tensor]:
    """{"importance": [L, Hq]}."""
    ids = samples(model, tokenizer, sequences, length)
    return {"importance": gradients(model, ids, lambda f: progress(f, "Gradients of the heads' gates"))}
