"""Attention multiplied through the layers: which input tokens a position is made of, at any length.

Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2005.00928. Each layer is half its head-mean attention and
half the identity; what a row does not spend, because every entry it knew was evicted, stays with itself.

The product of all layers would be a T x T matrix. Two things are kept instead: for every row, its shares of groups of
neighbouring tokens (a sum over columns commutes with the product, so these are exact, and there are at most ``GROUPS``);
and, of rows that somebody asked for, the shares of every single token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import counts, scores, store, workers
from lab.inspect.bundle import Bundle, know_rows, spans
from lab.inspect.capture import Capture
from lab.inspect.pooled import Frame
from lab.inspect.pooled import pool as pool_cells
from lab.inspect.scores import Cancel, Cancelled, Progress
from lab.inspect.view import View

GROUPS = 1024
"""Groups of columns whose shares are kept for every row: up to this many tokens the rollout is exact everywhere."""
MOST_ROWS = 1024
"""Rows of a window whose single tokens can be asked for."""
QUICK = 1_000_000_000
"""Weights that a first answer about one row may cost; a longer run has to be drawn before."""
_one_at_a_time = threading.Lock()


def whole(capture: Capture) -> Bundle:
    """All heads of a layer."""
    return Bundle(capture, tuple(range(capture.heads)))


def mean_weights(capture: Capture, rows: tuple[int, int]) -> torch.Tensor:
    """float32 [rows, rows[1]] attention averaged over heads."""
    b = whole(capture)
    know_rows([b], rows)
    out = torch.zeros(rows[1] - rows[0], rows[1], device=capture.q.device)
    for cols in spans(capture, rows, (0, rows[1]), b.shape(rows[1] - rows[0])[1]):
        torch.mean(b.log2(rows, cols).exp2_(), 0, out=out[:, cols[0] : cols[1]])
    return out


def _blocks(capture: Capture, end: int) -> list[tuple[int, int]]:
    """Row ranges up to ``end`` in which all columns of the head mean are a bounded block; the longest rows first."""
    size = max(1, min(128 if capture.q.device.type == "cpu" else 1024, scores.cells(capture) // end))
    return [(a, min(a + size, end)) for a in range(0, end, size)][::-1]


def _cost(rows: tuple[int, int]) -> float:
    return (rows[1] - rows[0]) * rows[1]


def _prepare(captures: Sequence[Capture], end: int, progress: Progress | None, cancel: Cancel | None) -> Progress | None:
    """Have the log-sum-exp of every row known, and return where to tell the progress of what follows."""
    def part(start: float, size: float) -> Progress | None:
        return None if progress is None else lambda fraction: progress(start + size * fraction)

    begun = know_rows([whole(c) for c in captures], (0, end), part(0.0, 0.4), cancel)
    return part(0.4, 0.6) if begun else progress


def rollout_rows(
    captures: Sequence[Capture],
    rows: Sequence[int],
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> torch.Tensor:
    """float32 [len(rows), T] how much of each input token a position holds after all layers; rows sum to 1.

    Multiplies from the last layer down, block by block, so no T x T matrix exists however long the run.
    """
    _check(captures)
    t = captures[0].tokens
    for i in rows:
        captures[0].check_row(i)
    x = torch.zeros(len(rows), t, device=captures[0].q.device)
    x[torch.arange(len(rows)), torch.as_tensor(list(rows))] = 1.0
    end = max(rows) + 1
    told = _prepare(captures, end, progress, cancel)
    for n, capture in enumerate(reversed(captures)):
        out, adding = x / 2, threading.Lock()

        def one(block: tuple[int, int], capture=capture, x=x, out=out, adding=adding) -> None:
            share = x[:, block[0] : block[1]] / 2
            if share.any():
                w = mean_weights(capture, block)
                spent = share @ w
                with adding:
                    out[:, : block[1]] += spent
                    out[:, block[0] : block[1]] += share * (1 - w.sum(1))
        workers.each(_blocks(capture, end), one, x.device, _cost, _layer(told, n, len(captures)), cancel)
        x = out
    return x


def _layer(progress: Progress | None, n: int, layers: int) -> Progress | None:
    return None if progress is None else lambda fraction: progress((n + fraction) / layers)


def _check(captures: Sequence[Capture]) -> None:
    if not captures:
        raise LabError("No layer was captured", "A rollout needs every layer of the run", "Replay the run")


class Shares(NamedTuple):
    """For every row, its shares of groups of ``step`` columns: float [T, groups], float16 when there are very many."""

    step: int
    shares: torch.Tensor

    def part(self, rows: tuple[int, int], groups: tuple[int, int]) -> torch.Tensor:
        """float32 shares of some rows and groups."""
        return self.shares[rows[0] : rows[1], groups[0] : groups[1]].float()


def known(captures: Sequence[Capture]) -> Shares | None:
    """The kept shares of all rows, or None while nobody has drawn this rollout."""
    return store.get((tuple(sorted(c.serial for c in captures)), "rollout"))


def shares(captures: Sequence[Capture], progress: Progress | None = None, cancel: Cancel | None = None) -> Shares:
    """The shares of all rows, computed once: from the first layer up, each layer's rows applied to the groups below."""
    _check(captures)
    while not _one_at_a_time.acquire(timeout=0.2):  # a second page waits for the first instead of doing the same again
        if cancel and cancel():
            raise Cancelled()
    try:
        found = known(captures)
        if found is None:
            found = _shares(captures, progress, cancel)
            key = (tuple(sorted(c.serial for c in captures)), "rollout")
            store.put(key, found, found.shares.nbytes)
        return found
    finally:
        _one_at_a_time.release()


