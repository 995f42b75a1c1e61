"""ZeroTuning: which heads to scale and by how much, by output entropy and by a labelled score (arXiv 2505.11739)."""

from __future__ import annotations

import math
from typing import Callable

import torch

from lab.engine.slots import ColumnBias
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.measure.fitting.common import entropy, samples, sizes
from lab.measure.fitting.labelled import asked, score
from lab.measure.fitting.replay import Trials
from lab.techniques.zerotuning import ZeroTuning

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
PROBE = 1.5
Objective = Callable[[Stack, int], float]  # (stack, first layer it changes) -> what should become small


def fit(
    technique, model, tokenizer, progress, *, by: str = "both", sequences: int = 2, length: int = 64, prompts: int = 24,
    held_out: int = 100,
) -> dict[str, torch.Tensor]:
    """For each objective O of entropy (lowest mean output entropy, unsupervised) and labelled (likeliest right options):
    {"gamma_O": [L, Hq] to apply, "effect_O": [L, Hq] change of the objective when a head alone gets the probe gamma,
    "objective_O": [grid]}, "grid", and for labelled "accuracy" [2]: before and after, on prompts that were not used.

    by: "both", "entropy" or "labelled". sequences, length: sample text of the entropy. prompts, held_out: how many
    generated questions to learn from and to check on.
    """
    chosen = ("entropy", "labelled") if by == "both" else (by,)
    if not set(chosen) <= {"entropy", "labelled"}:
        raise LabError(f'zerotuning is not calibrated by "{by}"', "by is both, entropy or labelled")
    out = {"grid": torch.tensor(GRID)}
    for at, name in enumerate(chosen):
        objective = by_entropy(model, tokenizer, sequences, length) if name == "entropy" else by_label(model, tokenizer, prompts)
        found = search(model, objective, lambda f, text: progress((at + 0.95 * f) / len(chosen), f"{text} ({name})"))
        out.update({f"{key}_{name}": x for key, x in found.items()})
    if "labelled" in chosen:
        trials, groups = asked(model, tokenizer, held_out, seed=1)
        stacks = (Stack(), Stack((_PerHead(out["gamma_labelled"]),)))
        out["accuracy"] = torch.tensor([score(trials, groups, stack)[1] for stack in stacks])
    return out


def by_entropy(model, tokenizer, sequences: int, length: int) -> Objective:
    """Mean entropy of the next token over sample text."""
    trials = Trials(model, list(samples(model, tokenizer, sequences, length)))
    return lambda stack, layer: sum(entropy(x) for x in trials.under(stack, layer)) / len(trials.inputs)


def by_label(model, tokenizer, prompts: int) -> Objective:
    """Minus the mean log probability of the right option over generated questions."""
    trials, groups = asked(model, tokenizer, prompts)
    return lambda stack, layer: -score(trials, groups, stack, layer)[0]


@torch.no_grad()
def search(model, objective: Objective, progress) -> dict[str, torch.Tensor]:
    """Minimise an objective: label heads up- or down-effective with the probe, scale only the majority's type, and take the
    best gamma of the grid. {"gamma", "effect": [L, Hq], "objective": [grid]}."""
    layers, heads = sizes(model)[:2]
    base = objective(Stack(), 0)
    effect = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            stack = Stack((ZeroTuning(gamma=PROBE, layers=str(layer), heads=str(head)),))
            effect[layer, head] = objective(stack, layer) - base
        progress(0.9 * (layer + 1) / layers, "More or less attention to the first token, head by head")
    up, down = effect < 0, effect > 0
    chosen = up if up.sum() >= down.sum() else down
    results = {}
    for gamma in GRID:
        results[gamma] = objective(Stack((_PerHead(torch.where(chosen, gamma, 1.0)),)), 0)
        progress(0.9 + 0.1 * len(results) / len(GRID), "Looking for the best factor")
    best = min(results, key=results.get)
    return {"gamma": torch.where(chosen, best, 1.0), "effect": effect, "objective": torch.tensor([results[g] for g in GRID])}


class _PerHead(ZeroTuning):
    """ZeroTuning with a given table of factors [L, Hq]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)

    def edit(self, ctx):
        return [ColumnBias(0, self.table[ctx.layer].clamp_min(math.exp(-20)).log())]

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
