"""What kind of head is it: statistics and a thumbnail for every head, from sampled or all rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import survey, workers
from lab.inspect.bundle import GONE, LOG2E, Bundle, know_rows
from lab.inspect.capture import Capture
from lab.inspect.scores import Cancel, Progress, cells

RUN = 16
"""Rows read together when rows are sampled."""


@dataclass(frozen=True)
class HeadStats:
    """One number per query head (float32 [Hq]), means over the rows read, row 0 excluded because it can only
    see itself.

    Attributes:
        entropy: nats of a row's weights; 0 = one entry, ln(visible) = uniform.
        evenness: entropy divided by ln(visible entries), 0..1.
        sink_mass: weight on token 0.
        sink_rate: share of rows that give token 0 more than the threshold.
        mean_distance: tokens between a row and what it reads.
        previous: weight on the token just before.
        induction: weight on tokens that follow an earlier occurrence of the row's own token; NaN without
            token ids
            or where no token repeats.
        local_mass: weight on the newest ``local`` tokens, the row itself included.
        far_mass: weight on neither the first ``sinks`` nor the newest ``local`` tokens.
        tail_mass: weight outside a row's 8 largest.
        rows: how many rows were read.
    """

    entropy: np.ndarray
    evenness: np.ndarray
    sink_mass: np.ndarray
    sink_rate: np.ndarray
    mean_distance: np.ndarray
    previous: np.ndarray
    induction: np.ndarray
    local_mass: np.ndarray
    far_mass: np.ndarray
    tail_mass: np.ndarray
    rows: int


MEASURES = tuple(f.name for f in fields(HeadStats) if f.name != "rows")


def sampled_blocks(tokens: int, max_rows: int | None, first: int = 0) -> list[tuple[int, int]]:
    """Row ranges to read: all from ``first`` on, or about ``max_rows`` rows in evenly spread runs."""
    if max_rows is None or tokens - first <= max_rows:
        return [(a, min(a + 512, tokens)) for a in range(first, tokens, 512)]
    runs = max(1, max_rows // RUN)
    starts = np.linspace(first, tokens - RUN, runs).astype(int)
    return [(int(a), int(a) + RUN) for a in sorted(set(starts))]


def stats(
    capture: Capture,
    token_ids: Sequence[int] | None = None,
    *,
    local: int = 64,
    sinks: int = 4,
    threshold: float = 0.3,
    max_rows: int | None = 512,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> HeadStats:
    """The statistics of every head of one layer.

    Args:
        token_ids: ids of the run's tokens, for the induction score.
        local, sinks: how many newest and first tokens count as near and as sinks.
        threshold: weight on token 0 above which a row counts towards the sink rate.
        max_rows: rows read, spread evenly; None reads every row.

    Raises:
        LabError: fewer token ids than tokens, or cancelled.
    """
    t = capture.tokens
    ids = None
    if token_ids is not None:
        ids = torch.as_tensor(list(token_ids), device=capture.q.device)
        if ids.numel() < t:
            raise LabError(
                f"The run has {ids.numel()} token ids but {t} captured tokens",
                "Each captured token needs its id",
            )
    blocks = sampled_blocks(t, max_rows, first=min(1, t - 1))
    bundle = Bundle(capture, tuple(range(capture.heads)))
    sums, adding = np.zeros((capture.heads, len(MEASURES) + 2)), threading.Lock()

    def one(block: tuple[int, int]) -> None:
        for rows in _split(capture, block):
            know_rows([bundle], rows)
            found = _block(bundle, rows, ids, local, sinks, threshold)
            with adding:
                np.add(sums, found, out=sums)
    workers.each(blocks[::-1], one, capture.q.device, lambda block: (block[1] - block[0]) * block[1], progress, cancel)
    rows, repeats = np.maximum(sums[:, -2], 1), sums[:, -1]
    values = {name: (sums[:, n] / rows).astype(np.float32) for n, name in enumerate(MEASURES)}
    n = MEASURES.index("induction")
    with np.errstate(invalid="ignore", divide="ignore"):
        values["induction"] = np.where(repeats > 0, sums[:, n] / repeats, np.nan).astype(np.float32)
    return HeadStats(**values, rows=int(sum(b - a for a, b in blocks)))


def _split(capture: Capture, block: tuple[int, int]):
    size = max(1, cells(capture) // (block[1] * capture.heads))
    for a in range(block[0], block[1], size):
        yield a, min(a + size, block[1])


def _block(bundle: Bundle, rows: tuple[int, int], ids, local: int, sinks: int, threshold: float) -> np.ndarray:
    """float64 [heads, measures + 2] sums over the rows of one block in the order of MEASURES, then rows that see anything,
    then rows that repeat."""
    r0, r1 = rows
    log = bundle.log2(rows, (0, r1)).mul_(1 / LOG2E)
    visible = (log > GONE / 10).sum(-1)
    w = log.exp()
    entropy = -(w * log.clamp(min=-1e4)).sum(-1)
    i = torch.arange(r0, r1, device=w.device)
    j = torch.arange(r1, device=w.device)
    distance = i * w.sum(-1) - w @ j.to(w.dtype)
    a = max(0, r0 - local + 1)
    nearest = torch.where(j[a:] > i[:, None] - local, w[..., a:], 0).sum(-1)
    # A first token that is also near counts as near only.
    first = torch.where(j[:sinks] <= i[:, None] - local, w[..., :sinks], 0).sum(-1)
    top = w.topk(min(8, r1), dim=-1).values.sum(-1)
    before = w[:, i - r0, (i - 1).clamp(min=0)] * (i > 0)
    followed, repeats = torch.zeros(len(bundle.heads), 1), 0
    if ids is not None and r1 > 1:
        match = (ids[: r1 - 1] == ids[r0:r1, None]) & (j[1:] < i[:, None])
        followed, repeats = (w[..., 1:] * match).sum(-1), match.any(1).sum()
    sink = w[..., 0]
    parts = {
        "entropy": entropy,
        "evenness": entropy / visible.clamp(min=2).log(),
        "sink_mass": sink,
        "sink_rate": (sink > threshold).float(),
        "mean_distance": distance,
        "previous": before,
        "induction": followed,
        "local_mass": nearest,
        "far_mass": w.sum(-1) - nearest - first,
        "tail_mass": w.sum(-1) - top,
    }
    sums = [parts[name].sum(-1) for name in MEASURES] + [(visible > 0).sum(-1), torch.full((len(bundle.heads),), int(repeats))]
    return torch.stack([x.cpu().double() for x in sums], 1).numpy()


@dataclass(frozen=True)
class Grid:
    """Thumbnails of all heads.

    Attributes:
        values: float32 [L, Hq, s, s] largest weight under each cell; NaN where nothing is visible.
        layers: layer number of each capture, as far as it is known.
        step: tokens per cell.
        sampled: True when only some rows of each cell were read.
    """

    values: np.ndarray
    layers: tuple[int | None, ...]
    step: int
    sampled: bool


def grid(
    captures: Sequence[Capture],
    size: int = 32,
    *,
    rows_per_cell: int = 8,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Grid:
    """Max-pooled thumbnails of at most size x size cells for every head of the given layers of one run.

    Runs of more than 2,048 tokens read the last ``rows_per_cell`` rows of each cell instead of all.
    """
    if not captures:
        raise LabError(
            "No layer was captured", "The grid needs at least one", "Replay the run to capture attention"
        )
    step = -(-captures[0].tokens // size)
    sample = captures[0].tokens > 2048 and step > rows_per_cell
    found = [survey.survey([c], size, rows_per_cell if sample else None, _share(progress, n, len(captures)), cancel)
             for n, c in enumerate(captures)]
    return Grid(np.concatenate([s.largest for s in found]), tuple(c.layer for c in captures), step, sample)


def _share(progress: Progress | None, n: int, total: int) -> Progress | None:
    return None if progress is None else lambda fraction: progress((n + fraction) / total)


def table(captures: Sequence[Capture], token_ids: Sequence[int] | None = None, **options) -> list[dict]:
    """One dict per head of every layer (layer, head, kv_head and the measures), ready to sort and filter.

    ``options`` are those of ``stats``.
    """
    rows = []
    for capture in captures:
        found = stats(capture, token_ids, **options)
        for head in range(capture.heads):
            measures = {name: float(getattr(found, name)[head]) for name in MEASURES}
            rows.append({"layer": capture.layer, "head": head, "kv_head": capture.kv_head(head), **measures})
    return rows
