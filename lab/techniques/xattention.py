"""XAttention: sums along antidiagonals say which blocks matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.select.sets import smallest_sets
from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class XAttention(Technique):
    """Rank blocks of a prompt by sampled antidiagonals and read the best until tau of the mass (arXiv 2503.16428)."""

    name: ClassVar[str] = "xattention"
    title: ClassVar[str] = "XAttention prefill"
    paper: ClassVar[Paper] = Paper("XAttention: Block Sparse Attention with Antidiagonal Scoring", "2503.16428", 2025)
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "Cuts the attention of a prompt into square blocks and guesses each block's weight from a sample of its cells: "
        "those on antidiagonals, which cross every column and every diagonal of the block. Each block of rows then reads the "
        "fewest blocks that hold tau of the guessed weight. Short prompts gain nothing. Generated tokens read everything."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "Every key and value stays stored, and guessing itself costs 1/stride of dense attention."

    tau: float = param(0.9, "Share of the guessed attention that the blocks read must hold.", min=0.01, max=1)
    stride: int = param(8, "One antidiagonal in `stride` is sampled.", choices=(2, 4, 8, 16), unit="tokens")
    block: int = param(32, "Side of a block; the paper uses 128.", choices=(16, 32, 64, 128), unit="tokens")

    def select(self, ctx: LayerContext) -> Rows | None:
        store = ctx.store
        if ctx.pos_q is not None or store.valid() is not None or store.base or ctx.q.shape[2] < 2 or self.tau == 1:
            return None
        chosen, lead = self.chosen(ctx)
        blocks = chosen.unflatten(1, (ctx.kv_heads, ctx.groups))
        column = torch.arange(store.longest, device=blocks.device) // self.block

        def keep(r0: int, r1: int) -> torch.Tensor:
            row = (torch.arange(r0, r1, device=blocks.device) + lead) // self.block
            return blocks[:, :, :, row][..., column]

        keys = store.exact_k.decode()
        return Rows(keep, probe=keys.numel() * keys.element_size(), blocks=(chosen, self.block))

    def chosen(self, ctx: LayerContext) -> tuple[torch.Tensor, int]:
        """(blocks bool [B, Hq, Tb, Nb] to read, rows that precede this call in the first block)."""
        mass, lead = self.block_mass(ctx)
        first = ctx.first // self.block
        diagonal = torch.arange(mass.shape[2], device=mass.device) + first
        keep = smallest_sets(mass, self.tau)
        keep.scatter_(3, diagonal[:, None].expand(*mass.shape[:3], 1), True)
        keep[..., 0] = True
        return keep, lead

    def block_mass(self, ctx: LayerContext) -> tuple[torch.Tensor, int]:
        """Guessed attention of each block, float32 [B, Hq, Tb, Nb], rows summing to the stripes of a block."""
        lead = ctx.first % self.block
        s = antidiagonals(ctx.q, ctx.store.all_keys(), self.stride, lead) * (ctx.scale / self.stride)
        rows, columns = (torch.arange(n, device=s.device) for n in s.shape[-2:])
        hidden = columns > rows[:, None] + (ctx.first - lead) // self.stride
        per = self.block // self.stride
        p = s.masked_fill(hidden, -torch.inf).softmax(-1)
        p = torch.nn.functional.pad(p, (0, -p.shape[3] % per, 0, -p.shape[2] % per))
        return p.unflatten(3, (-1, per)).sum(-1).unflatten(2, (-1, per)).sum(3), lead


def antidiagonals(q: torch.Tensor, keys: torch.Tensor, stride: int, lead: int = 0) -> torch.Tensor:
    """Sums of q_i.k_j over the cells of each stride x stride square with (i mod stride) + (j mod stride) = stride - 1.

    q [B,Hq,T,d], keys [B,Hk,N,d] -> float32 [B, Hq, ceil((lead+T)/stride), ceil(N/stride)]; missing rows count as 0.
    """
    kv, groups = keys.shape[1], q.shape[1] // keys.shape[1]
    pad = torch.nn.functional.pad
    q = pad(q, (0, 0, lead, -(lead + q.shape[2]) % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    keys = pad(keys, (0, 0, 0, -keys.shape[2] % stride)).unflatten(2, (-1, stride)).flatten(3)
    stripes = q.unflatten(1, (kv, groups)).flatten(2, 3) @ keys.to(q.dtype).mT
    return stripes.float().unflatten(2, (groups, -1)).flatten(1, 2)
