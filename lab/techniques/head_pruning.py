"""Head pruning: switch query heads off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.zerotuning import picked, span


@dataclass(frozen=True)
class HeadPruning(Technique):
    """Multiply the outputs of chosen query heads by zero before the output projection (arXiv 1905.10650)."""

    name: ClassVar[str] = "head_pruning"
    title: ClassVar[str] = "Head pruning"
    paper: ClassVar[Paper] = Paper("Are Sixteen Heads Really Better than One?", "1905.10650", 2019)
    slots: ClassVar[tuple[str, ...]] = ("route", "calibrate")
    help: ClassVar[str] = (
        "Switches query heads off and shows what the model loses without them. Name heads yourself, or give a share to switch "
        "off: the least important by calibration, or random ones as a control. Many heads turn out to be dispensable."
    )
    saves: ClassVar[str] = "nothing"
    fixed_gate: ClassVar[bool] = True
    does_not_save: ClassVar[str] = "Keys and values stay stored, and the heads are still computed before their output is closed."

    heads: str = param("none", "Query heads to switch off in the chosen layers: none, or numbers joined by ; such as 0;3.")
    layers: str = param("all", "Layers it acts on: all, or a range such as 8-20.")
    fraction: float = param(0.0, "Share of all heads to switch off, in the order below; 0 uses the list only.", min=0, max=1)
    order: str = param("random", "Which heads go first: random ones (a control), those with the smallest gradient importance, or "
                       "those whose removal costs least by itself.", choices=("random", "gradient", "ablation"))
    unit: str = param("heads", "Count single heads, or groups that share a key and value head, by the sum of their heads: only "
                      "without a whole group would its keys and values be dispensable.", choices=("heads", "groups"))
    calibration: str = param("auto", "Calibration file for gradient and ablation; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.fraction > 0 and self.order != "random"

    def validate(self) -> None:
        span(self.name, "layers", self.layers, "-")
        if self.heads != "none":
            picked(self.name, "heads", self.heads)

    def route(self, ctx: LayerContext) -> torch.Tensor | None:
        chosen = span(self.name, "layers", self.layers, "-")
        if chosen and not chosen[0] <= ctx.layer <= chosen[1]:
            return None
        key = ("head_pruning", ctx.layer)
        if key not in ctx.shared:
            ctx.shared[key] = self._gate(ctx)
        return ctx.shared[key]

    def _gate(self, ctx: LayerContext) -> torch.Tensor | None:
        gate = torch.ones(ctx.heads)
        if self.heads != "none":
            listed = picked(self.name, "heads", self.heads)
            gate[[h for h in listed if h < ctx.heads] if listed is not None else slice(None)] = 0
        if self.fraction:
            generator = torch.Generator().manual_seed(1000 * ctx.seed + 7)
            draw = ctx.learnt(self)[self.order] if self.learns else torch.rand(ctx.layers, ctx.heads, generator=generator)
            size = ctx.groups if self.unit == "groups" else 1
            draw = draw.unflatten(1, (-1, size)).sum(-1)
            count = round(self.fraction * draw.numel())
            if count:
                gate[(draw[ctx.layer] <= draw.flatten().sort().values[count - 1]).repeat_interleave(size)] = 0
        return None if bool(gate.all()) else gate.view(1, -1, 1, 1).to(ctx.q.device)
