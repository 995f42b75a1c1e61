"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class H2O(Technique):
    """Keep the entries with the largest accumulated attention, and the recent ones (arXiv 2306.14048)."""

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    paper: ClassVar[Paper] = Paper("H2O: Heavy-Hitter Oracle for Efficient Generative Inference", "2306.14048", 2023)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "Adds up the attention every stored token has received so far. When the cache is full, the token with the "
        "smallest sum leaves, except the most recent ones. Early tokens had more time to collect attention; "
        "`norm` divides by the number of rows that could see a token."
    )
    does_not_save: ClassVar[str] = "Every step needs the attention weights, so fused attention without weights cannot be used."
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    recent: float = param(0.5, "Share of the budget reserved for the most recent tokens.", min=0, max=1)
    norm: bool = param(False, "Divide accumulated attention by the number of rows that could see the token.")

    @property
    def lightest_leaves(self) -> bool:
        return not self.norm

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, max(1, round(self.recent * entries))

    def score(self, ctx: LayerContext) -> torch.Tensor:
        mass = ctx.mass()
        return mass / (ctx.newest + 1 - ctx.positions()).clamp_min(1) if self.norm else mass