def _shares(captures: Sequence[Capture], progress: Progress | None, cancel: Cancel | None) -> Shares:
    t, device = captures[0].tokens, captures[0].q.device
    step = -(-t // GROUPS)
    told = _prepare(captures, t, progress, cancel)
    y = torch.zeros(t, -(-t // step), device=device)
    y[torch.arange(t, device=device), torch.arange(t, device=device) // step] = 1.0
    for n, capture in enumerate(captures):
        above = torch.zeros_like(y)

        def one(rows: tuple[int, int], capture=capture, y=y, above=above) -> None:
            w, seen = mean_weights(capture, rows), -(-rows[1] // step)
            into = above[rows[0] : rows[1]]
            into[:, :seen] = w @ y[: rows[1], :seen]
            into.add_(y[rows[0] : rows[1]] * (2 - w.sum(1, keepdim=True))).mul_(0.5)
        workers.each(_blocks(capture, t), one, device, _cost, _layer(told, n, len(captures)), cancel)
        y = above
    return Shares(step, y.half() if y.numel() > GROUPS * 16384 else y)


def exact_rows(
    captures: Sequence[Capture], rows: tuple[int, int], progress: Progress | None = None, cancel: Cancel | None = None
) -> torch.Tensor:
    """float32 [rows, T] shares of single tokens; kept, so that the same rows are at hand afterwards.

    Raises:
        LabError: for more than ``MOST_ROWS`` rows.
    """
    found = kept_rows(captures, rows)
    if found is not None:
        return found
    if rows[1] - rows[0] > MOST_ROWS:
        raise LabError(f"{rows[1] - rows[0]:,} rows at once cannot be computed to single tokens",
                       f"At most {MOST_ROWS:,} can", "Zoom in further")
    x = rollout_rows(captures, range(*rows), progress, cancel)
    key = tuple(sorted(c.serial for c in captures))
    store.put((key, "rollout rows"), (rows, x), x.nbytes)
    return x


def kept_rows(captures: Sequence[Capture], rows: tuple[int, int]) -> torch.Tensor | None:
    """Kept rows of single tokens that cover ``rows``, or None."""
    held = store.get((tuple(sorted(c.serial for c in captures)), "rollout rows"))
    if held is None or not (held[0][0] <= rows[0] and rows[1] <= held[0][1]):
        return None
    return held[1][rows[0] - held[0][0] : rows[1] - held[0][0]]


def rollout_view(
    captures: Sequence[Capture],
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    width: int = 512,
    height: int = 512,
    pool: str = "max",
    *,
    exact: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> View:
    """The rollout as a map: like ``view.view`` with head "rollout", of all captured layers of one run.

    Every row is exact. Columns are single tokens in runs of up to ``GROUPS`` tokens; in longer ones they are known in
    groups, whose share is spread evenly over its tokens: ``View.group`` says how many, and "max" is the largest such mean
    under a cell. ``exact`` asks for single tokens of a window of at most ``MOST_ROWS`` rows, at about the price of the
    first drawing. Nothing is ever evicted here: what a layer lost can still have come through another.
    """
    _check(captures)
    t = captures[0].tokens
    (r0, r1), (c0, c1) = rows or (0, t), cols or (0, t)
    if not (0 <= r0 < r1 <= t and 0 <= c0 < c1 <= t):
        raise LabError(f"There is no window {r0}..{r1} by {c0}..{c1} in this run", f"It has {t} tokens")
    if pool not in ("max", "mean"):
        raise LabError(f'There is no pooling "{pool}"', 'Give "max" or "mean"')
    single = exact_rows(captures, (r0, r1), progress, cancel) if exact else kept_rows(captures, (r0, r1))
    if single is not None:
        step, part = 1, single[:, c0:c1]
    else:
        held = shares(captures, progress, cancel)
        step = held.step
        c0, c1 = c0 // step * step, min(t, -(-c1 // step) * step)
        part = held.part((r0, r1), (c0 // step, -(-c1 // step)))
    frame = Frame((r0, r1), (c0, c1), -(-(r1 - r0) // height), step * -(-(-(-(c1 - c0) // step)) // width))
    count = counts.causal(frame, 0, part.device)
    if pool == "mean":
        values = pool_cells(part, frame.row_step, frame.col_step // step, "sum") / count.clamp(min=1)
    else:
        values = _largest(part, frame, step)
    values = values.clone()
    values[count == 0] = math.nan
    evicted = np.zeros(tuple(values.shape), dtype=np.uint8)
    return View(values.cpu().numpy(), evicted, None, (r0, r1), (c0, c1), frame.row_step, frame.col_step, "rollout", pool, step)


def _largest(part: torch.Tensor, frame: Frame, step: int) -> torch.Tensor:
    """The largest mean of a group's tokens under each cell; only the diagonal cuts a group short (the last one too)."""
    if step == 1:
        return pool_cells(part, frame.row_step, frame.col_step, "max")
    (r0, r1), (c0, c1) = frame.rows, frame.cols
    row = torch.arange(r0, r1, device=part.device)
    group = row // step
    inside = (group * step >= c0) & (group * step < c1)
    y, x = (row - r0)[inside], group[inside] - c0 // step
    own = part[y, x] / (row[inside] - group[inside] * step + 1)
    part = part / step
    part[y, x] = own
    return pool_cells(part, frame.row_step, frame.col_step // step, "max")
