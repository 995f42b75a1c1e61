"""TOVA: drop what the newest token ignores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class Tova(Technique):
    """Score entries by the newest row's attention, averaged over all heads of the layer (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"
    title: ClassVar[str] = "TOVA"
    paper: ClassVar[Paper] = Paper("Transformers are Multi-State RNNs", "2401.06104", 2024)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "Asks only the newest token which stored tokens it looks at, and drops the one it ignores most. Nothing is "
        "protected: even the first token goes if it is ignored. All heads of a layer keep the same tokens. One row is a "
        "noisy witness, so a token that is needed later may be gone."
    )
    does_not_save: ClassVar[str] = "Every step needs the attention weights, so fused attention without weights cannot be used."
    needs: ClassVar[frozenset[str]] = frozenset({"now"})
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    newest: bool = param(False, "Always keep the newest token, whatever it thinks of itself.")

    @property
    def observation_window(self) -> int:
        return 1

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, int(self.newest)

    def score(self, ctx: LayerContext) -> torch.Tensor:
        if ctx.phase == "prefill":
            mean = ctx.per_kv_head(ctx.window_weights(1)[0].squeeze(2))
        else:
            mean = ctx.now / ctx.groups
        if isinstance(ctx.store.budget, torch.Tensor):  # heads keep different entries, so they cannot vote together
            return mean
        return mean.mean(1, keepdim=True).expand(-1, ctx.kv_heads, -1)
