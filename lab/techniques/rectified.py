"""Rectified sparse attention: block-sparse prefill whose missing blocks are replaced by their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar

import torch

from kernels.prefill import rectify
from lab.engine.context import LayerContext
from lab.engine.reads import Pick, Rows
from lab.engine.slots import Paper, Technique, param
from lab.techniques.pages import tables


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
        "share (IPAR), and skipped blocks whose mean is trustworthy add their mean value (GAPR). Generated tokens read "
        "everything unless decode is on."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "Every key and value stays stored; with decode on, mean keys and values of all blocks come on top."
    )
    combine_phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    share: float = param(0.6, "Share of the pooled attention that must be read exactly (rho).", min=0.01, max=1)
    block: int = param(32, "Tokens per block; the paper uses 128.", choices=(8, 16, 32, 64, 128), unit="tokens")
    least: int = param(1, "Blocks each block of rows reads at least.", min=1, max=1024, unit="blocks")
    rectify: bool = param(True, "Apply the two corrections; off shows plain block-sparse attention with the same blocks.")
    decode: bool = param(False, "Read generated tokens' attention in the same way: their own query against the blocks' means.")
    jensen: bool = param(False, "Guess a block's share by its length and the spread of its keys too: a mean alone is too low.")

    @property
    def select_phases(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.decode else ("prefill",)

    def select(self, ctx: LayerContext) -> Pick | Rows | None:
        store = ctx.store
        if ctx.phase == "decode":
            return self._pick(ctx)
        if ctx.pos_q is not None or store.valid() is not None or store.base or ctx.q.shape[2] < 2 or ctx.window:
            return None
        plan = self._plan(ctx)
        ctx.shared[self.name] = plan
        blocks = (plan["critical"], self.block)
        critical = plan["critical"].unflatten(1, (ctx.kv_heads, ctx.groups))
        column, lead = torch.arange(store.longest, device=critical.device) // self.block, ctx.first % self.block

        def keep(r0: int, r1: int) -> torch.Tensor:
            row = (torch.arange(r0, r1, device=critical.device) + lead) // self.block
            return critical[:, :, :, row][..., column]

        return Rows(keep, blocks=blocks)

    def combine(self, ctx: LayerContext, out: torch.Tensor, exact: Callable) -> torch.Tensor:
        plan = ctx.shared.pop(self.name, None)
        if plan is None or not self.rectify:
            return out
        lead = 0 if ctx.phase == "decode" else ctx.first % self.block
        return rectify.correct(out, rectify.Plan(**plan), self.block, lead)

    def _pick(self, ctx: LayerContext) -> Pick | None:
        """What a generated token reads: its critical blocks, by its own query against the pages' means."""
        store = ctx.store
        if store.valid() is not None or ctx.window:
            return None
        keys = tables(ctx, self.name, self.block, moments)
        values = tables(
            ctx, f"{self.name}/values", self.block, lambda x, inside: {"mean": moments(x, inside)["mean"]}, side="value"
        )
        counts = torch.tensor(store.counts, device=store.device).view(store.batch, store.heads, 1, 1)
        page = torch.arange(keys["mean"].shape[2], device=store.device)
        size = (counts - page * self.block).clamp(0, self.block)
        k, dev = keys["mean"].float().unsqueeze(2), keys["deviation"].float().unsqueeze(2)
        q = ctx.q.unflatten(1, (ctx.kv_heads, ctx.groups)).float()  # [B, Hk, G, 1, d]
        doubt = (q @ dev.mT).abs()  # a single query deviates from nothing
        own = page == (counts.unsqueeze(2) - 1) // self.block
        plan = self._weigh(ctx, q, k, dev, size.unsqueeze(2), doubt, (size > 0).unsqueeze(2), own)
        ctx.shared[self.name] = {**plan, "v": values["mean"]}
        keep = plan["critical"][:, :, 0].repeat_interleave(self.block, -1)[..., : store.longest]
        tables_read = (*keys.values(), *values.values())
        return Pick(keep=keep, probe=sum(t.numel() * t.element_size() for t in tables_read))

    def _weigh(self, ctx: LayerContext, q, k, dev, size, doubt, seen, own) -> dict[str, torch.Tensor]:
        """Pooled attention p, critical and rectified blocks of queries q [B,Hk,G,T,d] over block means k, their deviations dev
        [B,Hk,1,N,d]; size, seen and own broadcast to [B,Hk,G,T,N]: tokens of a block, whether it may be read, and must be."""
        found = rectify.weigh(
            q, k, dev, size, doubt, seen, own, scale=ctx.scale, share=self.share, least=self.least, jensen=self.jensen
        )
        return dict(zip(("p", "critical", "rectified"), found))

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 3 * -(-entries // self.block) * head_dim * element if self.decode else 0

    def _plan(self, ctx: LayerContext) -> dict[str, torch.Tensor]:
        """Pooled attention p [B,Hq,Tb,Nb], critical and rectified blocks bool of that shape, mean values [B,Hk,Nb,d]."""
        return vars(rectify.plan(
            ctx.q, ctx.store.all_keys(), ctx.store.all_values(), ctx.scale, block=self.block, share=self.share, least=self.least,
            jensen=self.jensen, start=ctx.first,
        ))


def moments(x: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and mean absolute deviation of pages x [..., page, d], of which `inside` [..., page] are there; in x's own type."""
    weight = inside.unsqueeze(-1).float()
    count = weight.sum(-2).clamp_min(1)
    mean = (x.float() * weight).sum(-2) / count
    deviation = ((x.float() - mean.unsqueeze(-2)).abs() * weight).sum(-2) / count
    return {"mean": mean.to(x.dtype), "deviation": deviation.to(x.dtype)}
