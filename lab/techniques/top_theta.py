"""Top-theta: a calibrated threshold per head instead of a top-k search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Paper, Technique, param
from lab.engine.sparse import fetch

SIZES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class TopTheta(Technique):
    """Keep scores above a threshold learnt per layer, head and row length, and compensate the rest (arXiv 2502.08363)."""

    name: ClassVar[str] = "top_theta"
    title: ClassVar[str] = "Top-theta"
    paper: ClassVar[Paper] = Paper(
        "Top-Theta Attention: Sparsifying Transformers by Compensated Thresholding", "2502.08363", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("select", "weigh", "calibrate")
    help: ClassVar[str] = (
        "Keeping each row's k best tokens needs a search over the row. Top-theta learns beforehand, for every head and row "
        "length, above which score the best k usually lie, and then compares against that number. SDC puts the weight of the "
        "skipped tokens back into the denominator, and VMC adds the mean value in their place."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "All keys are read, only values are skipped, and those a group of heads shares only if none wants "
        "them."
    )
    select_phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    version: ClassVar[int] = 2

    k: int = param(128, "Tokens a row should keep.", choices=SIZES, unit="tokens")
    first_k: int = param(512, "Tokens kept in the first two layers, which attend widely.", choices=SIZES, unit="tokens")
    on: str = param("scores", "What is compared with the threshold: scores before the softmax, or weights after it.",
                    choices=("scores", "weights"))
    sigma: float = param(0.1, "Standard deviations added to the learnt threshold.", min=-10, max=10)
    sdc: str = param("exact", "What stands for the skipped tokens in the denominator: nothing, their exact sum, as many tokens "
                     "at the threshold, or the mean seen when calibrating.", choices=("none", "exact", "threshold", "learnt"))
    vmc: bool = param(True, "Add the mean value for the weight that is missing from a row.")
    cap: int = param(0, "Keep at most this many survivors, the latest; 0 for no cap.", min=0, max=65536, unit="tokens")
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return True

    def keeps(self, layer: int) -> int:
        return self.first_k if layer < 2 else self.k

    def select(self, ctx: LayerContext) -> None:
        """Nothing is excluded before scoring; the running mean of values, which VMC needs, is brought up to date."""
        if not self.vmc:
            return None
        store, rows = ctx.store, ctx.q.shape[2]
        lens = torch.tensor(store.counts, device=store.device).view(store.batch, store.heads, 1)
        newest = lens - rows + torch.arange(rows, device=store.device)
        values = fetch(store, "value", newest.clamp_min(0)).float() * (newest >= 0).unsqueeze(-1)
        total = values.cumsum(2)
        if "top_theta/sum" in ctx.state:
            total = total + ctx.state["top_theta/sum"]
        ctx.state["top_theta/sum"] = total[:, :, -1:].clone()
        seen = torch.arange(ctx.first, ctx.first + rows, device=total.device)[None] if ctx.pos_q is None else ctx.pos_q
        count = (seen + 1).clamp_min(1)[:, None, :, None]
        ctx.shared["top_theta/means"] = total / count
        return None

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        k, seen = self.keeps(ctx.layer), s > -torch.inf
        count = seen.sum(-1, keepdim=True)
        learnt = ctx.learnt(self)
        which = SIZES.index(k)
        nearest = (learnt["lengths"][which].to(s.device) - count.unsqueeze(-1)).abs().argmin(-1)  # [B,Hk,G,R,1]
        names = ("theta", "std") if self.on == "scores" else ("weight", "weight_std")
        theta = self._lookup(ctx, learnt[names[0]][which] + self.sigma * learnt[names[1]][which], nearest)
        if self.on == "weights":  # p > w is s > ln(w) + lse
            theta = theta.clamp_min(0).log() + s.logsumexp(-1, keepdim=True)
        top = s.amax(-1, keepdim=True)
        keep = (s > theta) | (s == top) | (count <= k)
        if self.cap:
            keep &= (keep.flip(-1).cumsum(-1).flip(-1) <= self.cap) | (count <= k)
        keep &= seen
        e = torch.exp(s - torch.where(top == -torch.inf, 0, top)).masked_fill(~seen, 0)
        kept = (e * keep).sum(-1, keepdim=True)
        dropped = (count - keep.sum(-1, keepdim=True)).clamp_min(0)
        if self.sdc == "exact":
            missing = e.sum(-1, keepdim=True) - kept
        elif self.sdc == "threshold":
            missing = dropped * torch.exp((theta - top).clamp_max(0))
        elif self.sdc == "learnt":
            missing = self._lookup(ctx, learnt["missing"][which], nearest) * (dropped > 0)
        else:
            missing = torch.zeros_like(kept)
        p = e * keep / (kept + missing).clamp_min(1e-30)
        extra = None
        if self.vmc:
            rest = (1 - p.sum(-1, keepdim=True)).clamp_min(0) * (count > 0)
            mean = ctx.shared["top_theta/means"][:, :, place.row : place.row + s.shape[3]]
            extra = (rest * mean.unsqueeze(2)).to(ctx.q.dtype)
        lse = torch.log((kept + missing).squeeze(-1)) + top.squeeze(-1)
        return Weighed(p, lse, extra, sparse=True)

    def _lookup(self, ctx: LayerContext, table: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """table [L, Hq, bins] at this layer's heads and row lengths, [B, Hk, G, R, 1]."""
        own = table[ctx.layer].to(nearest.device).view(1, ctx.kv_heads, ctx.groups, 1, -1)
        return own.expand(*nearest.shape[:4], -1).gather(-1, nearest)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        """All keys, and at best k values: how far a group's heads agree is not known beforehand."""
        return 0 * entries, (entries + np.minimum(entries, self.keeps(layer))) / 2

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 4 * head_dim if self.vmc else 0
