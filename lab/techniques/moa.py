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
        "gradients measured what each head would lose under each rule, and a plan gives every head one rule (two different "
        "ones per layer at most) so that the mean stays within the density. Heads then keep their first block and their span, "
        "and forget the rest."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = (
        "Spans were planned on short sample texts; other texts may need other spans. On other prose the default model's spans "
        "are barely better than equal ones of the same density (0.068 against 0.069 nat at a quarter, 0.010 against 0.012 at "
        "half)."
    )
    evicts_in_decode: ClassVar[bool] = True
    version: ClassVar[int] = 2

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
        return spans(ctx.learnt(self), self.density, ctx.layer, length)

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


def spans(tables: dict[str, torch.Tensor], density: float, layer: int, length: int) -> torch.Tensor:
    """int64 [Hk]: alpha + beta * length of the rules planned for a density, at least LEAST."""
    alpha, beta = (tables[f"{n}_{round(100 * density)}"][layer] for n in ("alpha", "beta"))
    return (alpha + beta * length).round().long().clamp(min(LEAST, length), length)


def plan(loss: torch.Tensor, cost: torch.Tensor, density: float, most: int = 2) -> torch.Tensor:
    """int64 [L, H]: one rule per head, at most `most` (1 or 2) different ones in a layer, with little total loss and mean cost
    <= density at every length.

    loss float [L, H, R] of each head under each rule, cost float [R, lengths] in [0, 1]. A price per cost is raised until the
    best rules meet the bound (every pair of rules is tried in every layer); what is left is granted by loss removed per cost
    added, to heads that lose alike all or none. Where even the cheapest rule is too dense, all heads get it.
    """
    cost, loss = cost.double(), loss.double()
    limit = density * loss.shape[0] * loss.shape[1] + 1e-9

    def fits(chosen: torch.Tensor) -> bool:
        return bool((cost[chosen].sum((0, 1)) <= limit).all())

    pairs = torch.combinations(torch.arange(loss.shape[2]), 2) if most > 1 and loss.shape[2] > 1 else torch.empty(0, 2).long()
    pairs = torch.cat([torch.arange(loss.shape[2]).unsqueeze(1).expand(-1, 2), pairs])
    low, high = 0.0, 1.0
    if fits(_priced(loss, cost, pairs, low)):
        return _priced(loss, cost, pairs, low)
    while not fits(_priced(loss, cost, pairs, high)):
        high *= 4
        if high > 1e12:
            return torch.full(loss.shape[:2], int(cost.sum(-1).argmin()))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(_priced(loss, cost, pairs, middle)) else (middle, high)
    return _filled(_priced(loss, cost, pairs, high), loss, cost, limit, most)


def _priced(loss: torch.Tensor, cost: torch.Tensor, pairs: torch.Tensor, price: float) -> torch.Tensor:
    """The best rules [L, H] when cost has this price and a layer uses one of the pairs [P, 2]."""
    paid = loss + price * cost.mean(-1)
    two, which = paid[:, :, pairs].min(-1)  # [L, H, P]
    best = two.sum(1).argmin(-1)  # [L]; of equals the first, so single rules come before pairs
    picked = pairs[best][:, None].expand(-1, loss.shape[1], -1)
    which = which.gather(2, best.view(-1, 1, 1).expand(-1, loss.shape[1], 1))
    return picked.gather(2, which).squeeze(-1)


def _filled(chosen: torch.Tensor, loss: torch.Tensor, cost: torch.Tensor, limit: float, most: int) -> torch.Tensor:
    """Grant upgrades while they fit, the most loss removed per cost added first."""
    mean, blocked = cost.mean(-1), torch.zeros(loss.shape, dtype=torch.bool)
    while True:
        gain = loss.gather(2, chosen.unsqueeze(-1)) - loss
        extra = mean - mean[chosen].unsqueeze(-1)
        used = torch.nn.functional.one_hot(chosen, loss.shape[2])
        others = (used.sum(1, keepdim=True) - used) > 0  # rules the rest of the layer uses, [L, H, R]
        allowed = others | (others.sum(-1, keepdim=True) < most)
        ratio = torch.where((gain > 0) & allowed & ~blocked, gain / extra.clamp_min(1e-9), torch.full_like(gain, -1.0))
        if ratio.max() <= 0:
            return chosen
        alike = ratio == ratio.max()
        rule = torch.where(alike.any(-1), alike.to(torch.uint8).argmax(-1), chosen)
        if bool((cost[rule].sum((0, 1)) <= limit).all()) and int(_kinds(rule).max()) <= most:
            chosen = rule
        else:
            blocked |= alike


def _kinds(chosen: torch.Tensor) -> torch.Tensor:
    """How many different rules each layer uses."""
    ordered = chosen.sort(-1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1
