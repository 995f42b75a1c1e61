"""Every head of every layer at a small scale, in one pass: what thumbnails and the overview kept with a run are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import counts, workers
from lab.inspect.bundle import Bundle, know_rows, spans
from lab.inspect.capture import Capture
from lab.inspect.pooled import Frame, Source
from lab.inspect.scores import Cancel, Progress

SIDE = 128
MOST_CPU, MOST_GPU = 12_000_000_000, 2_000_000_000_000
"""Weights read for one survey; of longer runs it reads only the last rows of each cell."""


@dataclass(frozen=True)
class Survey:
    """Cells of ``step`` x ``step`` tokens of every head, n a side.

    Attributes:
        largest: float32 [L, Hq, n, n] largest weight of a cell; NaN where nothing is visible.
        mean: float32 [L, Hq, n, n] sum of its weights by its causal entries, so that heads and layers add up.
        largest_of_mean: float32 [L, n, n] largest of the weights averaged over heads.
        layers: layer number of each capture.
        tokens, step: of the run, and per cell.
        read: rows of each cell that were read, None for all of them.
    """

    largest: np.ndarray
    mean: np.ndarray
    largest_of_mean: np.ndarray
    layers: tuple[int | None, ...]
    tokens: int
    step: int
    read: int | None


def rows_to_read(captures: Sequence[Capture], size: int = SIDE) -> int | None:
    """Rows of each cell that a survey of this run can afford, None when it can read all."""
    t = captures[0].tokens
    weights = sum(c.heads for c in captures) * t * t // 2
    most = MOST_CPU if captures[0].q.device.type == "cpu" else MOST_GPU
    return None if weights <= most else max(1, int(-(-t // size) * most / weights))


def survey(
    captures: Sequence[Capture],
    size: int = SIDE,
    read: int | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Survey:
    """Look at every head of the given layers of one run in at most size x size cells.

    ``read``: only the last rows of each cell; sums are then scaled to the whole cell.

    Raises:
        LabError: no capture, or cancelled.
    """
    if not captures:
        raise LabError("No layer was captured", "A survey needs at least one", "Replay the run to capture attention")
    t = captures[0].tokens
    step = -(-t // size)
    frame = Frame((0, t), (0, t), step, step)
    found = []
    for n, capture in enumerate(captures):
        def told(fraction: float, n=n) -> None:
            if progress:
                progress((n + fraction) / len(captures))
        found.append(_layer(capture, frame, None if read is None or read >= step else read, told, cancel))
    largest, mean, of_mean = (np.stack(x) for x in zip(*found, strict=True))
    return Survey(largest, mean, of_mean, tuple(c.layer for c in captures), t, step, read)


def _layer(capture: Capture, frame: Frame, read: int | None, progress: Progress, cancel: Cancel | None):
    b, t, step = Bundle(capture, tuple(range(capture.heads))), capture.tokens, frame.row_step
    n, device = frame.h, capture.q.device
    largest, total = (torch.zeros(capture.heads, n, n, device=device) for _ in range(2))
    of_mean = torch.zeros(n, n, device=device)
    height, width = b.shape(t, (step, step))
    starts = range(0, t, step if read else height)
    blocks = [(max(a, min(a + step, t) - read) if read else a, min(a + (step if read else height), t)) for a in starts][::-1]
    begun = False if read else know_rows([b], (0, t), lambda f: progress(f / 2), cancel)

    def one(rows: tuple[int, int]) -> None:
        if read:
            know_rows([b], rows)
        y = rows[0] // step
        scale = (min(y * step + step, t) - y * step) / (rows[1] - rows[0]) if read else 1.0
        for cols in spans(capture, rows, (0, t), width, step):
            w, x = b.log2(rows, cols).exp2_(), cols[0] // step
            of = _cells(w.mean(0)[None], step, "max")[0]
            many, added = _cells(w, step, "max"), _cells(w, step, "sum")
            to = (slice(y, y + of.shape[0]), slice(x, x + of.shape[1]))
            of_mean[to], largest[:, *to], total[:, *to] = of, many, added * scale
    workers.each(blocks, one, device, lambda rows: (rows[1] - rows[0]) * rows[1],
                 (lambda f: progress(0.5 + f / 2)) if begun else progress, cancel)
    total /= counts.causal(frame, 0, device).clamp(min=1)
    for kv in range(capture.kv_heads):
        heads = [h for h in range(capture.heads) if capture.kv_head(h) == kv]
        for h in heads if capture.key_bias is not None else heads[:1]:
            same = [h] if capture.key_bias is not None else heads
            unseen = counts.visible([Source(capture, h)], frame) == 0
            largest[same] = largest[same].masked_fill(unseen, torch.nan)
    return largest.cpu().numpy(), total.cpu().numpy(), of_mean.cpu().numpy()


def _cells(w: torch.Tensor, step: int, kind: str) -> torch.Tensor:
    """[n, R, C] to [n, cells, cells]; the last of each may be cut."""
    n, r, c = w.shape
    if r % step and r > step or c % step:
        pad = (0, -c % step, 0, -r % step if r > step else 0)
        w = torch.nn.functional.pad(w, pad)  # weights are never below 0, so zeros change neither maximum nor sum
    w = w.view(n, -1, min(step, w.shape[1]), w.shape[2])
    w = w.amax(2) if kind == "max" else w.sum(2)
    w = w.view(n, w.shape[1], -1, step)
    return w.amax(3) if kind == "max" else w.sum(3)
