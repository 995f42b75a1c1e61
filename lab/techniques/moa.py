"""MoA: each head gets the span it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param


LEAST = 16  # entries any span keeps


@dataclass(frozen=True)
class MoA(Technique):
    """Per-head windows alpha + beta*N from a profile of what each head's attention is worth (arXiv 2406.14909)."""

    name: ClassVar[str] = "moa"
    title: ClassVar[str] = "MoA spans"
    paper: ClassVar[Paper] = Paper(
        "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", "2406.14909", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select", "score", "allocate", "calibrate")
    help: ClassVar[str] = (
        "Some heads need a long memory, others a short one, and some a memory that grows with the text. A profile with "
        "gradients measured what each head would lose under each rule, and a plan gives every head one rule so that the "
        "mean stays within the density. Heads then keep their first block and their span, and forget the rest."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = "Spans were planned on short sample texts; other texts may need other spans."
    evicts_in_decode: ClassVar[bool] = True

    density: float = param(
        0.5, "Mean share of the prompt that heads keep; the nearest planned density is used.",
        choices=(0.25, 0.5, 0.75)
    )
    first: int = param(64, "First tokens every head keeps.", min=0, max=1024, unit="tokens")
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return True

    def spans(self, ctx: LayerContext, length: int) -> torch.Tensor:
        """int64 [Hk]: recent entries each head of this layer keeps of `length` tokens."""
        learnt = ctx.learnt(self)
        alpha, beta = (learnt[f"{n}_{round(100 * self.density)}"][ctx.layer] for n in ("alpha", "beta"))
        return (alpha + beta * length).round().long().clamp(min(LEAST, length), length)

    def select(self, ctx: LayerContext) -> Rows | None:
        spans = self.spans(ctx, ctx.prompt).to(ctx.q.device)
        if int(spans.min()) >= ctx.prompt:
            return None
        j = ctx.positions()[:, :, None, None, :]
        pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=j.device)[None]
        width = spans.view(1, -1, 1, 1, 1)
        return Rows(lambda r0, r1: (j < self.first) | (pos_q[:, None, None, r0:r1, None] - j < width))

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return ctx.positions().float()

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return min(self.first, max(0, entries - 1)), 1

    def budget_entries(self, prompt: int) -> int:
        return max(2, round(self.density * prompt))

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> torch.Tensor:
        spans = self.spans(ctx, ctx.prompt)
        size = torch.where(spans >= ctx.prompt, 2**31, spans + self.first)
        return size.to(ctx.q.device).expand(ctx.store.batch, -1)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        return 0 * entries, entries


def plan(loss: torch.Tensor, cost: torch.Tensor, density: float) -> torch.Tensor:
    """One rule per head with little total loss and mean cost <= density at every length.

    loss float [H, R] of each head under each rule, cost float [R, lengths] in [0, 1]; rule R-1 must be the cheapest. Greedy:
    start with everyone cheapest, and again and again grant the upgrade with the most loss removed per cost added.
    """
    heads, rules = loss.shape
    cost = cost.double()
    chosen = torch.full((heads,), rules - 1)
    spent = cost[rules - 1] * heads
    limit = density * heads + 1e-9
    while True:
        gain = loss.gather(1, chosen[:, None]) - loss  # [H, R]
        extra = cost.max(-1).values[None] - cost.max(-1).values[chosen][:, None]
        fits = spent - cost[chosen][:, None] + cost[None] <= limit  # [H, R, lengths]
        ratio = torch.where(fits.all(-1) & (gain > 0), gain / extra.clamp_min(1e-9), torch.full_like(gain, -1.0))
        best = int(ratio.argmax())
        if ratio.flatten()[best] <= 0:
            return chosen
        head, rule = divmod(best, rules)
        spent += cost[rule] - cost[chosen[head]]
        chosen[head] = rule
