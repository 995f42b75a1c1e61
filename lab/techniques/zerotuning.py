"""ZeroTuning: turn the attention paid to the first token up or down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import ColumnBias, Paper, Technique, param
from lab.errors import LabError


@dataclass(frozen=True)
class ZeroTuning(Technique):
    """Multiply token 0's attention by gamma before normalising (arXiv 2505.11739)."""

    name: ClassVar[str] = "zerotuning"
    title: ClassVar[str] = "ZeroTuning"
    paper: ClassVar[Paper] = Paper(
        "ZeroTuning: Unlocking the Initial Token's Power to Enhance LLMs Without Training", "2505.11739", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("edit", "calibrate")
    help: ClassVar[str] = (
        "Most heads park attention on the first token. Scaling just that weight by gamma makes all other weights of the "
        "head sharper (below 1) or flatter (above 1) while keeping their proportions. Calibration finds out head by head whether "
        "more or less helps, and then which gamma. On the default model the table learnt from labelled questions made unseen "
        "right answers likelier (46% to 61% right of 100, but 58% to 55% of another 60); that of low entropy only made it more "
        "certain, 58% to 40%; both cost 0.1 nat on prose."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = "It steers the model; memory and reading stay the same."

    gamma: float = param(1.5, "Factor on the first token's attention before normalising.", min=0.01, max=100)
    layers: str = param("all", "Layers it acts on: all, or a range such as 8-20.")
    heads: str = param("all", "Query heads it acts on: all, or a comma-free list such as 0;3;5.")

    calibrated: bool = param(False, "Use the heads and the gamma found by calibration instead of those given here.")
    objective: str = param("entropy", "What calibration went by: the lowest output entropy, which needs no answers, or the "
                           "right answers of generated questions.", choices=("entropy", "labelled"))
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    version: ClassVar[int] = 2

    @property
    def learns(self) -> bool:
        return self.calibrated

    def validate(self) -> None:
        span(self.name, "layers", self.layers, "-")
        picked(self.name, "heads", self.heads)

    def standing_edit(self, ctx: LayerContext) -> list[ColumnBias]:
        return self.edit(ctx)

    def edit(self, ctx: LayerContext) -> list[ColumnBias]:
        if self.calibrated:
            gamma = self._table(ctx)[ctx.layer].float()
            return [ColumnBias(0, gamma.log())] if bool((gamma != 1).any()) else []
        chosen = span(self.name, "layers", self.layers, "-")
        if self.gamma == 1 or (chosen and not chosen[0] <= ctx.layer <= chosen[1]):
            return []
        heads = picked(self.name, "heads", self.heads)
        bias = torch.zeros(ctx.heads)
        bias[[h for h in heads if h < ctx.heads] if heads else slice(None)] = math.log(self.gamma)
        return [ColumnBias(0, bias)]

    def _table(self, ctx: LayerContext) -> torch.Tensor:
        """Factors [L, Hq] of the chosen objective."""
        learnt = ctx.learnt(self)
        if f"gamma_{self.objective}" not in learnt:
            raise LabError(f"This calibration of {self.title} was not made by the {self.objective} objective",
                           fix="python -m lab calibrate zerotuning learns both")
        return learnt[f"gamma_{self.objective}"]


def span(owner: str, field: str, text: str, sep: str) -> tuple[int, int] | None:
    """(first, last) of "8-20" or "8"; None for "all". Raises LabError for anything else."""
    if text == "all":
        return None
    pieces = text.split(sep)
    if len(pieces) in (1, 2) and all(p.strip().isdigit() for p in pieces):
        first, last = int(pieces[0]), int(pieces[-1])
        if first <= last:
            return first, last
    raise LabError(f'{owner}: {field}="{text}" is not a range', 'Write all, a number, or first-last such as 8-20')


def picked(owner: str, field: str, text: str) -> list[int] | None:
    """Head numbers of "0;3;5"; None for "all". Raises LabError for anything else."""
    if text == "all":
        return None
    pieces = [p.strip() for p in text.split(";") if p.strip()]
    if pieces and all(p.isdigit() for p in pieces):
        return [int(p) for p in pieces]
    raise LabError(f'{owner}: {field}="{text}" is not a list of heads', 'Write all, or numbers joined by ";" such as 0;3;5')
