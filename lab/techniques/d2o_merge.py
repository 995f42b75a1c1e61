"""D2O merging: an evicted entry joins the kept one its key resembles, or is dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine import tiers
from lab.engine.context import LayerContext
from lab.engine.slots import EntryBias, Paper, Technique, param
from lab.techniques.shares import packed

ROWS = 512  # evicted entries compared at once: bounds the similarity matrix


@dataclass(frozen=True)
class D2OMerge(Technique):
    """Merge evicted entries into their most similar kept neighbour where similar enough (arXiv 2406.13035)."""

    name: ClassVar[str] = "d2o_merge"
    title: ClassVar[str] = "D2O merging"
    paper: ClassVar[Paper] = Paper(
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
        "2406.13035", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("edit", "reduce")
    help: ClassVar[str] = (
        "Each evicted token looks for the kept token whose key is most like its own. If they are similar enough, their "
        "values are averaged; if not, it is dropped. With `multiplicity` a merged entry counts for as many tokens as it "
        "holds, which is exact when their keys are equal. Facts that differ only a little are blended and lost."
    )
    does_not_save: ClassVar[str] = "It changes what eviction loses, not how much memory it frees."

    beta: float = param(0.7, "How quickly the similarity threshold follows the newest evictions.", min=0, max=1)
    threshold: float = param(0.0, "A fixed threshold on the cosine instead of the moving one; 0 lets it move, above 1 never "
                             "merges.", min=0, max=2)
    keys: bool = param(False, "Average keys too; keys at different positions are turned differently, so this blurs both.")
    multiplicity: bool = param(False, "Add the logarithm of the number of merged tokens to an entry's logit.")

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return (0 if self.threshold else 4) + (4 * entries if self.multiplicity else 0)

    def edit(self, ctx: LayerContext) -> list[EntryBias]:
        if not self.multiplicity or "merged" not in ctx.store.meta.fields:
            return []
        return [EntryBias(torch.log1p(ctx.store.attribute("merged")))]

    def reduce(self, ctx: LayerContext, keep: torch.Tensor, scores: torch.Tensor | None) -> None:
        store = ctx.store
        valid = store.valid()
        gone = ~keep if valid is None else ~keep & valid
        keys, values = store.all_keys().float(), store.all_values().float()
        slots, inside = packed(gone)
        best, where = self._nearest(keys, keep, slots)
        best = best.masked_fill(~inside, -torch.inf)
        weight = torch.where(best >= self._threshold(ctx, best, inside), best.exp(), 0.0) * inside
        if not bool((weight > 0).any()):
            return
        if store.history is not None:
            pos = ctx.positions()
            store.history.joined(pos.gather(2, slots), pos.gather(2, where), weight > 0)
        changed = torch.zeros(keep.shape, device=keep.device).scatter_add(2, where, weight).gt(0) & keep
        tiers.replace(store, "value", changed, merged(values, slots, where, weight))
        if self.keys:
            tiers.replace(store, "key", changed, merged(keys, slots, where, weight))
        if self.multiplicity:
            count = store.attribute("merged").clone()
            arriving = (count.gather(2, slots) + 1) * (weight > 0)
            store.set_attribute("merged", count.scatter_add(2, where, arriving))

    def _threshold(self, ctx: LayerContext, best: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """float32 [B,Hk,1]: the mean similarity the first time, then an exponential average of the largest."""
        if self.threshold:
            return torch.full_like(best[..., :1], self.threshold)
        had = ctx.state.get("d2o_threshold")
        if had is None:
            now = best.masked_fill(~inside, 0).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_min(1)
        else:
            top = best.amax(-1, keepdim=True)
            now = torch.where(top == -torch.inf, had, self.beta * top + (1 - self.beta) * had)
        ctx.state["d2o_threshold"] = now
        return now

    @staticmethod
    def _nearest(keys: torch.Tensor, keep: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosine, slot) of the most similar kept entry of each evicted one, [B,Hk,m]."""
        unit = torch.nn.functional.normalize(keys, dim=-1)
        stay, real = packed(keep)
        kept = unit.gather(2, stay.unsqueeze(-1).expand(*stay.shape, unit.shape[-1]))
        cosines, places = [], []
        for r0 in range(0, slots.shape[-1], ROWS):
            part = slots[:, :, r0 : r0 + ROWS]
            mine = unit.gather(2, part.unsqueeze(-1).expand(*part.shape, unit.shape[-1]))
            top, at = (mine @ kept.mT).masked_fill(~real.unsqueeze(2), -torch.inf).max(-1)
            cosines.append(top)
            places.append(stay.gather(2, at))
        return torch.cat(cosines, -1), torch.cat(places, -1)


def merged(x: torch.Tensor, slots: torch.Tensor, where: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B,Hk,N,d] with the entries at slots [B,Hk,m] averaged into those at `where`, weights e for an entry itself and
    `weight` [B,Hk,m] for each that joins it; the weights of an entry sum to 1."""
    wide = (*slots.shape, x.shape[-1])
    own = torch.full(x.shape[:3], math.e, device=x.device)
    total = own.scatter_add(2, where, weight)
    gift = x.gather(2, slots.unsqueeze(-1).expand(wide)) * weight.unsqueeze(-1)
    return (own.unsqueeze(-1) * x).scatter_add(2, where.unsqueeze(-1).expand(wide), gift) / total.unsqueeze(-1)
