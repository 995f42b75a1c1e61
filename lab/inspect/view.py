"""Attention as a map: any window of any length as at most width x height cells, exact when a cell is one
token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.errors import LabError
from lab.inspect import counts, pooled
from lab.inspect.capture import Capture
from lab.inspect.pooled import Frame, Reduce, Source
from lab.inspect.scores import Cancel, Progress, row_lse

__all__ = ["Cell", "View", "cell", "difference", "overview", "row", "row_lse", "view"]

_SIDE = 4096


@dataclass(frozen=True)
class View:
    """Pooled attention of a window.

    Attributes:
        values: float32 [h, w], weight (or difference) of each cell; NaN where no row of the cell sees any
            entry of it:
            the future, outside the window, or evicted.
        evicted: uint8 [h, w], 0..255 share of the cell's entries that the cache had evicted when the row
            attended.
        bits: uint8 [h, w], fewest bits among the cell's entries as they were read (16 = exact), or None if
            not recorded.
        rows, cols: the tokens really covered; may begin up to one cell before what was asked.
        row_step, col_step: tokens per cell; the last cell may be cut by the end of ``rows`` or ``cols``.
        head, pool: as asked.
        group: neighbouring columns of which only the mean is known (a rollout of a long run); 1 everywhere else.
    """

    values: np.ndarray
    evicted: np.ndarray
    bits: np.ndarray | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    row_step: int
    col_step: int
    head: int | str
    pool: str
    group: int = 1

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=True if copy is None else copy)

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.values.shape

    @property
    def exact(self) -> bool:
        """True when every cell is one weight."""
        return self.row_step == 1 and self.col_step == 1

    def tokens_of(self, y: int, x: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Row and column token ranges under cell (y, x)."""
        r, c = self.rows[0] + y * self.row_step, self.cols[0] + x * self.col_step
        return (r, min(r + self.row_step, self.rows[1])), (c, min(c + self.col_step, self.cols[1]))

    def cell_of(self, i: int, j: int) -> tuple[int, int] | None:
        """Cell that holds row token i and column token j, or None when the view does not cover them."""
        if not (self.rows[0] <= i < self.rows[1] and self.cols[0] <= j < self.cols[1]):
            return None
        return (i - self.rows[0]) // self.row_step, (j - self.cols[0]) // self.col_step


@dataclass(frozen=True)
class Cell:
    """One weight and its place among its row, as a reader hovers it.

    ``weight`` is None where the row cannot see the entry, and ``why`` then says "future", "window", "hidden"
    or
    "evicted at row n". ``rank`` counts from 1. ``tail`` is the row's mass outside its 8 largest weights.
    With several
    heads the weight is the combined one. ``bits`` is what the entry was stored in at this row, None if not
    recorded.
    """

    row: int
    col: int
    weight: float | None
    rank: int | None
    visible: int
    row_max: float
    tail: float
    bits: int | None
    why: str | None


def sources_of(
    captures: Capture | Sequence[Capture], head: int | str, layers: str | None = None
) -> tuple[list[Source], Reduce]:
    """The heads that ``head`` means in every capture, and how heads and then layers combine.

    ``layers`` None: as the heads do ("max" with head "max", else "mean").
    """
    chosen = [captures] if isinstance(captures, Capture) else list(captures)
    if not chosen:
        raise LabError("No layer was chosen", "A view needs at least one captured layer", "Choose a layer")
    if len({c.tokens for c in chosen}) > 1:
        raise LabError(
            "The chosen layers belong to runs of different length",
            "Layers can only be combined within one run and variant",
            "Choose layers of one variant",
        )
    if layers not in (None, "mean", "max"):
        raise LabError(f'Layers cannot be combined by "{layers}"', 'Give "mean" or "max"')
    if isinstance(head, str):
        if head not in ("mean", "max"):
            raise LabError(f'There is no head "{head}"', 'Give a head number, "mean" or "max"')
        return [Source(c, h) for c in chosen for h in range(c.heads)], Reduce(head, layers or head)
    return [Source(c, c.check_head(head)) for c in chosen], Reduce("mean", layers or "mean")


