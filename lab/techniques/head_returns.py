"""Heads as return series: what the portfolio budgets observe, and how weights become entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Forward, Technique, param
from lab.techniques.shares import SHARED_BUDGET_HELP, share_budget, split, total_to_spread
from lab.techniques.snapkv import SnapKV

SHRINK = 0.1


def observe_returns(ctx: LayerContext, rows: int) -> None:
    """Keep, for the last `rows` prompt rows, the size of each KV head's contribution to the attention output."""
    if ctx.phase != "prefill":
        return
    size = ctx.out[:, :, -rows:].float().norm(dim=-1).unflatten(1, (ctx.kv_heads, ctx.groups)).sum(2)  # [B,Hk,T]
    if ctx.pos_q is not None:  # padding has no contribution
        size = size.masked_fill(ctx.pos_q[:, None, -rows:] < 0, torch.nan)
    had = ctx.state.get("returns")
    ctx.state["returns"] = (size if had is None else torch.cat([had, size], 2))[:, :, -rows:].clone()


def covariance(series: torch.Tensor) -> torch.Tensor:
    """Shrunk covariance [H, H] float64 of contributions series [H, T], each divided by its own mean; rows of NaN are left out.

    A head that always contributes the same has variance 0 whatever its size; shrinkage towards the mean variance keeps
    the matrix invertible when there are more heads than rows.
    """
    x = series.double()
    x = x[:, ~x.isnan().any(0)]
    x = x / x.mean(1, keepdim=True).clamp_min(1e-12)
    s = torch.cov(x) if x.shape[1] > 1 else torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64)
    s = s.reshape(x.shape[0], x.shape[0])
    level = s.diagonal().mean().clamp_min(1e-12)
    return (1 - SHRINK) * s + SHRINK * level * torch.eye(len(s), dtype=torch.float64)


def spread_budget(
    step: Forward, total: int, weigh: Callable[[torch.Tensor], torch.Tensor], scope: str, name: str
) -> None:
    """Turn head weights into entries per KV head and leave them, int64 [B,Hk], in each layer's state under `name`.

    scope "all" makes one portfolio of all layers' heads, "layer" one per layer. Every head keeps what the scorer protects.
    """
    contexts = step.contexts
    groups = [contexts] if scope == "all" else [[ctx] for ctx in contexts]
    floor = min(total, 1 + sum(contexts[0].scorer.protected(1, contexts[0].prompt)))
    for members in groups:
        series = torch.cat([ctx.state.pop("returns").cpu() for ctx in members], 1)  # [B, H, T]
        cap = min(ctx.store.longest for ctx in members)
        rows = []
        for one in series:
            weights = weigh(covariance(one)).tolist()
            rows.append(split(total * len(weights), weights, floor, cap))
        counts = torch.tensor(rows, device=contexts[0].q.device)
        at = 0
        for ctx in members:
            ctx.state[name] = counts[:, at : at + ctx.kv_heads].to(ctx.store.device, copy=True)
            at += ctx.kv_heads


@dataclass(frozen=True)
class Portfolio(Technique):
    """What every budget over heads as return series has in common; a subclass names itself and gives `weights`."""

    slots: ClassVar[tuple[str, ...]] = ("observe", "allocate")
    does_not_save: ClassVar[str] = (
        "The total stays the same as with equal budgets; the whole cache is held until the prompt ends."
    )
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)
    rows: int = param(128, "Last prompt rows that make up the series.", min=2, max=4096, unit="tokens")
    scope: str = param("all", "One portfolio of the heads of all layers, or one per layer.", choices=("all", "layer"))

    @staticmethod
    def weights(s: torch.Tensor) -> torch.Tensor:
        """Weights [H], at least 0 and summing to 1, of a covariance s [H,H]."""
        return torch.full((len(s),), 1 / len(s), dtype=s.dtype)

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        return SnapKV(budget=self.budget or 0.25)

    def observe(self, ctx: LayerContext) -> None:
        observe_returns(ctx, self.rows)

    def forget(self, ctx: LayerContext) -> None:
        ctx.state.pop("returns", None)

    def watch(self, step: Forward) -> None:
        total = total_to_spread(self, step)
        if total is None:
            return
        spread_budget(step, total, self.weights, self.scope, self.name)

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> int | torch.Tensor:
        return ctx.state.pop(self.name, total)
