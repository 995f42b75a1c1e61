"""One ranking over all layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Forward, Paper, Technique, param
from lab.techniques.shares import SHARED_BUDGET_HELP, always_kept, share_budget, top_counts, total_to_spread
from lab.techniques.snapkv import SnapKV


@dataclass(frozen=True)
class GlobalTop(Technique):
    """Keep the best-scored entries of the whole cache, wherever they are (the budget of KVzip, arXiv 2505.23416)."""

    name: ClassVar[str] = "global_top"
    title: ClassVar[str] = "Global ranking"
    paper: ClassVar[Paper] = Paper("KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", "2505.23416", 2025)
    slots: ClassVar[tuple[str, ...]] = ("allocate",)
    help: ClassVar[str] = (
        "Puts the entries of all layers and heads into one ranking and keeps the best. Layers and heads that attend to few "
        "tokens give their room to others. It needs scores that mean the same everywhere: attention weights do, norms and "
        "cosines do not."
    )
    does_not_save: ClassVar[str] = (
        "The total stays the same as with equal budgets; the whole cache is held until the prompt ends."
    )
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def watch(self, step: Forward) -> None:
        total = total_to_spread(self, step)
        if total is None:
            return
        width = max(ctx.store.longest for ctx in step.contexts)
        flat = torch.cat([_flat(ctx, total, width).to(step.hidden.device) for ctx in step.contexts], 1)  # [B, L*Hk, N]
        counts = top_counts(flat, total * flat.shape[1])
        at = 0
        for ctx in step.contexts:
            ctx.state["global_counts"] = counts[:, at : at + ctx.kv_heads].to(ctx.store.device)
            at += ctx.kv_heads

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        return ctx.state.pop("global_counts", total)


def _flat(ctx: LayerContext, total: int, width: int) -> torch.Tensor:
    scores = ctx.scorer.score(ctx).float().masked_fill(always_kept(ctx, total), torch.inf)
    valid = ctx.store.valid()
    scores = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    return torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
