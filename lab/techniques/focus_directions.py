"""Focus directions: a fixed shift of queries and keys that wakes the heads which gate how much is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.cpu_attention import softmax
from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.techniques.zerotuning import span


@dataclass(frozen=True)
class FocusDirections(Technique):
    """Add learnt directions to q and k of contextual heads, or raise a span's attention directly (arXiv 2503.23306)."""

    name: ClassVar[str] = "focus_directions"
    title: ClassVar[str] = "Focus directions"
    paper: ClassVar[Paper] = Paper(
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts", "2503.23306", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("edit", "weigh", "calibrate")
    help: ClassVar[str] = (
        "A few heads decide how much of the context is read at all. For those heads a direction was learnt that, added to "
        "queries and keys, moves attention from the sink onto relevant text; alpha sets how far, and negative alpha "
        "distracts. The oracle mode instead raises the attention on a span that you name, to see what perfect focus buys."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = (
        "It steers the model; memory and reading stay the same. A large alpha drains the sink and spoils the "
        "text."
    )
    moves: ClassVar[bool] = True

    mode: str = param(
        "directions", "directions: the learnt shift. oracle: split-softmax on the span.",
        choices=("directions", "oracle")
    )
    alpha: float = param(0.3, "How far queries and keys move along the learnt directions.", min=-1, max=1)
    tau: float = param(0.5, "Oracle: the span's attention share becomes its tau-th power; 1 changes nothing.", min=0.01, max=1)
    relevant: str = param("none", "Oracle: positions of the relevant text, such as 120-180.")
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    def validate(self) -> None:
        if self.mode == "oracle" and self.relevant == "none":
            raise LabError("focus_directions: the oracle needs the relevant positions", "relevant is a range",
                           "Write relevant=120-180")
        if self.relevant != "none":
            span(self.name, "relevant", self.relevant, "-")

    @property
    def learns(self) -> bool:
        return self.mode == "directions" and self.alpha != 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rope"}) if self.learns else frozenset()

    def move(
        self, ctx: LayerContext, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.learns:
            return q, k, v
        learnt = ctx.learnt(self)
        rows = q.shape[2]
        pos = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.first + rows, device=q.device)[None]
        pos = pos.clamp_min(0).unsqueeze(1)
        moved = []
        for x, name in ((q, "query"), (k, "key")):
            direction = learnt[name][ctx.layer].to(x)[None, :, None].expand(x.shape[0], -1, rows, -1)
            moved.append(x + self.alpha * ctx.rope.rotate(direction, pos))
        return moved[0], moved[1], v

    def weighs(self, ctx: LayerContext) -> bool:
        return self.mode == "oracle" and self.tau < 1

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        p, lse = softmax(s)
        first, last = span(self.name, "relevant", self.relevant, "-")
        inside = (place.pos >= first) & (place.pos <= last)
        return Weighed(split_softmax(p, inside[:, :, None, None], self.tau), lse)


def split_softmax(p: torch.Tensor, inside: torch.Tensor, tau: float) -> torch.Tensor:
    """Weights whose share on `inside` is raised to its tau-th power, the rest rescaled; rows keep their sum."""
    share = (p * inside).sum(-1, keepdim=True).clamp(0, 1)
    wanted = share.pow(tau)
    both = (share > 1e-12) & (share < 1 - 1e-7)
    gain = torch.where(inside, wanted / share.clamp_min(1e-12), (1 - wanted) / (1 - share).clamp_min(1e-7))
    return torch.where(both, p * gain, p)
