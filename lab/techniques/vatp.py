"""VATP: attention times the size of the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Paper, Technique, param


@dataclass(frozen=True)
class Vatp(Technique):
    """Importance = attention received x L1 norm of the value (arXiv 2406.12335)."""

    name: ClassVar[str] = "vatp"
    title: ClassVar[str] = "VATP"
    paper: ClassVar[Paper] = Paper(
        "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters",
        "2406.12335", 2024
    )
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "A token matters when it is looked at and when it has something to say: attention times the size of its value. "
        "Mode h2o sums the attention of all rows, mode scissorhands averages the last 400 and acts once, after the prompt. "
        "Attention sinks have tiny values and would be dropped, so the first tokens are always kept."
    )
    does_not_save: ClassVar[str] = (
        "It needs attention weights; with `wo` it also multiplies every value by the output projection."
    )

    budget: float = param(0.5, BUDGET_HELP, min=0.001, max=1_000_000)
    mode: str = param("h2o", "Which attention: accumulated over all rows, or the mean of the last rows of the prompt.",
                      choices=("h2o", "scissorhands"))
    recent: float = param(0.5, "Share of the budget for the most recent tokens (mode h2o).", min=0, max=1)
    first: int = param(20, "First tokens that always stay.", min=0, max=1024, unit="tokens")
    rows: int = param(400, "Last prompt rows averaged in mode scissorhands, which protects the last 10 tokens.",
                      min=1, max=4096, unit="tokens")
    wo: bool = param(False, "Measure the value after the head's output projection (CriticalKV, arXiv 2502.03805).")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mass"}) if self.mode == "h2o" else frozenset()

    @property
    def evicts_in_decode(self) -> bool:
        return self.mode == "h2o"

    @property
    def observation_window(self) -> int:
        return self.rows if self.mode == "scissorhands" else 0

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        first = min(self.first, max(0, entries - 1))
        last = 10 if self.mode == "scissorhands" else max(1, round(self.recent * entries))
        return first, max(1, min(last, entries - first))

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        return 4 * entries if self.wo else 0

    def observe(self, ctx: LayerContext) -> None:
        """With `wo`, measure each value once, when it arrives: the projection is too dear to repeat every step."""
        if not self.wo:
            return
        store, fresh = ctx.store, ctx.q.shape[2]
        size = store.attribute("value_size").clone()
        if ctx.phase == "prefill":
            size[:, :, -fresh:] = self._projected(ctx, store.exact_v.rows.padded("x")[:, :, -fresh:])
        else:
            last = torch.tensor(store.counts, device=size.device).view(store.batch, store.heads, 1) - 1
            rows = store.exact_v.rows
            place = rows.lens_tensor(size.device).unsqueeze(-1) - 1
            v = rows.padded("x")
            newest = v.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, v.shape[-1]))
            size.scatter_(2, last, self._projected(ctx, newest))
        store.set_attribute("value_size", size)

    def score(self, ctx: LayerContext) -> torch.Tensor:
        size = ctx.store.attribute("value_size") if self.wo else ctx.store.all_values().float().abs().sum(-1)
        if self.mode == "h2o":
            return ctx.mass() * size
        return ctx.per_kv_head(ctx.window_weights(self.rows)[0].mean(2)) * size

    def _projected(self, ctx: LayerContext, v: torch.Tensor) -> torch.Tensor:
        """Mean over the group's query heads of |W_o^h v| (L1), float32 [B,Hk,T]; v [B,Hk,T,d]."""
        weight = ctx.output_weight().to(v.device).unflatten(0, (ctx.kv_heads, ctx.groups, v.shape[-1]))
        size = sum((v.float() @ weight[:, g]).abs().sum(-1) for g in range(ctx.groups))
        return size / ctx.groups
