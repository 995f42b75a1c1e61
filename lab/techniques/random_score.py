"""Random eviction: the control every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param

_MASK = (1 << 31) - 1


@dataclass(frozen=True)
class RandomScore(Technique):
    """A fixed random score per layer, head and position, drawn from the run's seed."""

    name: ClassVar[str] = "random_score"
    title: ClassVar[str] = "Random eviction"
    paper: ClassVar[Paper] = Paper("Random eviction (control)", "baseline", 2023)
    slots: ClassVar[tuple[str, ...]] = ("score",)
    help: ClassVar[str] = (
        "Drops stored tokens at random, keeping only the first few and the recent ones. It is here to keep the others "
        "honest: a clever score is worth something only where it beats this at the same budget. Change the seed to see how "
        "much of a result is luck."
    )
    does_not_save: ClassVar[str] = "The prompt itself is still read with full attention."
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    sinks: int = param(4, "First tokens that always stay: without them every eviction fails for another reason.",
                       min=0, max=1024, unit="tokens")
    window: int = param(32, "Most recent tokens that always stay.", min=0, max=4096, unit="tokens")

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return self.sinks, self.window

    def score(self, ctx: LayerContext) -> torch.Tensor:
        pos = ctx.positions()
        head = torch.arange(ctx.kv_heads, device=pos.device).view(1, -1, 1)
        return mixed(pos + 1, head + 1, ctx.layer + 1, ctx.seed + 1)


def mixed(pos: torch.Tensor, head: torch.Tensor, layer: int, seed: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but their arguments: the same on every device and chunking."""
    x = (pos * 73_856_093 + head * 19_349_663 + layer * 83_492_791 + seed * 49_979_693) & _MASK
    for factor in (48_271, 69_621, 39_373):
        x = ((x ^ (x >> 13)) * factor) & _MASK
    x = x ^ (x >> 15)
    return x.float() / (_MASK + 1)