def view(
    capture: Capture | Sequence[Capture],
    head: int | str = "mean",
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    width: int = 512,
    height: int = 512,
    pool: str = "max",
    *,
    layers: str | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> View:
    """Attention weights of rows x cols in at most height x width cells.

    Args:
        capture: one layer, or several layers of one run to combine.
        head: a query head, or "mean" or "max" over all heads, taken weight by weight before pooling; a head that does
            not see an entry gives it no weight.
        rows, cols: half-open token ranges; None means all.
        pool: "max" or "mean" of the weights under a cell. The mean is over the weights that exist: entries some row of
            the cell sees (in any of the heads), never future or evicted ones.
        layers: "mean" or "max" over the layers, after the heads of each were combined; None: as the heads are.
        progress: called with 0..1 while something long is computed.
        cancel: asked between blocks; True raises ``scores.Cancelled``.

    Returns:
        A View. Cells are equal squares of tokens; when a window is both large and far out its origin moves to the grid
        of the stored level and steps become multiples of that level's, so read ``rows``, ``cols`` and the steps of the
        answer. Memory is bounded by the blocks of ``scores`` and the stored level, never by tokens squared.

    Raises:
        LabError: head, rows or columns out of range, unknown pool or reduction, or cancelled.
    """
    sources, reduce = sources_of(capture, head, layers)
    t = sources[0].capture.tokens
    if pool not in ("max", "mean"):
        raise LabError(f'There is no pooling "{pool}"', 'Give "max" or "mean"')
    rows, cols = _range(rows, t, "rows"), _range(cols, t, "columns")
    for name, side in (("width", width), ("height", height)):
        if not 1 <= side <= _SIDE:
            raise LabError(f"A view of {name} {side} cannot be drawn", f"Give 1 to {_SIDE} cells")
    frame = Frame(rows, cols, _ceil(rows[1] - rows[0], height), _ceil(cols[1] - cols[0], width))
    kind = "max" if pool == "max" else "sum"
    stored = _stored_frame(sources, frame, t, width, height)
    if stored is None:
        cell_values = pooled.draw(sources, reduce, frame, (kind,), progress, cancel)[kind]
    else:
        frame = stored
        cell_values = pooled.fine(sources, reduce, progress, cancel).frame(frame, kind)
    shown = counts.visible(sources, frame)
    values = cell_values / shown.clamp(min=1) if pool == "mean" else cell_values.clone()
    values[shown == 0] = math.nan
    bits = counts.lowest_bits(sources, frame)
    return View(
        values.cpu().numpy(),
        counts.evicted(sources, frame).cpu().numpy(),
        None if bits is None else bits.cpu().numpy(),
        frame.rows,
        frame.cols,
        frame.row_step,
        frame.col_step,
        head,
        pool,
    )


def overview(
    capture: Capture | Sequence[Capture],
    head: int | str = "mean",
    size: int = 512,
    pool: str = "max",
    *,
    layers: str | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> View:
    """The whole run in at most size x size cells, and the stored level that makes later zooms quick."""
    return view(capture, head, None, None, size, size, pool, layers=layers, progress=progress, cancel=cancel)


def _range(span: tuple[int, int] | None, t: int, what: str) -> tuple[int, int]:
    if span is None:
        return 0, t
    a, b = int(span[0]), int(span[1])
    if not 0 <= a < b <= t:
        raise LabError(
            f"There are no {what} {a} to {b} in this run",
            f"It has {t} tokens, 0 to {t - 1}",
            "Choose a range inside it",
        )
    return a, b


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _stored_frame(sources: Sequence[Source], frame: Frame, t: int, width: int, height: int) -> Frame | None:
    """The frame on the grid of the stored level, or None when computing afresh is quick enough or finer is asked."""
    device = sources[0].capture.q.device.type
    step = pooled.fine_step(t, len(sources), device)
    finest = min(frame.row_step, frame.col_step)
    if finest == 1 or 2 * finest < step:
        return None
    area = int(counts.causal(Frame(frame.rows, frame.cols, t, t), 0, "cpu").sum())
    if area * len(sources) <= pooled.direct(device):
        return None
    (r0, r1), (c0, c1) = ((a // step * step, min(t, _ceil(b, step) * step)) for a, b in (frame.rows, frame.cols))
    row_step, col_step = (step * _ceil(_ceil(b - a, step), n) for a, b, n in ((r0, r1, height), (c0, c1, width)))
    return Frame((r0, r1), (c0, c1), row_step, col_step)


def row(capture: Capture | Sequence[Capture], head: int | str, i: int, layers: str | None = None) -> np.ndarray:
    """float32 [T] exact weights of row i; NaN where it cannot see the entry (future, window, evicted)."""
    sources, reduce = sources_of(capture, head, layers)
    i = sources[0].capture.check_row(i)
    frame = Frame((i, i + 1), (0, sources[0].capture.tokens), 1, 1)
    values = pooled.draw(sources, reduce, frame, ("sum",))["sum"]
    values[counts.visible(sources, frame) == 0] = math.nan
    return values[0].cpu().numpy()


def cell(
    capture: Capture | Sequence[Capture], head: int | str, i: int, j: int, layers: str | None = None
) -> Cell:
    """The exact weight of row i on entry j with its rank in the row, or why there is none."""
    sources, _ = sources_of(capture, head, layers)
    sources[0].capture.check_row(j)
    w = row(capture, head, i, layers)
    seen = np.sort(w[np.isfinite(w)])[::-1]
    weight = None if np.isnan(w[j]) else float(w[j])
    rank = None if weight is None else int((seen > w[j]).sum()) + 1
    return Cell(
        i,
        j,
        weight,
        rank,
        seen.size,
        float(seen[0]) if seen.size else 0.0,
        float(max(0.0, seen[8:].sum())),
        _bits_at(sources, i, j),
        None if weight is not None else _why(sources, i, j),
    )


def _bits_at(sources: Sequence[Source], i: int, j: int) -> int | None:
    known = []
    for s in sources:
        c, kv = s.capture, s.capture.kv_head(s.head)
        if c.death is not None and i >= int(c.death[kv, j]):
            known.append(0)
        elif c.bits is not None:
            narrow = c.demoted is None or i >= int(c.demoted[kv, j])
            bits = int(c.bits[kv, j])
            known.append(bits if narrow and bits else 16)
    return min(known) if known else None


def _why(sources: Sequence[Source], i: int, j: int) -> str:
    if j > i:
        return "future"
    if all(s.capture.window and i - j >= s.capture.window for s in sources):
        return "window"
    rows = [
        int(s.capture.death[s.capture.kv_head(s.head), j]) for s in sources if s.capture.death is not None
    ]
    gone = [r for r in rows if r <= i]
    return f"evicted at row {max(gone)}" if gone else "hidden"


def difference(a: View, b: View) -> View:
    """b - a, cell by cell; NaN where either sees nothing; ``evicted`` is the larger share, ``bits`` the
    fewer.

    Raises:
        LabError: when the two views do not cover the same cells.
    """
    where = [(v.rows, v.cols, v.row_step, v.col_step, v.pool) for v in (a, b)]
    if where[0] != where[1]:
        raise LabError(
            "The two views show different windows, so their difference has no meaning",
            "Both need the same rows, columns, cell size and pooling",
            "Ask for the same window of both variants, inside the shorter of the two runs",
        )
    bits = [v.bits for v in (a, b) if v.bits is not None]
    return View(
        b.values - a.values,
        np.maximum(a.evicted, b.evicted),
        np.minimum.reduce(bits) if bits else None,
        a.rows,
        a.cols,
        a.row_step,
        a.col_step,
        a.head,
        a.pool,
        a.group,
    )
