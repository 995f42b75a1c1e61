"""Attention multiplied through the layers: which input tokens a position is made of, at any length.

Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2005.00928.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import store
from lab.inspect.capture import Capture
from lab.inspect.pooled import pool as pool_cells
from lab.inspect.scores import Cancel, Cancelled, Progress, row_blocks, weights
from lab.inspect.view import View


def mean_weights(capture: Capture, rows: tuple[int, int]) -> torch.Tensor:
    """float32 [rows, rows[1]] attention averaged over heads."""
    total = weights(capture, 0, rows, (0, rows[1]))
    for head in range(1, capture.heads):
        total += weights(capture, head, rows, (0, rows[1]))
    return total / capture.heads


def rollout_rows(
    captures: Sequence[Capture],
    rows: Sequence[int],
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> torch.Tensor:
    """float32 [len(rows), T] how much of each input token a position holds after all layers; rows sum to 1.

    Each layer is half its head-mean attention and half the identity. Multiplies from the last layer down, block by
    block, so no T x T matrix exists however long the run. What a row does not spend, because every entry it knew was
    evicted, stays with itself.
    """
    if not captures:
        raise LabError("No layer was captured", "A rollout needs every layer of the run", "Replay the run")
    t = captures[0].tokens
    for i in rows:
        captures[0].check_row(i)
    x = torch.zeros(len(rows), t, device=captures[0].q.device)
    x[torch.arange(len(rows)), torch.as_tensor(list(rows))] = 1.0
    for n, capture in enumerate(reversed(captures)):
        out = x / 2
        for block in row_blocks(capture, (0, max(rows) + 1)):
            if cancel and cancel():
                raise Cancelled()
            share = x[:, block[0] : block[1]] / 2
            if share.any():
                w = mean_weights(capture, block)
                out[:, : block[1]] += share @ w
                out[:, block[0] : block[1]] += share * (1 - w.sum(1))
            if progress:
                progress((n + (block[1] / (max(rows) + 1)) ** 2) / len(captures))
        x = out
    return x


QUICK = 1_000_000_000
"""Weights that rows of a window may cost afresh once the whole run was drawn; beyond it the drawn rows answer."""


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

    A cell of several rows shows its last row only, since all rows at once would need a T x T matrix; its columns are
    pooled exactly. The first drawing costs about one overview per layer and head. After it, a window of a long run shows
    the rows that were drawn (so its ``row_step`` may be larger than it needs to be) unless ``exact`` asks for its own.
    Nothing is ever evicted here: what a layer lost can still have come through another.
    """
    if not captures:
        raise LabError("No layer was captured", "A rollout needs every layer of the run", "Replay the run")
    t = captures[0].tokens
    (r0, r1), (c0, c1) = rows or (0, t), cols or (0, t)
    if not (0 <= r0 < r1 <= t and 0 <= c0 < c1 <= t):
        raise LabError(f"There is no window {r0}..{r1} by {c0}..{c1} in this run", f"It has {t} tokens")
    if pool not in ("max", "mean"):
        raise LabError(f'There is no pooling "{pool}"', 'Give "max" or "mean"')
    row_step, col_step = -(-(r1 - r0) // height), -(-(c1 - c0) // width)
    work = sum(c.heads for c in captures) * r1 * r1 // 2
    whole = None if exact or work <= QUICK else _drawn(captures, t)
    if whole is not None and whole[0] > row_step:
        row_step, x = whole
        r0, r1 = r0 // row_step * row_step, min(t, -(-r1 // row_step) * row_step)
        x = x[r0 // row_step : -(-r1 // row_step)]
    else:
        x = _rows(captures, (r0, r1), row_step, progress, cancel)
    last = [min(a + row_step, r1) - 1 for a in range(r0, r1, row_step)]
    part = x[:, c0:c1]
    seen = torch.arange(c0, c1, device=x.device) <= torch.tensor(last, device=x.device)[:, None]
    count = pool_cells(seen.float(), 1, col_step, "sum")
    if pool == "max":
        values = pool_cells(part, 1, col_step, "max").clone()
    else:
        values = pool_cells(part, 1, col_step, "sum") / count.clamp(min=1)
    values[count == 0] = math.nan
    evicted = np.zeros(tuple(values.shape), dtype=np.uint8)
    return View(values.cpu().numpy(), evicted, None, (r0, r1), (c0, c1), row_step, col_step, "rollout", pool)


def _rows(captures, rows, step, progress, cancel) -> torch.Tensor:
    """float32 [cells, T] the last row of each cell; kept."""
    r0, r1 = rows
    key = (tuple(sorted(c.serial for c in captures)), "rollout", r0, r1, step)
    x = store.get(key)
    if x is None:
        x = rollout_rows(captures, [min(a + step, r1) - 1 for a in range(r0, r1, step)], progress, cancel)
        store.put(key, x, x.nbytes)
        if rows == (0, captures[0].tokens):
            store.put((key[0], "rollout whole"), step, 0)
    return x


def _drawn(captures: Sequence[Capture], t: int) -> tuple[int, torch.Tensor] | None:
    """(tokens per row, rows) of the whole run as it was drawn last, or None."""
    key = tuple(sorted(c.serial for c in captures))
    step = store.get((key, "rollout whole"))
    x = None if step is None else store.get((key, "rollout", 0, t, step))
    return None if x is None else (step, x)
