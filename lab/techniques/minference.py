"""MInference: every head reads a long prompt along the pattern that suits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar

import torch

from kernels.prefill.rectify import pool
from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param
from lab.techniques.vertical_slash import VerticalSlash, top

BLOCK = 32  # side of the blocks of the third pattern; the paper uses 64
PATTERNS = {  # what a row reads of its b entries: shares of sinks and window, of columns and diagonals, or whole blocks
    "a_shape": ("band", 0.02), "sinks": ("band", 0.5), "columns": ("lines", 0.75), "lines": ("lines", 0.5),
    "diagonals": ("lines", 0.25), "blocks": ("blocks", 1.0),
}
SHARES = (0.125, 0.25, 0.5)
Keep = Callable[[int, int], torch.Tensor]  # (first row, end) of this call -> bool broadcastable to [B, Hk, G, R, N]


@dataclass(frozen=True)
class MInference(Technique):
    """Per head one of A-shape, vertical-slash or top blocks, found offline at equal work (arXiv 2407.02490)."""

    name: ClassVar[str] = "minference"
    title: ClassVar[str] = "MInference patterns"
    paper: ClassVar[Paper] = Paper(
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", "2407.02490", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select", "calibrate")
    help: ClassVar[str] = (
        "Heads differ: some look at the first and the latest tokens, some along a few columns and diagonals, some at scattered "
        "blocks. Calibration gave each head the pattern whose output came closest to full attention for the same number of "
        "entries read; where its lines and blocks lie is found anew for each prompt. Or put all heads on one pattern to see "
        "why the choice matters. Generated tokens read everything."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "Every key and value stays stored; padded prompts and layers with a sliding window read all they can."
    )

    share: float = param(0.25, "Entries a row reads, as a share of the prompt.", choices=(*SHARES, 1.0))
    pattern: str = param("learnt", "The pattern of all heads, or learnt: each head's own.", choices=("learnt", *PATTERNS))
    window: int = param(64, "How many of the last prompt rows are asked where the lines are.", min=1, max=1024, unit="rows")
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.pattern == "learnt" and self.share < 1

    def select(self, ctx: LayerContext) -> Rows | None:
        store = ctx.store
        plain = ctx.pos_q is None and store.valid() is None and not store.base and not ctx.window
        if self.share == 1 or not plain or ctx.q.shape[2] < 2:
            return None
        chosen = self.chosen(ctx)
        kept = keeps(ctx, self.share, [p for i, p in enumerate(PATTERNS) if bool((chosen == i).any())], self.window)
        flags = {list(PATTERNS).index(p): keep for p, keep in kept.items()}

        def keep(r0: int, r1: int) -> torch.Tensor:
            out = None
            for index, of in flags.items():
                mine = (chosen == index).view(1, ctx.kv_heads, ctx.groups, 1, 1) & of(r0, r1)
                out = mine if out is None else out | mine
            return out

        return Rows(keep)

    def chosen(self, ctx: LayerContext) -> torch.Tensor:
        """int64 [Hq]: each head's pattern in this layer, by its place in PATTERNS."""
        if not self.learns:
            return torch.full((ctx.heads,), list(PATTERNS).index(self.pattern), device=ctx.q.device)
        return ctx.learnt(self)[f"pattern_{round(1000 * self.share)}"][ctx.layer].to(ctx.q.device)


def keeps(ctx: LayerContext, share: float, patterns: list[str], window: int) -> dict[str, Keep]:
    """For each pattern, what the rows of this call read of share * prompt entries each; all start at position 0."""
    entries = max(BLOCK, round(share * max(ctx.prompt, ctx.store.longest)))
    j = torch.arange(ctx.store.longest, device=ctx.q.device)

    def rows(r0: int, r1: int) -> torch.Tensor:
        return torch.arange(ctx.first + r0, ctx.first + r1, device=j.device)[:, None]

    def band(sinks: int) -> Keep:
        return lambda r0, r1: ((j < sinks) | (rows(r0, r1) - j < entries - sinks))[None, None, None]

    def lines(columns: int) -> Keep:
        found = VerticalSlash(vertical=float(max(2, columns)), slash=float(max(2, entries - columns)), window=window).lines(ctx)
        straight, slanted = (x.unflatten(1, (ctx.kv_heads, ctx.groups)) for x in found)
        return lambda r0, r1: straight[..., None, :] | slanted[..., (rows(r0, r1) - j).clamp(0, slanted.shape[-1] - 1)]

    def blocks(count: int) -> Keep:
        chosen, lead = top_blocks(ctx, count), ctx.first % BLOCK
        return lambda r0, r1: chosen[:, :, :, (torch.arange(r0, r1, device=j.device) + lead) // BLOCK][..., j // BLOCK]

    make = {"band": lambda part: band(max(4, round(part * entries))), "lines": lambda part: lines(round(part * entries)),
            "blocks": lambda part: blocks(max(2, round(entries / BLOCK)))}
    return {p: make[PATTERNS[p][0]](PATTERNS[p][1]) for p in patterns}


def top_blocks(ctx: LayerContext, count: int) -> torch.Tensor:
    """bool [B, Hk, G, Tb, Nb]: for each block of rows the `count` blocks whose mean key its mean query likes best, block 0 and
    its own among them."""
    q, _ = pool(ctx.q, BLOCK, ctx.first % BLOCK)
    k, _ = pool(ctx.store.all_keys(), BLOCK)
    s = q.unflatten(1, (ctx.kv_heads, ctx.groups)) @ k.unsqueeze(2).mT
    row = torch.arange(s.shape[3], device=s.device)[:, None] + ctx.first // BLOCK
    column = torch.arange(s.shape[4], device=s.device)
    s = s.masked_fill(column > row, -torch.inf).masked_fill((column == row) | (column == 0), torch.inf)
    return top(s, min(count, s.shape[4])) & (column <= row)
