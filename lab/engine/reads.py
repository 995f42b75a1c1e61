"""What the `select` and `weigh` slots may answer: which entries rows read, and how logits become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch


@dataclass(frozen=True)
class Pick:
    """The stored entries a decode row reads; the rest are not fetched.

    One of: index int64 [B, Hk, n], slots in ascending order, with used bool [B, Hk, n] where some are filler; or keep
    bool [B, Hk, N], or [B, Hq, N] where the query heads of a group differ (the group's union is then fetched).
    probe: what was read in order to choose, in bytes.
    """

    index: torch.Tensor | None = None
    used: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    probe: int = 0


@dataclass(frozen=True)
class Paging:
    """How a decode row chooses among pages of `page` consecutive entries by a summary of each page's keys, for steps in place
    (lab.engine.steady): always the same way, with nothing but the number of entries to decide how many.

    kind: "bounds" (per-channel minimum and maximum; a page scores the largest logit it could hold for any query head of the
    group) or "mean" (mean key; a page scores its logit for the group's mean query). fields: the summaries' names in the layer's
    state. first: entries in front that are always read; pages count from there. last: newest entries that are always read, a
    little more so that pages stay whole. count(entries): how many of the pages in between are read; where there are no more,
    everything is. whole: summaries of pages that are read anyway are looked at too.
    """

    page: int
    kind: str
    fields: tuple[str, ...]
    count: Callable[[int], int]
    first: int = 0
    last: int = 1
    whole: bool = False

    def pages(self, entries: int) -> int:
        """Pages that hold `entries` entries, the last of them not always full."""
        return -(-(entries - self.first) // self.page)

    def candidates(self, entries: int) -> int:
        """Pages to choose among: whole ones that are not read anyway."""
        return max(0, entries - self.first - self.last) // self.page


@dataclass(frozen=True)
class Rows:
    """The stored entries prompt rows read, asked for one block of rows at a time so that no T x N matrix lives.

    keep(r0, r1) answers for rows r0..r1 of this call: bool, broadcastable to [B, Hk, G, r1-r0, N]. probe: bytes read in
    order to choose. Causality and windows are added by the engine.

    blocks: the same answer where it is one of whole blocks, (keep bool [B, Hq, RB, NB], tokens per block) counted from
    position 0 for rows and entries alike: what a block-sparse kernel reads (`kernels.prefill.block_sparse`).
    """

    keep: Callable[[int, int], torch.Tensor]
    probe: int = 0
    blocks: tuple[torch.Tensor, int] | None = None


@dataclass(frozen=True)
class Place:
    """Where a block of logits [B, Hk, G, R, n] comes from: pos int64 [B, Hk, n] of its keys, pos_q int64 [B, R] of its
    rows (-1 for padding), row the first of these rows within this call, slots int64 [B, Hk, n] of its keys among the
    stored entries or None for all in order."""

    pos: torch.Tensor
    pos_q: torch.Tensor
    row: int = 0
    slots: torch.Tensor | None = None


@dataclass(frozen=True)
class Weighed:
    """Weights p float32 [B, Hk, G, R, n], 0 where a row may not read; lse [B, Hk, G, R]; extra [B, Hk, G, R, d] is added
    to the output. sparse: columns whose weights are all 0 are not fetched from the values. softmax: exp(lse) is what the
    weights were divided by, so that a model's learned sink logit can take its share."""

    p: torch.Tensor
    lse: torch.Tensor
    extra: torch.Tensor | None = None
    sparse: bool = False
    softmax: bool = True
