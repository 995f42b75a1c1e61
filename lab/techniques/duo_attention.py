"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Rows
from lab.engine.slots import UNLIMITED, Paper, Technique, param


@dataclass(frozen=True)
class DuoAttention(Technique):
    """Split KV heads into retrieval and streaming heads by learnt gates or a quick score (arXiv 2410.10819)."""

    name: ClassVar[str] = "duo_attention"
    title: ClassVar[str] = "DuoAttention"
    paper: ClassVar[Paper] = Paper(
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", "2410.10819", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("select", "score", "allocate", "calibrate")
    help: ClassVar[str] = (
        "Only some heads fetch facts from far back; the others live on the first and the latest tokens. Gates learnt on "
        "texts with a hidden passkey tell them apart. Streaming heads then really forget the middle, retrieval heads keep "
        "all. The split is fixed, so a text that needs another head suffers. With half of the default model's "
        "heads streaming over 8 + 48 tokens, the trained split answered 8 of 8 unseen passkeys, the quick score 4."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = "Retrieval heads keep everything, so the cache still grows with the text."
    evicts_in_decode: ClassVar[bool] = True

    fraction: float = param(0.5, "Share of all KV heads that stream; 0 changes nothing.", min=0, max=1)
    sinks: int = param(64, "First tokens streaming heads keep.", min=0, max=1024, unit="tokens")
    window: int = param(256, "Recent tokens streaming heads keep.", min=1, max=65536, unit="tokens")
    gates: str = param("trained", "How heads are told apart: gates trained on passkeys, or the quick score from mean query "
                       "and key.", choices=("trained", "quick"))
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.fraction > 0

    def streaming(self, ctx: LayerContext) -> torch.Tensor:
        """bool [Hk]: this layer's streaming heads, those whose gate lies in the lowest `fraction` of all."""
        if self.fraction == 0:
            return torch.zeros(ctx.kv_heads, dtype=torch.bool)
        return lowest(ctx.learnt(self)[self.gates], self.fraction)[ctx.layer]

    def select(self, ctx: LayerContext) -> Rows | None:
        """Prompt rows of streaming heads read what those heads will keep."""
        streams = self.streaming(ctx).to(ctx.q.device)
        if not bool(streams.any()) or ctx.store.longest <= self.sinks + self.window:
            return None
        j = ctx.positions()[:, :, None, None, :]
        pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=j.device)[None]
        full = (~streams).view(1, -1, 1, 1, 1)
        return Rows(lambda r0, r1: full | (j < self.sinks) | (pos_q[:, None, None, r0:r1, None] - j < self.window))

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return ctx.positions().float()

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return self.sinks, 1

    def budget_entries(self, prompt: int) -> int | None:
        size = self.sinks + self.window
        return None if self.fraction == 0 else max(size, round(self.fraction * size + (1 - self.fraction) * max(prompt, size)))

    def allocate(self, ctx: LayerContext, total: int, scores: torch.Tensor | None) -> torch.Tensor:
        size = torch.where(self.streaming(ctx), self.sinks + self.window, UNLIMITED)
        return size.to(ctx.q.device).expand(ctx.store.batch, -1)

    def planned_lanes(self, total: int, prompt: int, layer: int, layers: int, kv_heads: int) -> list[int]:
        """As if streaming heads were spread evenly over the layers; which they are is known only with the gates."""
        streams = round(self.fraction * kv_heads * (layer + 1)) - round(self.fraction * kv_heads * layer)
        return [self.sinks + self.window] * streams + [UNLIMITED] * (kv_heads - streams)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        return 0 * entries, entries


def lowest(gates: torch.Tensor, fraction: float) -> torch.Tensor:
    """bool like gates [L, Hk]: the `fraction` of all heads with the smallest gates; of equals the earlier ones."""
    order = gates.flatten().argsort(stable=True)[: round(fraction * gates.numel())]
    return torch.zeros(gates.numel(), dtype=torch.bool).scatter_(0, order, True).view_as(gates)
