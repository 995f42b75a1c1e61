"""Uniform budgets: every layer and head keeps the same number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.shares import SHARED_BUDGET_HELP, share_budget
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class Uniform(Technique):
    """Equal budgets, said explicitly: what a score gets when no budget technique is on."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "Equal budgets"
    paper: ClassVar[Paper] = Paper("Equal budgets (baseline)", "baseline", 2023)
    slots: ClassVar[tuple[str, ...]] = ("allocate",)
    help: ClassVar[str] = (
        "Every layer and every head keeps the same number of entries. It is what happens without a budget technique, and the "
        "baseline that pyramids, per-head budgets and portfolio weights have to beat."
    )
    does_not_save: ClassVar[str] = "It decides where the budget goes, not how large it is."

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int:
        return total
