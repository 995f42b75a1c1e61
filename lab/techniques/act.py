"""ACT: take attention from later sinks and give it to ordinary tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.cpu_attention import softmax
from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Paper, Technique, param
from lab.techniques.zerotuning import picked

LEAST_ROWS = 32  # columns fewer rows have seen say nothing about being a sink


@dataclass(frozen=True)
class ACT(Technique):
    """Scale the weights of sinks beyond the first one by beta and share what is freed (arXiv 2406.15765)."""

    name: ClassVar[str] = "act"
    title: ClassVar[str] = "ACT"
    paper: ClassVar[Paper] = Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration", "2406.15765", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("weigh",)
    help: ClassVar[str] = (
        "Besides the first token, some later tokens attract attention from nearly every row without meaning much. ACT finds "
        "them by the mean attention a column gets, turns their weights down to beta, and shares the freed attention among "
        "the other tokens in proportion. The first sink stays as it is."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = "Every weight has to be computed, and the running column sums take memory."

    alpha: float = param(0.1, "A column is a sink when its mean attention is above this.", min=0.001, max=1)
    beta: float = param(0.4, "Factor on the weights of sinks.", min=0, max=1)
    heads: str = param("all", "Query heads it acts on: all, or numbers joined by ; such as 0;3;5.")

    def validate(self) -> None:
        picked(self.name, "heads", self.heads)

    def weighs(self, ctx: LayerContext) -> bool:
        return self.beta < 1 and acts(ctx.layer, ctx.layers)

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        p, lse = softmax(s)
        c = self._column_means(ctx, p, place)
        sinks = c > self.alpha
        sinks &= sinks.cumsum(-1) > 1  # the first one found stays
        heads = picked(self.name, "heads", self.heads)
        if heads is not None:
            chosen = torch.zeros(ctx.heads, dtype=torch.bool)
            chosen[[h for h in heads if h < ctx.heads]] = True
            sinks = sinks & chosen.view(1, ctx.kv_heads, ctx.groups, 1, 1).to(s.device)
        return Weighed(calibrated(p, sinks, self.beta), lse)

    def _column_means(self, ctx: LayerContext, p: torch.Tensor, place: Place) -> torch.Tensor:
        """Mean attention each column has had from the rows up to each row (causal prefix, I6), [B, Hk, G, R, n]."""
        size = ctx.row + 1 if ctx.pos_q is None else int(place.pos_q.max()) + 1
        size = max(size, int(place.pos.max()) + 1)
        before = ctx.state.get("act/sums")
        grown = p.new_zeros(*p.shape[:3], size)
        if before is not None:
            grown[..., : before.shape[-1]] = before[..., :size]
        at = place.pos[:, :, None].expand(*p.shape[:3], -1).clamp_min(0)
        prefix = grown.gather(3, at).unsqueeze(3) + p.cumsum(3)
        ctx.state["act/sums"] = grown.scatter(3, at, prefix[:, :, :, -1])
        rows = place.pos_q[:, None, None, :, None] - place.pos[:, :, None, None, :] + 1
        return (prefix / rows.clamp_min(1)).masked_fill(rows < LEAST_ROWS, 0)

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 4 * entries * groups if self.beta < 1 and acts(layer, layers) else 0


def acts(layer: int, layers: int) -> bool:
    """Layers 2 to L-2; of very small models all but the first."""
    return 2 <= layer <= layers - 2 if layers > 5 else layer > 0


def calibrated(p: torch.Tensor, sinks: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights p [..., n] with those of `sinks` times beta and the rest enlarged in proportion; rows still sum to one.

    A row all of whose weight lies on sinks stays as it is.
    """
    at = (p * sinks).sum(-1, keepdim=True)
    others = p.sum(-1, keepdim=True) - at
    possible = others > 1e-12
    gain = 1 + (1 - beta) * at / others.clamp_min(1e-12)
    return torch.where(possible, torch.where(sinks, beta * p, gain * p), p)
