"""ZeroTuning by output entropy: which heads to scale, and by how much (arXiv 2505.11739, unsupervised)."""

from __future__ import annotations

import math
from typing import Callable

import torch

from lab.engine.stack import Stack
from lab.measure.fitting.common import entropy, forward, samples, sizes
from lab.techniques.zerotuning import ZeroTuning

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
PROBE = 1.5


def fit(technique, model, tokenizer, progress, *, sequences: int = 2, length: int = 64) -> dict[str, torch.Tensor]:
    """{"gamma": [L, Hq] to apply, "effect": [L, Hq] change of the objective when a head alone gets the probe gamma}."""
    ids = samples(model, tokenizer, sequences, length)
    return search(model, lambda stack, probe: sum(entropy(forward(model, row, stack, probe)) for row in ids) / len(ids), progress)


@torch.no_grad()
def search(model, objective: Callable, progress) -> dict[str, torch.Tensor]:
    """Minimise objective(stack, probe): label heads up- or down-effective with the probe, scale only the majority's type,
    and take the best gamma of the grid. A labelled score works as well: pass its negative."""
    layers, heads = sizes(model)[:2]
    base = objective(Stack(), None)
    effect = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            stack = Stack((ZeroTuning(gamma=PROBE, layers=str(layer), heads=str(head)),))
            effect[layer, head] = objective(stack, None) - base
        progress(0.9 * (layer + 1) / layers, "More or less attention to the first token, head by head")
    helped = effect < 0
    up = int(helped.sum()) * 2 >= helped.numel()
    chosen = helped if up else ~helped
    results = {}
    for gamma in GRID:
        results[gamma] = objective(Stack((_PerHead(torch.where(chosen, gamma, 1.0)),)), None)
        progress(0.9 + 0.1 * len(results) / len(GRID), "Looking for the best factor")
    best = min(results, key=results.get)
    return {"gamma": torch.where(chosen, best, 1.0), "effect": effect, "grid": torch.tensor(GRID),
            "objective": torch.tensor([results[g] for g in GRID])}


class _PerHead(ZeroTuning):
    """ZeroTuning with a given table of factors [L, Hq]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)

    def edit(self, ctx):
        from lab.engine.slots import ColumnBias

        return [ColumnBias(0, self.table[ctx.layer].clamp_min(math.exp(-20)).log())]

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
