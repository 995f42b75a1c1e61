"""SF-Attn: shifted groups with global sinks, a training pattern shown as a prefill mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class SFAttn(Technique):
    """Grouped attention, a quarter of the heads shifted by half a group, sinks for all (SinkLoRA, arXiv 2406.05678)."""

    name: ClassVar[str] = "sf_attn"
    title: ClassVar[str] = "SF-Attn prefill"
    paper: ClassVar[Paper] = Paper(
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", "2406.05678", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "A pattern made for cheap fine-tuning at long context: tokens attend inside their group, some heads use groups "
        "shifted by half so that neighbours meet, and all may read the first tokens. Put on a model that was not tuned "
        "with it, it loses quality: a study of what the pattern can and cannot see, not a way to save."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = "Every key and value stays stored; generated tokens read everything, as in the paper."

    group: float = param(
        0.25, "Group length: a fraction up to 1 of the prompt, or a number of tokens above 1.",
        min=0.001, max=1_000_000
    )
    shifted: float = param(0.25, "Share of the heads that use shifted groups (LongLoRA's S2-Attn: 0.5).", min=0, max=1)
    sinks: int = param(4, "First tokens every row may read (S2-Attn: 0).", min=0, max=1024, unit="tokens")

    def select(self, ctx: LayerContext) -> Rows | None:
        size = max(1, round(self.group * ctx.prompt)) if self.group <= 1 else int(self.group)
        if size >= ctx.prompt:
            return None
        shift = torch.zeros(ctx.heads, dtype=torch.long)
        shift[ctx.heads - round(self.shifted * ctx.heads) :] = size // 2
        shift = shift.view(1, ctx.kv_heads, ctx.groups, 1, 1).to(ctx.q.device)
        j = ctx.positions()[:, :, None, None, :]
        pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=j.device)[None]

        def keep(r0: int, r1: int) -> torch.Tensor:
            i = pos_q[:, None, None, r0:r1, None]
            return (j < self.sinks) | ((i + shift) // size == (j + shift) // size)

        return Rows(keep)
