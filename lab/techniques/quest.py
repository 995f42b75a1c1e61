"""Quest: pages whose bound says they could matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Paging, Pick
from lab.engine.slots import Paper, Technique, param
from lab.techniques.pages import READ_HELP, best, page_count, slots_of, tables


@dataclass(frozen=True)
class Quest(Technique):
    """Read the pages with the largest upper bound of q.k, from per-channel minima and maxima (arXiv 2406.10774)."""

    name: ClassVar[str] = "quest"
    title: ClassVar[str] = "Quest"
    paper: ClassVar[Paper] = Paper("Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", "2406.10774", 2024)
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "Groups stored tokens into pages and remembers the smallest and largest value of every key channel in a page. "
        "From these two vectors alone follows the highest score any token of the page could get, so each new token reads "
        "only the most promising pages. Nothing is forgotten: another query may choose other pages."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "All keys and values stay stored, and the bounds come on top. Loose bounds on large pages waste "
        "reads."
    )
    select_phases: ClassVar[tuple[str, ...]] = ("decode",)

    budget: float = param(0.25, READ_HELP + " The paper reads 1024 tokens.", min=0.001, max=1_000_000)
    page: int = param(16, "Tokens per page. One token per page is exact top-k.", min=1, max=256, unit="tokens")
    dense_layers: int = param(
        2, "First layers that read everything, because their attention is spread out.",
        min=0, max=128, unit="layers"
    )

    @property
    def label(self) -> str:
        return f"Quest {self.budget:g}"

    def select(self, ctx: LayerContext) -> Pick | None:
        store = ctx.store
        longest, shortest = store.longest, min(store.counts)
        pages = -(-longest // self.page)
        count = page_count(self.budget, longest, self.page) + 1  # the last page is always read
        if ctx.layer < self.dense_layers or count >= pages:
            return None
        bounds = tables(ctx, self.name, self.page, extremes)
        scores = upper_bound(ctx.q[:, :, 0].unflatten(1, (ctx.kv_heads, ctx.groups)), bounds["low"], bounds["high"]).amax(2)
        last = (torch.tensor(store.counts, device=scores.device).view(store.batch, store.heads, 1) - 1) // self.page
        scores = scores.masked_fill(torch.arange(pages, device=scores.device) > last, -torch.inf).scatter(2, last, torch.inf)
        index, used = slots_of(best(scores, count), self.page, longest)
        if shortest < longest:
            used = used & (index < torch.tensor(store.counts, device=index.device).view(store.batch, store.heads, 1))
        return Pick(index, used, probe=sum(t.numel() * t.element_size() for t in bounds.values()))

    @property
    def pages_in_place(self) -> bool:
        return True

    def paging(self, layer: int) -> Paging | None:
        if layer < self.dense_layers:
            return None
        fields = (f"{self.name}/low", f"{self.name}/high")
        return Paging(self.page, "bounds", fields, lambda n: page_count(self.budget, n, self.page), whole=True)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        pages = -(-entries // self.page)
        count = page_count(self.budget, entries, self.page) + 1
        dense = (count >= pages) | (layer < self.dense_layers)
        read = (count - 1) * self.page + entries - (pages - 1) * self.page
        return 2 * pages * (1 - dense), entries * dense + read * (1 - dense)

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        pages = -(-entries // self.page)
        if layer < self.dense_layers or page_count(self.budget, entries, self.page) + 1 >= pages:
            return 0
        return 2 * pages * head_dim * element


def extremes(keys: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-channel minima and maxima of each page: keys [..., page, d], inside [..., page]."""
    out, empty = ~inside.unsqueeze(-1), ~inside.any(-1, keepdim=True)
    low, high = keys.masked_fill(out, torch.inf).amin(-2), keys.masked_fill(out, -torch.inf).amax(-2)
    return {"low": low.masked_fill(empty, 0), "high": high.masked_fill(empty, 0)}


def upper_bound(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The largest q.k any key within [low, high] can have (I9): q [B,Hk,G,d], low, high [B,Hk,P,d] -> [B,Hk,G,P]."""
    return q.clamp_min(0) @ high.to(q.dtype).mT + q.clamp_max(0) @ low.to(q.dtype).mT
