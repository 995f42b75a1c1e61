"""AdaKV: heads that spread their attention keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.shares import SHARED_BUDGET_HELP, always_kept, share_budget
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(Technique):
    """Within a layer, give each head's unsafe share of the budget to the best scores of all heads (arXiv 2407.11550)."""

    name: ClassVar[str] = "adakv"
    title: ClassVar[str] = "AdaKV"
    paper: ClassVar[Paper] = Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", "2407.11550", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("allocate",)
    help: ClassVar[str] = (
        "Some heads look at a few tokens, others at many. AdaKV guarantees each head a share of the budget and gives the "
        "rest to the best-scored entries of the whole layer. Memory really differs per head. Scores must be comparable "
        "between heads: attention weights are, key norms and cosines are not."
    )
    does_not_save: ClassVar[str] = "The total of a layer stays the same as with equal budgets; only its place changes."

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)
    alpha: float = param(0.2, "Share of the budget each head keeps whatever its scores; 1 gives equal budgets.", min=0, max=1)

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        if scores is None or total >= ctx.store.longest or self.alpha == 1:
            return total
        ranked = scores.float().masked_fill(always_kept(ctx, total), torch.inf)
        valid = ctx.store.valid()
        if valid is not None:
            ranked = ranked.masked_fill(~valid, -torch.inf)
        safe = max(int(self.alpha * total), min(total, int((ranked[0, 0] == torch.inf).sum())))
        best = ranked.argsort(dim=-1, descending=True, stable=True)[:, :, :safe]
        rest = ranked.scatter(2, best, -torch.inf)
        spare = ctx.kv_heads * (total - safe)
        return safe + _more(rest, spare)


def _more(rest: torch.Tensor, spare: int) -> torch.Tensor:
    """How many of the `spare` best entries of a layer each head holds, int64 [B,Hk]."""
    if spare == 0:
        return torch.zeros(rest.shape[:2], dtype=torch.long, device=rest.device)
    order = rest.flatten(1).argsort(dim=-1, descending=True, stable=True)[:, :spare]
    counts = torch.zeros(rest.shape[:2], dtype=torch.long, device=rest.device)
    return counts.scatter_add_(1, order // rest.shape[-1], torch.ones_like(order))
