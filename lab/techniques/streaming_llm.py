"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Shift, Technique, Trailing, param


@dataclass(frozen=True)
class StreamingLLM(Technique):
    """Keep the first `sinks` entries and the most recent ones, during decoding too (arXiv 2309.17453)."""

    name: ClassVar[str] = "streaming_llm"
    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[Paper] = Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453", 2023)
    slots: ClassVar[tuple[str, ...]] = ("edit", "score", "reduce")
    help: ClassVar[str] = (
        "Keeps the first few tokens (attention sinks, where heads park unused attention) and the most recent ones, and "
        "forgets everything between. Memory stops growing, so text can go on forever, but nothing outside the window "
        "can be recalled."
    )
    does_not_save: ClassVar[str] = "The prompt itself is still read with full attention."
    evicts_in_decode: ClassVar[bool] = True
    scores_in_place: ClassVar[bool] = True
    oldest_leaves: ClassVar[bool] = True

    budget: float = param(0.25, BUDGET_HELP, min=0.001, max=1_000_000)
    sinks: int = param(4, "How many of the first tokens always stay.", min=0, max=1024, unit="tokens")
    renumber: bool = param(
        True, "Read the sinks as if they stood right before the window, so that distances never exceed the cache size."
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rope"}) if self.renumber and self.sinks else frozenset()

    @property
    def label(self) -> str:
        return f"sinks {self.sinks} + window"

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return self.sinks, 1

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """Later is better; the sinks are protected."""
        return ctx.positions().float()

    def standing_edit(self, ctx: LayerContext) -> list[Trailing]:
        return [Trailing(self.sinks)] if self.renumber and self.sinks else []

    def edit(self, ctx: LayerContext) -> list[Shift]:
        store = ctx.store
        if not self.renumber or ctx.phase != "decode" or store.budget is None or not self.sinks:
            return []
        # the gap: positions that fell out between the sinks and the window
        if ctx.pos_q is None and store.valid() is None:
            gap = ctx.row + 1 - store.longest
            return [Shift(self.sinks, gap)] if gap else []
        counts = torch.tensor(store.counts, device=store.device).view(store.batch, store.heads)
        newest = ctx.newest if isinstance(ctx.newest, int) else ctx.newest.squeeze(-1)
        return [Shift(self.sinks, newest + 1 - counts)]
