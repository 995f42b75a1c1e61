"""Mixture-of-Heads: each token uses some of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError


@dataclass(frozen=True)
class MoH(Technique):
    """Shared heads always, routed heads by the norm of their query (arXiv 2410.11842)."""

    name: ClassVar[str] = "moh"
    title: ClassVar[str] = "Mixture-of-Heads"
    paper: ClassVar[Paper] = Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842", 2024)
    slots: ClassVar[tuple[str, ...]] = ("route", "calibrate")
    help: ClassVar[str] = (
        "Half of the heads always work; of the others each token chooses those with the longest query, so that three "
        "quarters work in all. Models tuned this way even gain. This model was not tuned, so it degrades: a negative "
        "control that shows what the tuning has to repair."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = (
        "Simulated: every head is computed before its output is closed, and all keys and values stay "
        "stored."
    )

    active: float = param(0.75, "Share of all heads that work for each token.", min=0.01, max=1)
    shared: float = param(0.5, "Share of all heads that always work.", min=0, max=1)
    order: str = param("first", "Which heads are shared: the first, as in the paper, or the most important by calibration.",
                       choices=("first", "importance"))
    calibration: str = param("auto", "Calibration file for order=importance; auto uses the one shipped for this model.")

    def validate(self) -> None:
        if self.shared > self.active:
            raise LabError(f"moh: shared={self.shared:g} is more than active={self.active:g}",
                           "Shared heads are among the active ones")

    @property
    def learns(self) -> bool:
        return self.order == "importance"

    def route(self, ctx: LayerContext) -> torch.Tensor | None:
        shared, active = round(self.shared * ctx.heads), max(1, round(self.active * ctx.heads))
        if active >= ctx.heads:
            return None
        norms = ctx.q.float().norm(dim=-1)  # rotation keeps norms, so this is the norm before RoPE too
        if self.learns:
            first = ctx.learnt(self)["importance"][ctx.layer].argsort(descending=True, stable=True)[:shared]
        else:
            first = torch.arange(shared)
        norms[:, first.to(norms.device)] = torch.inf
        chosen = norms.argsort(dim=1, descending=True, stable=True)[:, :active]
        return torch.zeros_like(norms).scatter_(1, chosen, 1.0).unsqueeze(-1)
