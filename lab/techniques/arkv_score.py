"""ARKV's score: how much the last rows look at an entry, and how much that varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param
from lab.techniques.snapkv import pooled


@dataclass(frozen=True)
class ArkvScore(Technique):
    """Mean plus gamma times variance of the attention of the last rows, pooled over neighbours (arXiv 2603.08727)."""

    name: ClassVar[str] = "arkv_score"
    title: ClassVar[str] = "ARKV score"
    paper: ClassVar[Paper] = Paper("ARKV: Adaptive and Resource-Efficient KV Cache Management", "2603.08727", 2026)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "Looks at the last prompt rows like SnapKV, and adds a bonus for entries that only some of these rows look at. While "
        "tokens are generated there is only the newest row to ask, so the bonus vanishes and the score gets noisy. The bonus "
        "multiplies very small variances by a large number, which works where it was tuned."
    )
    does_not_save: ClassVar[str] = "Every step needs the attention weights, so fused attention without weights cannot be used."
    needs: ClassVar[frozenset[str]] = frozenset({"now"})
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP + " The paper uses 512 to 2048 entries.", min=0.001, max=1_000_000)
    window: int = param(32, "Last rows that are asked; they always stay.", min=1, max=1024, unit="tokens")
    gamma: float = param(200.0, "Weight of the variance (263.8 in the paper's tuned setting).", min=0, max=100_000)
    kernel: int = param(5, "Width of the pooling over neighbouring positions (odd).", min=1, max=63)

    @property
    def observation_window(self) -> int:
        return self.window

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, self.window

    def score(self, ctx: LayerContext) -> torch.Tensor:
        if ctx.phase == "prefill":
            weights = ctx.window_weights(self.window)[0]
            raw = ctx.per_kv_head(weights.mean(2) + self.gamma * weights.var(2, correction=0))
        else:
            raw = ctx.now / ctx.groups
        valid = ctx.store.valid()
        pos = ctx.positions() if valid is None else ctx.positions().masked_fill(~valid, torch.iinfo(torch.int64).max)
        order = pos.argsort(dim=-1)  # neighbours in the text, wherever they are stored
        return torch.zeros_like(raw).scatter(2, order, pooled(raw.gather(2, order), self.kernel))
