"""Vertical-slash prefill: a few columns and a few diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.cpu_attention import softmax
from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class VerticalSlash(Technique):
    """Find the columns and diagonals the last rows look along, and read only those (MInference, arXiv 2407.02490)."""

    name: ClassVar[str] = "vertical_slash"
    title: ClassVar[str] = "Vertical-slash prefill"
    paper: ClassVar[Paper] = Paper(
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", "2407.02490", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "In long prompts a head mostly attends along a few vertical lines (tokens everybody looks at) and a few diagonals "
        "(fixed distances). The last rows of the prompt show where the lines are; the other rows then read only those. "
        "It fails where the end of the prompt looks elsewhere than the rest. Generated tokens read everything."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "Every key and value stays stored. Diagonals of neighbouring rows touch most keys, so a CPU gains little "
        "time."
    )

    vertical: float = param(
        0.0625, "Columns each head reads: a fraction below 1 of the prompt so far, or a number above 1. The paper reads 1000.",
        min=0.001, max=1_000_000
    )
    slash: float = param(
        0.125, "Diagonals each head reads: a fraction below 1, or a number above 1. The paper reads 6096.",
        min=0.001, max=1_000_000
    )
    window: int = param(64, "How many of the last prompt rows are asked.", min=1, max=1024, unit="rows")
    sinks: int = param(4, "First columns that are always read.", min=0, max=1024, unit="tokens")

    def select(self, ctx: LayerContext) -> Rows | None:
        if ctx.pos_q is not None or ctx.store.valid() is not None or ctx.q.shape[2] < 2:
            return None
        columns, slashes = self.lines(ctx)
        groups, base, first = ctx.groups, ctx.store.base, ctx.first
        columns, slashes = (x.unflatten(1, (ctx.kv_heads, groups)) for x in (columns, slashes))
        j = torch.arange(base, base + columns.shape[-1], device=columns.device)

        def keep(r0: int, r1: int) -> torch.Tensor:
            offset = torch.arange(first + r0, first + r1, device=j.device)[:, None] - j
            return columns[..., None, :] | slashes[..., offset.clamp(0, slashes.shape[-1] - 1)]

        return Rows(keep)

    def lines(self, ctx: LayerContext) -> tuple[torch.Tensor, torch.Tensor]:
        """(columns bool [B, Hq, N], offsets bool [B, Hq, N]) each head reads, from its last rows in this call."""
        p, pos_q = tail_weights(ctx, self.window)
        n = p.shape[-1]
        offset = (pos_q[:, None] - ctx.store.base - torch.arange(n, device=p.device)).clamp_min(0)
        vertical = p.sum(2)
        slash = torch.zeros_like(vertical)
        slash.scatter_add_(2, offset.flatten().expand(*p.shape[:2], -1), p.flatten(2))
        vertical[..., : self.sinks] = torch.inf
        slash[..., 0] = torch.inf
        return top(vertical, self._count(self.vertical, n)), top(slash, self._count(self.slash, n))

    @staticmethod
    def _count(size: float, n: int) -> int:
        return max(1, round(size * n)) if size < 1 else n if size == 1 else int(size)


def tail_weights(ctx: LayerContext, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights float32 [B, Hq, w, N] of the last w <= rows query rows of this call over all unpadded stored
    keys, and their positions int64 [w]."""
    q = ctx.q[:, :, -rows:]
    w, keys = q.shape[2], ctx.store.all_keys()
    pos_q = torch.arange(ctx.row - w + 1, ctx.row + 1, device=q.device)
    s = (q.unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3) @ keys.mT).float() * ctx.scale
    if ctx.softcap:
        s = ctx.softcap * torch.tanh(s / ctx.softcap)
    j = ctx.store.base + torch.arange(keys.shape[2], device=q.device)
    hidden = j > pos_q[:, None]
    if ctx.window:
        hidden |= pos_q[:, None] - j >= ctx.window
    p, _ = softmax(s.unflatten(2, (ctx.groups, w)).masked_fill(hidden, -torch.inf))
    return p.flatten(1, 2), pos_q


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool of the `count` largest along the last dimension; of equals the earlier ones (rule R4)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
