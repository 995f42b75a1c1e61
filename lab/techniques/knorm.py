"""Key norm: keys with a small norm stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class KeyNorm(Technique):
    """Keep the entries whose keys have the smallest L2 norm (arXiv 2406.11430)."""

    name: ClassVar[str] = "knorm"
    title: ClassVar[str] = "Key norm"
    paper: ClassVar[Paper] = Paper("A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", "2406.11430", 2024)
    slots: ClassVar[tuple[str, ...]] = ("score",)
    help: ClassVar[str] = (
        "Keys with a small norm tend to receive much attention, so this keeps them and needs no attention weights at all: "
        "one number per key. It is the cheapest score and knows nothing about the question. The rule is an observation on "
        "some models; on others it fails, which comparing it with the random control shows."
    )
    does_not_save: ClassVar[str] = "The prompt itself is still read with full attention."
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    window: int = param(32, "Most recent tokens that always stay.", min=0, max=4096, unit="tokens")

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, self.window

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return -ctx.store.all_keys().float().norm(dim=-1)
