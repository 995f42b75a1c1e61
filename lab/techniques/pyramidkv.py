"""PyramidKV: lower layers keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(Technique):
    """Spread a mean budget over layers as a falling line (arXiv 2406.02069)."""

    name: ClassVar[str] = "pyramidkv"
    title: ClassVar[str] = "PyramidKV"
    paper: ClassVar[Paper] = Paper(
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", "2406.02069", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("allocate",)
    help: ClassVar[str] = (
        "Low layers spread attention over many tokens, high layers gather it on few. PyramidKV gives low layers a larger "
        "share of the same total. It ranks with whatever scores the stack names, or with SnapKV."
    )
    does_not_save: ClassVar[str] = "The total stays the same as with equal budgets; only its place changes."

    budget: float = param(
        0, "Mean budget per layer, as a fraction up to 1 or a number of entries; 0 takes the budget of the scoring technique.",
        min=0, max=1_000_000,
    )
    beta: float = param(20.0, "Steepness: the top layer keeps about 1/beta of twice the mean.", min=1, max=1000)
    window: int = param(8, "Recent prompt tokens that always stay, in every layer.", min=1, max=1024, unit="tokens")

    def budget_entries(self, prompt: int) -> int | None:
        return super().budget_entries(prompt) if self.budget else None

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25, window=self.window)

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int:
        return self.planned_entries(total, ctx.prompt, ctx.layer, ctx.layers)

    def planned_entries(self, total: int, prompt: int, layer: int, layers: int) -> int:
        if total >= prompt:
            return total
        w = self.window
        low = (total - w) / self.beta
        high = 2 * (total - w) - low
        if high > prompt - w:
            high = prompt - w
            low = 2 * (total - w) - high
        if low < 0 or high < low or layers < 2:
            return total
        return round(high - layer * (high - low) / (layers - 1)) + w
