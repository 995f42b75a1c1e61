"""Attention reuse: skip attention on some steps and use the last output again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class AttentionReuse(Technique):
    """Recompute a layer's attention every r steps only (PAB, arXiv 2408.12588; LiteVAR, 2411.17178; text form)."""

    name: ClassVar[str] = "attention_reuse"
    title: ClassVar[str] = "Attention reuse"
    paper: ClassVar[Paper] = Paper("Real-Time Video Generation with Pyramid Attention Broadcast", "2408.12588", 2024)
    slots: ClassVar[tuple[str, ...]] = ("route", "calibrate")
    help: ClassVar[str] = (
        "In video diffusion attention outputs barely change between steps, so they are broadcast to the next ones. Text "
        "asks a new question at every token, so reuse damages it: a negative control. Keys and values are still stored at "
        "every step, and skipped steps read nothing."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "All keys and values stay stored, and quality suffers."

    every: int = param(2, "Recompute every this many steps.", min=1, max=64, unit="steps")
    exact_first: int = param(2, "First generated tokens that are computed exactly.", min=0, max=1000, unit="steps")
    paced: bool = param(False, "Let calibration set the pace by layer: 1, 2, 4 or 6 steps, the steadiest layers the slowest.")
    calibration: str = param("auto", "Calibration file for paced; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.paced

    def pace(self, ctx: LayerContext) -> int:
        return int(ctx.learnt(self)["every"][ctx.layer]) if self.paced else self.every

    def replace(self, ctx: LayerContext) -> torch.Tensor | None:
        if ctx.phase == "prefill":
            ctx.state["reuse/step"] = 0
            return None
        step = ctx.state.get("reuse/step", 0)
        ctx.state["reuse/step"] = step + 1
        last = ctx.state.get("reuse/out")
        if last is None or step < self.exact_first or (step - self.exact_first) % self.pace(ctx) == 0:
            return None
        return last

    def remember(self, ctx: LayerContext, out: torch.Tensor) -> None:
        ctx.state["reuse/out"] = out[:, :, -1:].detach().clone()

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        """The mean over steps."""
        return 0 * entries, entries if self.paced else entries / self.every

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return groups * head_dim * element
