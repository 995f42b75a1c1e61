"""Heads of ACT: one head after the other calibrates alone, and those that raise the score of right answers are kept.

arXiv 2406.15765 goes by accuracy on 900 samples; the log probability of the right option says as much with fewer."""

from __future__ import annotations

import torch

from lab.engine.stack import Stack
from lab.measure.fitting.common import sizes
from lab.measure.fitting.labelled import asked, score
from lab.techniques.act import ACT, acts

LEAST = 1e-3  # nats: less is rounding


@torch.no_grad()
def fit(
    technique, model, tokenizer, progress, *, prompts: int = 6, shots: int = 3, held_out: int = 40
) -> dict[str, torch.Tensor]:
    """{"heads": [L, Hq] 1 for heads to act on, "effect": [L, Hq] gain in nats when a head acts alone, "accuracy": [2] before
    and after, on questions that were not used, "score": [2] the same in nats}."""
    layers, heads = sizes(model)[:2]
    trials, groups = asked(model, tokenizer, prompts, shots=shots)
    base = score(trials, groups, Stack())[0]
    effect, finder = torch.zeros(layers, heads), _Finder(technique, layers, heads)
    score(trials, groups, Stack((finder,)))
    for layer in range(layers):
        for head in finder.seen[layer].nonzero().flatten().tolist():  # the others have no second sink: no effect
            table = torch.zeros(layers, heads)
            table[layer, head] = 1
            effect[layer, head] = score(trials, groups, Stack((Listed(technique, table),)), layer)[0] - base
        progress(0.9 * (layer + 1) / layers, "Letting one head act at a time")
    chosen = (effect > LEAST).float()
    trials, groups = asked(model, tokenizer, held_out, seed=1, shots=shots)
    found = [score(trials, groups, stack) for stack in (Stack(), Stack((Listed(technique, chosen),)))]
    progress(1.0, "Comparing before and after")
    return {"heads": chosen, "effect": effect, "score": torch.tensor([f[0] for f in found]),
            "accuracy": torch.tensor([f[1] for f in found])}


class _Finder(ACT):
    """Changes nothing and notes which heads [L, Hq] have a second sink."""

    def __init__(self, technique: ACT, layers: int, heads: int) -> None:
        super().__init__(alpha=technique.alpha, beta=technique.beta, causal=technique.causal)
        object.__setattr__(self, "seen", torch.zeros(layers, heads, dtype=torch.bool))

    def chosen(self, ctx) -> torch.Tensor:
        return torch.zeros(ctx.heads, dtype=torch.bool)

    def weighs(self, ctx) -> bool:
        return acts(ctx.layer, ctx.layers)

    def sinks(self, ctx, p, place) -> torch.Tensor:
        found = super().sinks(ctx, p, place)
        self.seen[ctx.layer] |= found.transpose(0, 1).transpose(1, 2).flatten(0, 1).flatten(1).any(1).cpu()
        return found

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Listed(ACT):
    """ACT on the heads of a table [L, Hq]."""

    def __init__(self, technique: ACT, table: torch.Tensor) -> None:
        super().__init__(alpha=technique.alpha, beta=technique.beta, causal=technique.causal)
        object.__setattr__(self, "table", table)

    def chosen(self, ctx) -> torch.Tensor:
        return self.table[ctx.layer] > 0

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
