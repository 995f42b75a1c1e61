"""SWAT: a sliding window with sigmoid weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Band, Paper, Technique, param


@dataclass(frozen=True)
class Swat(Technique):
    """Window, sigmoid weights and balanced ALiBi slopes (arXiv 2502.18845), and its parts as modes."""

    name: ClassVar[str] = "swat"
    title: ClassVar[str] = "SWAT"
    paper: ClassVar[Paper] = Paper("Sliding Window Attention Training for Efficient Large Language Models", "2502.18845", 2025)
    slots: ClassVar[tuple[str, ...]] = ("select", "edit", "weigh")
    help: ClassVar[str] = (
        "SWAT trains models whose tokens see only a window and weigh each token by a sigmoid, so no softmax forces "
        "attention onto a sink. A model trained with softmax is not made for it: `window` keeps the softmax and only cuts "
        "the view, `sigmoid` and `swat` are negative controls whose collapse shows how much the softmax was relied on."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "Entries outside the window stay stored here; combine with StreamingLLM to drop them."
    select_phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    mode: str = param("window", "window: window and softmax. sigmoid: full view, sigmoid with bias -ln n (control). "
                      "swat: window, sigmoid, slopes (control).", choices=("window", "sigmoid", "swat"))
    window: int = param(256, "Recent tokens a row may read.", min=1, max=65536, unit="tokens")
    slopes: bool = param(True, "swat mode: add distance slopes, falling for half of the heads and rising for the rest.")

    def select(self, ctx: LayerContext) -> Band | None:
        return None if self.mode == "sigmoid" else Band(0, self.window)

    def planned_band(self) -> Band | None:
        """What prompt rows will read, known before they are."""
        return self.select(None)

    def weighs(self, ctx: LayerContext) -> bool:
        return self.mode != "window"

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        seen = s > -torch.inf
        if self.mode == "sigmoid":
            s = s - torch.log(seen.sum(-1, keepdim=True).clamp_min(1).float())
        elif self.slopes:
            distance = place.pos_q[:, None, None, :, None] - place.pos[:, :, None, None, :]
            s = s - slopes(ctx.heads).to(s.device).view(1, ctx.kv_heads, ctx.groups, 1, 1) * distance
        return Weighed(torch.sigmoid(s).masked_fill(~seen, 0), torch.logsumexp(s, -1), softmax=False)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        return 0 * entries, entries if self.mode == "sigmoid" else np.minimum(entries, self.window)


def slopes(heads: int) -> torch.Tensor:
    """a_h float32 [heads]: 2^(-8r/(H/2)) for the first half of the heads, the same negated for the rest."""
    half = max(1, heads // 2)
    positive = torch.tensor([math.pow(2, -8 * r / half) for r in range(1, half + 1)])
    return torch.cat([positive, -positive])[:heads] if heads > 1 else positive
