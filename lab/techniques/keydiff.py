"""KeyDiff: keep keys that differ from the common key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class KeyDiff(Technique):
    """Score entries by how little their key points along the mean direction of all keys (arXiv 2504.15364)."""

    name: ClassVar[str] = "keydiff"
    title: ClassVar[str] = "KeyDiff"
    paper: ClassVar[Paper] = Paper(
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference", "2504.15364", 2025
    )
    slots: ClassVar[tuple[str, ...]] = ("score",)
    help: ClassVar[str] = (
        "Many keys point in nearly the same direction. KeyDiff drops those first and keeps the ones that stand out, without "
        "looking at attention. With `block` a long prompt is already thinned out while it is read, so memory never exceeds "
        "the budget plus one block. Standing out is not the same as being useful: the recent window is protected."
    )
    does_not_save: ClassVar[str] = "Without `block` the whole prompt is held once before it is compressed."
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    window: int = param(32, "Most recent tokens that always stay.", min=0, max=4096, unit="tokens")
    block: int = param(0, "Feed the prompt in blocks of this many tokens and evict after each (the paper: 128); 0 evicts once.",
                       min=0, max=8192, unit="tokens")

    @property
    def prompt_block(self) -> int:
        return self.block

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, self.window

    def score(self, ctx: LayerContext) -> torch.Tensor:
        unit = torch.nn.functional.normalize(ctx.store.all_keys().float(), dim=-1)
        valid = ctx.store.valid()
        anchor = (unit if valid is None else unit * valid.unsqueeze(-1)).sum(2, keepdim=True)
        return -(unit * torch.nn.functional.normalize(anchor, dim=-1)).sum(-1)
