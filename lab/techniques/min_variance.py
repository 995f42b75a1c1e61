"""Minimum-variance budgets: heads as a portfolio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Forward, Paper, Technique, param
from lab.techniques.head_returns import observe_returns, spread_budget
from lab.techniques.shares import SHARED_BUDGET_HELP, share_budget
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class MinVariance(Technique):
    """Entries per head in proportion to minimum-variance portfolio weights (an experiment of the lab; Markowitz 1952)."""

    name: ClassVar[str] = "min_variance"
    title: ClassVar[str] = "Minimum-variance budgets"
    paper: ClassVar[Paper] = Paper("Portfolio Selection", "Journal of Finance 7(1)", 1952)
    slots: ClassVar[tuple[str, ...]] = ("observe", "allocate")
    help: ClassVar[str] = (
        "Treats each head like a share on a market: its contribution to the output, row by row, is its return. The weights "
        "that make the sum vary least decide how many entries a head keeps, so steady heads get more. Nothing says that a "
        "steady head needs many entries: this is an experiment, and equal budgets are the comparison to make."
    )
    does_not_save: ClassVar[str] = "The total stays the same as with equal budgets; the whole cache is held until the prompt ends."
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)
    rows: int = param(128, "Last prompt rows that make up the series.", min=2, max=4096, unit="tokens")
    scope: str = param("all", "One portfolio of the heads of all layers, or one per layer.", choices=("all", "layer"))

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def observe(self, ctx: LayerContext) -> None:
        observe_returns(ctx, self.rows)

    def forget(self, ctx: LayerContext) -> None:
        ctx.state.pop("returns", None)

    def watch(self, step: Forward) -> None:
        if not step.complete:
            return
        first = step.contexts[0]
        own = self.budget_entries(first.prompt)
        total = own if own is not None else first.scorer.budget_entries(first.prompt)
        if total is None or total >= max(ctx.store.longest for ctx in step.contexts):
            return
        spread_budget(step, total, weights, self.scope, "min_variance")

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        return ctx.state.pop("min_variance", total)


def weights(s: torch.Tensor) -> torch.Tensor:
    """Minimum-variance weights [H] of a covariance s [H,H]: S^-1 1, negative ones cut to zero, summing to 1."""
    w = torch.linalg.solve(s, torch.ones(len(s), 1, dtype=s.dtype)).squeeze(1).clamp_min(0)
    return w / w.sum()
