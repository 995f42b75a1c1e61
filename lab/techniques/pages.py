"""Pages: blocks of consecutive stored entries with a summary each, kept beside the cache by selecting techniques."""

from __future__ import annotations

import math
from typing import Any, Callable

import numpy as np
import torch

from lab.engine.context import LayerContext
from lab.engine.sparse import fetch

READ_HELP = (
    "How much each generated token reads: a fraction below 1 of what is stored, or a number of tokens above 1; 1 reads "
    "everything. Rounded up to whole pages."
)
Summary = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def page_count(budget: float, entries: Any, page: int) -> Any:
    """Pages that a read budget amounts to, for one number of entries or an array of them."""
    if budget == 1:
        return -(-entries // page)
    if isinstance(entries, (int, np.integer)):
        return min(-(-(math.ceil(budget * entries) if budget < 1 else int(budget)) // page), -(-entries // page))
    tokens = np.ceil(budget * entries) if budget < 1 else np.full(np.shape(entries), int(budget))
    return np.minimum(-(-tokens // page), -(-entries // page)).astype(int)


def tables(
    ctx: LayerContext, name: str, page: int, summary: Summary, skip: int = 0, side: str = "key"
) -> dict[str, torch.Tensor]:
    """Summaries of every page of the keys (or of side "value") stored in this layer, {field: [B, Hk, pages, d]}, kept in
    `ctx.state`.

    summary(keys [B,Hk,p,page,d], inside bool [B,Hk,p,page]) gives the fields. skip: entries before the first page. Only
    pages whose entries changed since the last step are read again; after an eviction all are.
    """
    store, state = ctx.store, ctx.state
    counts = store.counts
    coded = sum(s.rows.longest for s in store.coded_rows(side))
    total, lanes, known = sum(counts), len(counts), state.get(f"{name}/seen")
    at = 0
    if known is not None and total in (known[0], known[0] + lanes) and coded >= known[1] and ctx.store.meta is None:
        rows = known[0] // lanes - skip if coded == known[1] else min(known[1], known[0] // lanes) - skip
        at = max(0, rows) // page
    longest = max(counts) - skip
    pages = -(-longest // page)
    slots = torch.arange(skip + at * page, skip + pages * page, device=store.device)
    lens = torch.tensor(counts, device=store.device).view(store.batch, store.heads, 1)
    inside = slots < lens
    wanted = slots.expand(store.batch, store.heads, -1).minimum((lens - 1).clamp_min(0))
    keys = fetch(store, side, wanted).unflatten(2, (-1, page))
    fresh = summary(keys, inside.unflatten(2, (-1, page)))
    out = {}
    for field, new in fresh.items():
        old = state.get(f"{name}/{field}")
        if at == 0 or old is None:
            out[field] = new
        elif old.shape[2] == pages:
            old[:, :, at:] = new
            out[field] = old
        else:
            out[field] = torch.cat([old[:, :, :at], new], 2)
        state[f"{name}/{field}"] = out[field]
    state[f"{name}/seen"] = (total, coded)
    return out


def slots_of(pages: torch.Tensor, page: int, entries: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(slots int64 [B, Hk, n*page] ascending, used or None) of chosen pages int64 [B, Hk, n]."""
    ordered = pages.sort(-1).values
    slots = (ordered.unsqueeze(-1) * page + torch.arange(page, device=pages.device) + skip).flatten(2)
    used = slots < entries
    return slots.clamp_max(entries - 1), used


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of scores [..., P]; of equals the earlier ones (rule R4)."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
