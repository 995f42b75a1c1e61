"""Grouped-query conversion: let more query heads share one key and value head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError


@dataclass(frozen=True)
class GQAConversion(Technique):
    """Merge neighbouring or similar KV heads by their mean (GQA, arXiv 2305.13245; one head is MQA, 1911.02150)."""

    name: ClassVar[str] = "gqa_conversion"
    title: ClassVar[str] = "GQA conversion"
    paper: ClassVar[Paper] = Paper(
        "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", "2305.13245", 2023
    )
    slots: ClassVar[tuple[str, ...]] = ("edit", "calibrate")
    help: ClassVar[str] = (
        "Several KV heads become one, so the cache shrinks by that factor. Averaging the projections is where training of "
        "grouped-query models starts, and 5% more training repairs it. Without that training the loss is large: a negative "
        "control, not a setting to use. The model's weights are not touched; switching it off restores everything."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = "Quality: nothing was trained to make up for the merged heads."
    moves: ClassVar[bool] = True

    kv_heads: int = param(1, "KV heads that remain; a divisor of the model's own number.", min=1, max=256, unit="heads")
    method: str = param("mean", "What a group becomes: the mean of its heads, its first head, or a random one.",
                        choices=("mean", "first", "random"))
    grouping: str = param("neighbours", "Which heads merge: neighbours, or those whose keys were most alike on sample text.",
                          choices=("neighbours", "similar"))
    calibration: str = param("auto", "Calibration file for grouping=similar; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.grouping == "similar"

    @property
    def label(self) -> str:
        return f"{self.kv_heads} KV heads"

    def planned_heads(self, kv_heads: int) -> int:
        if kv_heads % self.kv_heads:
            raise LabError(
                f"gqa_conversion: {kv_heads} KV heads cannot become {self.kv_heads}",
                f"kv_heads is a divisor of {kv_heads}: {', '.join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)}",
            )
        return self.kv_heads

    def move(
        self, ctx: LayerContext, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projections are linear and rotation acts alike on all heads, so merging their outputs is merging the weights."""
        heads = k.shape[1]
        self.planned_heads(heads)
        size = heads // self.kv_heads
        if size == 1:
            return q, k, v
        order = self.order(ctx, heads)
        if order is not None:  # query heads follow their key head, and `settle` brings their outputs back
            order = order.to(q.device)
            q = q.unflatten(1, (heads, -1))[:, order].flatten(1, 2)
            k, v = k[:, order], v[:, order]
        return q, *(self._merge(ctx, x.unflatten(1, (self.kv_heads, size))) for x in (k, v))

    def order(self, ctx: LayerContext, heads: int) -> torch.Tensor | None:
        """int64 [heads]: the layer's KV heads with those that merge side by side; None as they stand."""
        if not self.learns or heads in (1, self.kv_heads):
            return None
        return alike(ctx.learnt(self)["similarity"][ctx.layer], heads // self.kv_heads)

    def settle(self, ctx: LayerContext, out: torch.Tensor) -> torch.Tensor:
        if not self.learns:
            return out
        heads = len(ctx.learnt(self)["similarity"][ctx.layer])
        order = self.order(ctx, heads)
        if order is None:
            return out
        return out.unflatten(1, (heads, -1))[:, order.argsort().to(out.device)].flatten(1, 2)

    def _merge(self, ctx: LayerContext, x: torch.Tensor) -> torch.Tensor:
        if self.method == "mean":
            return x.mean(2)
        if self.method == "first":
            return x[:, :, 0].contiguous()
        generator = torch.Generator().manual_seed(1000 * ctx.seed + ctx.layer)
        return x[:, :, int(torch.randint(x.shape[2], (1,), generator=generator))].contiguous()


def alike(similarity: torch.Tensor, size: int) -> torch.Tensor:
    """A permutation of the heads of similarity [H, H] whose runs of `size` are groups: greedily the most similar pair of what is
    left, joined by whoever is most similar to the group in the mean."""
    left, out = list(range(len(similarity))), []
    while left:
        pairs = [(float(similarity[a, b]), -a, -b) for i, a in enumerate(left) for b in left[i + 1 :]]
        group = [-x for x in max(pairs)[1:]] if size > 1 else left[:1]
        while len(group) < size:
            rest = [h for h in left if h not in group]
            group.append(max(rest, key=lambda h: (float(similarity[h, group].mean()), -h)))
        out += sorted(group)
        left = [h for h in left if h not in group]
    return torch.tensor(out)
