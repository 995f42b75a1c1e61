"""Block top-k: pages by their mean key, with an oracle and two controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lab.engine.context import LayerContext
from lab.engine.reads import Paging, Pick
from lab.engine.slots import Paper, Technique, param
from lab.techniques.pages import READ_HELP, best, page_count, slots_of, tables
from lab.techniques.random_score import mixed

MOST = 4099  # a prime step between the draws of two rows, so that neighbouring steps do not repeat each other's pages


@dataclass(frozen=True)
class BlockTopK(Technique):
    """Read sinks, a local window, and the pages whose mean key the group's mean query likes best (arXiv 2506.05333)."""

    name: ClassVar[str] = "block_topk"
    title: ClassVar[str] = "Block top-k"
    paper: ClassVar[Paper] = Paper("Kinetics: Rethinking Test-Time Scaling Laws", "2506.05333", 2025)
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = (
        "Each page of stored tokens is represented by the mean of its keys; a new token reads the pages whose mean fits "
        "it best, besides the first and the latest tokens. A single important token can vanish in its page's mean. The "
        "controls show what ranking is worth: the oracle picks single tokens by their true scores, random picks other pages "
        "at every step without looking, local picks none."
    )
    saves: ClassVar[str] = "reads less, stores the same"
    does_not_save: ClassVar[str] = (
        "All keys and values stay stored, and page means come on top. The oracle reads every key to "
        "choose."
    )
    select_phases: ClassVar[tuple[str, ...]] = ("decode",)

    budget: float = param(0.25, READ_HELP + " The paper reads 64 pages.", min=0.001, max=1_000_000)
    page: int = param(16, "Tokens per page.", min=1, max=256, unit="tokens")
    sinks: int = param(4, "First tokens that are always read.", min=0, max=1024, unit="tokens")
    local: int = param(
        64, "Recent tokens that are always read (a little more, so that pages stay whole).",
        min=1, max=65536, unit="tokens"
    )
    mode: str = param("centroid", "How pages are chosen: by mean key, by true token scores (oracle), blindly anew at each step "
                      "(random), or not at all (local).", choices=("centroid", "oracle", "random", "local"))

    def select(self, ctx: LayerContext) -> Pick | None:
        store = ctx.store
        entries = min(store.counts)
        middle = max(0, entries - self.sinks - self.local) // self.page  # whole pages between sinks and local
        count = page_count(self.budget, store.longest, self.page)
        if middle <= count:
            return None
        fixed = torch.cat([torch.arange(self.sinks), torch.arange(self.sinks + middle * self.page, store.longest)])
        fixed = fixed.to(store.device).expand(store.batch, store.heads, -1)
        q = ctx.q[:, :, 0].unflatten(1, (ctx.kv_heads, ctx.groups)).mean(2, keepdim=True)
        if self.mode == "local":
            index, probe = fixed, 0
        elif self.mode == "random":
            heads = torch.arange(1, ctx.kv_heads + 1, device=store.device).view(1, -1, 1).expand(store.batch, -1, 1)
            scores = mixed(torch.arange(1, middle + 1, device=store.device) + MOST * ctx.row, heads, ctx.layer + 1, ctx.seed + 1)
            chosen, _ = slots_of(best(scores, count), self.page, store.longest, self.sinks)
            index, probe = torch.cat([chosen, fixed], 2).sort(-1).values, 0
        elif self.mode == "oracle":
            keys = store.all_keys()[:, :, self.sinks : self.sinks + middle * self.page]
            scores = (q @ keys.to(q.dtype).mT).squeeze(2)
            index = torch.cat([best(scores, count * self.page) + self.sinks, fixed], 2).sort(-1).values
            probe = keys.numel() * keys.element_size()
        else:
            means = tables(ctx, self.name, self.page, centroids, self.sinks)["mean"][:, :, :middle]
            scores = (q @ means.to(q.dtype).mT).squeeze(2)
            chosen, _ = slots_of(best(scores, count), self.page, store.longest, self.sinks)
            index, probe = torch.cat([chosen, fixed], 2).sort(-1).values, means.numel() * means.element_size()
        used = None
        if entries < store.longest:
            used = index < torch.tensor(store.counts, device=index.device).view(store.batch, store.heads, 1)
        return Pick(index, used, probe=probe)

    @property
    def pages_in_place(self) -> bool:
        return self.mode == "centroid"

    def paging(self, layer: int) -> Paging | None:
        count = lambda n: page_count(self.budget, n, self.page)  # noqa: E731
        return Paging(self.page, "mean", (f"{self.name}/mean",), count, self.sinks, self.local)

    def planned_read(self, entries: Any, layer: int, layers: int) -> tuple[Any, Any]:
        middle = np.maximum(0, entries - self.sinks - self.local) // self.page
        count = page_count(self.budget, entries, self.page)
        dense = (middle <= count).astype(int) if isinstance(entries, np.ndarray) else int(middle <= count)
        chosen = count * self.page if self.mode != "local" else 0
        read = entries - middle * self.page + chosen
        probe = {"centroid": middle, "oracle": middle * self.page}.get(self.mode, 0 * middle)
        return probe * (1 - dense), entries * dense + read * (1 - dense)

    def table_bytes(self, entries: int, head_dim: int, element: int, layer: int, layers: int, groups: int) -> int:
        middle = max(0, entries - self.sinks - self.local) // self.page
        if self.mode != "centroid" or middle <= page_count(self.budget, entries, self.page):
            return 0
        return -(-(entries - self.sinks) // self.page) * head_dim * element


def centroids(keys: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean key of each page: keys [..., page, d], inside [..., page]."""
    weight = inside.to(keys.dtype).unsqueeze(-1)
    return {"mean": (keys * weight).sum(-2) / weight.sum(-2).clamp_min(1)}
