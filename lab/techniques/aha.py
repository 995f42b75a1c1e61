"""All-or-Here: per token and head, the whole context or only the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Pick, Rows
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class AHA(Technique):
    """A learnt gate on each query chooses full attention or the last tokens (arXiv 2512.22562; gate on q)."""

    name: ClassVar[str] = "aha"
    title: ClassVar[str] = "All-or-Here"
    paper: ClassVar[Paper] = Paper("Learning When Not to Attend Globally", "2512.22562", 2025)
    slots: ClassVar[tuple[str, ...]] = ("select", "calibrate")
    help: ClassVar[str] = (
        "For every token, each head asks a tiny gate: do I need the whole text, or is what is here enough? Closed gates "
        "read only the last tokens. The paper trains gates with the model; here only the gates are fitted, on the model's "
        "own outputs with and without the window. On the default model a quarter of them close beyond 256 tokens, which costs "
        "0.02 nat where closing all costs 0.75; bias moves that trade."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "The cache stays full, because the next token may want all of it. A KV head is read if any query of its group "
        "asks."
    )
    select_phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    window: int = param(256, "Recent tokens a closed gate reads.", min=1, max=65536, unit="tokens")
    bias: float = param(0.0, "Added to every gate: higher opens more.", min=-1000, max=1000)
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return True

    def select(self, ctx: LayerContext) -> Pick | Rows | None:
        store = ctx.store
        if store.longest <= self.window:
            return None
        open_ = self.gates(ctx) > 0
        pos = store.positions()
        if ctx.phase == "decode":
            recent = pos > ctx.newest - self.window
            here = recent.repeat_interleave(ctx.groups, 1)
            return Pick(keep=open_ | here)
        pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=pos.device)[None]
        wide = open_.unflatten(1, (ctx.kv_heads, ctx.groups)).unsqueeze(-1)
        j = pos[:, :, None, None, :]
        return Rows(lambda r0, r1: wide[:, :, :, r0:r1] | (pos_q[:, None, None, r0:r1, None] - j < self.window))

    def gates(self, ctx: LayerContext) -> torch.Tensor:
        """Gate logits float32 [B, Hq, T] ([B, Hq, 1] in decode); open above 0."""
        learnt = ctx.learnt(self)
        weight, offset = learnt["weight"][ctx.layer].to(ctx.q.device), learnt["bias"][ctx.layer].to(ctx.q.device)
        return (ctx.q.float() * weight[None, :, None]).sum(-1) + offset[None, :, None] + self.bias
