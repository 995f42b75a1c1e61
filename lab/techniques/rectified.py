"""Rectified sparse attention: block-sparse prefill whose missing blocks are replaced by their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param
from lab.techniques.xattention import smallest_sets


@dataclass(frozen=True)
class Rectified(Technique):
    """Read critical blocks exactly, the rest through pooled attention (Rectified SpaAttn, arXiv 2511.19835; causal form)."""

    name: ClassVar[str] = "rectified"
    title: ClassVar[str] = "Rectified sparse prefill"
    paper: ClassVar[Paper] = Paper(
        "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation", "2511.19835", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("select", "combine")
    help: ClassVar[str] = (
        "A sparse softmax makes two mistakes: what it reads weighs too much, and what it skips counts nothing. Here mean "
        "queries, keys and values of each block estimate the whole picture. Read blocks are scaled down to their true "
        "share (IPAR), and skipped blocks whose mean is trustworthy add their mean value (GAPR)."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "Every key and value stays stored; generated tokens read everything."

    share: float = param(0.6, "Share of the pooled attention that must be read exactly (rho).", min=0.01, max=1)
    block: int = param(32, "Tokens per block; the paper uses 128.", choices=(8, 16, 32, 64, 128), unit="tokens")
    least: int = param(1, "Blocks each block of rows reads at least.", min=1, max=1024, unit="blocks")
    rectify: bool = param(True, "Apply the two corrections; off shows plain block-sparse attention with the same blocks.")

    def select(self, ctx: LayerContext) -> Rows | None:
        store = ctx.store
        if ctx.pos_q is not None or store.valid() is not None or store.base or ctx.q.shape[2] < 2 or ctx.window:
            return None
        plan = self._plan(ctx)
        ctx.shared[self.name] = plan
        critical = plan["critical"].unflatten(1, (ctx.kv_heads, ctx.groups))
        column, lead = torch.arange(store.longest, device=critical.device) // self.block, ctx.first % self.block

        def keep(r0: int, r1: int) -> torch.Tensor:
            row = (torch.arange(r0, r1, device=critical.device) + lead) // self.block
            return critical[:, :, :, row][..., column]

        return Rows(keep)

    def combine(self, ctx: LayerContext, out: torch.Tensor, exact: Callable) -> torch.Tensor:
        plan = ctx.shared.pop(self.name, None)
        if plan is None or not self.rectify:
            return out
        row = (torch.arange(out.shape[2], device=out.device) + ctx.first % self.block) // self.block
        p = plan["p"] * plan["rectified"]
        kept = (1 - p.sum(-1))[:, :, row].unsqueeze(-1)  # R_i: critical blocks and those whose mean is not trusted
        pooled = p.unflatten(1, (ctx.kv_heads, ctx.groups)) @ plan["v"].float().unsqueeze(2)
        return (out.float() * kept + pooled.flatten(1, 2)[:, :, row]).to(out.dtype)

    def _plan(self, ctx: LayerContext) -> dict[str, torch.Tensor]:
        """Pooled attention p [B,Hq,Tb,Nb], critical and rectified blocks bool of that shape, mean values [B,Hk,Nb,d]."""
        lead, groups = ctx.first % self.block, ctx.groups
        q, q_dev = means(ctx.q, self.block, lead)
        keys, values = ctx.store.all_keys(), ctx.store.all_values()
        k, k_dev = means(keys, self.block)
        v, _ = means(values, self.block)
        q, q_dev = (x.unflatten(1, (ctx.kv_heads, groups)) for x in (q, q_dev))
        k, k_dev = k.unsqueeze(2), k_dev.unsqueeze(2)
        s = (q @ k.mT).flatten(1, 2)
        row = torch.arange(s.shape[2], device=s.device)[:, None] + ctx.first // self.block
        column = torch.arange(s.shape[3], device=s.device)
        p = (s * ctx.scale).masked_fill(column > row, -torch.inf).softmax(-1)
        order = p.argsort(dim=-1, descending=True, stable=True)[..., : self.least]
        critical = smallest_sets(p, self.share).scatter_(-1, order, True) | (column == row)
        doubt = (q_dev @ k.mT).flatten(1, 2).abs() + (q @ k_dev.mT).flatten(1, 2).abs()
        rectified = ~critical & (s.abs() > doubt) & (column < row)
        return {"p": p, "critical": critical & (column <= row), "rectified": rectified, "v": v}


def means(x: torch.Tensor, block: int, lead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, mean absolute deviation) float32 [B, H, blocks, d] of x [B, H, T, d], whose first row stands `lead` rows
    into its block."""
    n = x.shape[2]
    pad = (0, 0, lead, -(lead + n) % block)
    inside = torch.nn.functional.pad(torch.ones(n, 1, device=x.device), pad).unflatten(0, (-1, block))
    blocks = torch.nn.functional.pad(x.float(), pad).unflatten(2, (-1, block))
    count = inside.sum(-2).clamp_min(1)
    mean = blocks.sum(-2) / count
    return mean, ((blocks - mean.unsqueeze(-2)).abs() * inside).sum(-2) / count
