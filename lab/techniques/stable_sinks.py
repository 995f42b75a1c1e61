"""Stable sinks: protect only positions that stay among the most attended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class StableSinks(Technique):
    """Keep a recent window and the positions that were among the top m in most rows (after arXiv 2602.17664)."""

    name: ClassVar[str] = "stable_sinks"
    title: ClassVar[str] = "Stable sinks"
    paper: ClassVar[Paper] = Paper("Sink-Aware Pruning for Diffusion Language Models", "2602.17664", 2026)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "In diffusion models sinks wander from step to step, so statistics should ignore the unstable ones. Here the idea "
        "meets a model that writes left to right: every row votes for its most attended tokens, and tokens elected by 80% "
        "of the rows stay beside the recent window. Such models' sinks hardly move, so expect no gain over StreamingLLM: "
        "a negative control that is informative."
    )
    does_not_save: ClassVar[str] = "Every step needs the attention weights, and the votes are stored with the entries."
    needs: ClassVar[frozenset[str]] = frozenset({"last"})
    evicts_in_decode: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    top: int = param(4, "Most attended tokens a row votes for.", min=1, max=64, unit="tokens")
    share: float = param(0.8, "Share of the rows whose vote makes a token stable.", min=0.01, max=1)
    window: int = param(32, "Last prompt rows that vote before generation starts.", min=1, max=1024, unit="rows")

    @property
    def observation_window(self) -> int:
        return self.window

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return 0, 1

    def observe(self, ctx: LayerContext) -> None:
        if ctx.phase == "decode" and ctx.last_p is not None:
            self._vote(ctx, ctx.last_p.unsqueeze(2))

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """Later is better; stable positions come before all others."""
        if ctx.phase == "prefill":
            self._vote(ctx, ctx.window_weights(self.window)[0])
        return ctx.positions().float() + stable(ctx.store.attribute("votes"), self._rows(ctx), self.share) * 1e9

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 4 * entries

    def _vote(self, ctx: LayerContext, p: torch.Tensor) -> None:
        got = ctx.per_kv_head(p)
        chosen = got.topk(min(self.top, got.shape[-1]), dim=-1).indices
        votes = torch.zeros_like(got).scatter_(-1, chosen, 1.0).sum(2)
        ctx.store.set_attribute("votes", ctx.store.attribute("votes") + votes)
        ctx.state["stable_sinks/rows"] = self._rows(ctx) + got.shape[2]

    def _rows(self, ctx: LayerContext) -> int:
        return ctx.state.get("stable_sinks/rows", 0)


def stable(votes: torch.Tensor, rows: int, share: float) -> torch.Tensor:
    """bool of the entries that `share` of the rows voted for."""
    return votes >= share * max(rows, 1)
