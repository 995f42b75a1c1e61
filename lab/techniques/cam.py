"""CaM: values that leave are folded into the entries after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine import tiers
from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.shares import packed

ROWS = 256  # evicted entries folded at once: bounds memory


@dataclass(frozen=True)
class CaM(Technique):
    """Add an evicted entry's value to the next kept ones, with a probability from its attention (ICML 2024)."""

    name: ClassVar[str] = "cam"
    title: ClassVar[str] = "CaM merging"
    paper: ClassVar[Paper] = Paper("CaM: Cache Merging for Memory-efficient LLMs Inference", "ICML 2024", 2024)
    slots: ClassVar[tuple[str, ...]] = ("reduce",)
    help: ClassVar[str] = (
        "Instead of losing an evicted token's value, CaM adds it to the kept tokens that follow, split evenly among them. "
        "It does so with a probability that grows with the attention the token used to get. Keys stay as they are. Values "
        "grow with every merge: when most of a prompt is cut at once they grow several times over and the model breaks (on "
        "the default model it does). It was made for one eviction per step."
    )
    does_not_save: ClassVar[str] = "It changes what eviction loses, not how much memory it frees; attention sums must be kept."
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    targets: int = param(32, "Kept entries after the evicted one that share its value.", min=1, max=1024, unit="entries")
    expected: bool = param(False, "Scale by the probability instead of drawing at random.")

    def reduce(self, ctx: LayerContext, keep: torch.Tensor, scores: torch.Tensor | None) -> None:
        store = ctx.store
        valid = store.valid()
        pos = ctx.positions() if valid is None else ctx.positions().masked_fill(~valid, torch.iinfo(torch.int64).max)
        values = store.all_values().float()
        gone = ~keep if valid is None else ~keep & valid
        told: list = []
        added, changed = self.gifts(values, ctx.mass(), pos, keep, gone, self._generator(ctx), told)
        if store.history is not None:
            for slots, first, given, count in told:
                store.history.joined(pos.gather(2, slots), pos.gather(2, first), given, count)
        tiers.replace(store, "value", changed, values + added)

    def gifts(
        self, values: torch.Tensor, mass: torch.Tensor, pos: torch.Tensor, keep: torch.Tensor, gone: torch.Tensor,
        generator: torch.Generator | None = None, told: list | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what each entry's value gains [B,Hk,N,d], which entries gain bool [B,Hk,N]).

        mass, pos, keep, gone [B,Hk,N] in storage order, which need not be the order of positions. To `told` are added
        (slots that leave, the first slot that each gave to, whether it gave, to how many it gave) [B,Hk,E].
        """
        order = pos.argsort(dim=-1)
        kept = keep.gather(2, order)
        stay, _ = packed(kept)
        leave, real = packed(gone.gather(2, order))
        total = kept.sum(-1, keepdim=True)
        rank = kept.cumsum(-1).gather(2, leave)  # kept entries before each evicted one
        stay, leave = order.gather(2, stay), order.gather(2, leave)
        added, gains = torch.zeros_like(values), torch.zeros(keep.shape, device=keep.device)
        draw = torch.rand(leave.shape, generator=generator).to(values.device)
        for r0 in range(0, leave.shape[-1], ROWS):
            part = slice(r0, r0 + ROWS)
            number = rank[:, :, part, None] + torch.arange(self.targets, device=values.device)
            inside = (number < total.unsqueeze(-1)) & real[:, :, part, None]
            target = stay.gather(2, number.clamp_max(stay.shape[-1] - 1).flatten(2))  # [B,Hk,E*m]
            count = inside.sum(-1).clamp_min(1)
            mean = (mass.gather(2, target).view(inside.shape) * inside).sum(-1) / count
            chance = (mass.gather(2, leave[:, :, part]) / mean.clamp_min(1e-12)).clamp(0, 1)
            factor = chance if self.expected else (draw[:, :, part] < chance).float()
            share = (factor / count).unsqueeze(-1) * inside  # [B,Hk,E,m]
            source = leave[:, :, part, None].expand(-1, -1, -1, values.shape[-1])
            gift = (share.unsqueeze(-1) * values.gather(2, source).unsqueeze(3)).flatten(2, 3)
            added.scatter_add_(2, target.unsqueeze(-1).expand_as(gift), gift)
            gains.scatter_add_(2, target, share.flatten(2))
            if told is not None:
                told.append((leave[:, :, part], target.view(inside.shape)[..., 0], share[..., 0] > 0, count))
        return added, gains > 0

    def _generator(self, ctx: LayerContext) -> torch.Generator:
        return torch.Generator().manual_seed((ctx.seed * 1_000_003 + ctx.row) * 1009 + ctx.layer)
