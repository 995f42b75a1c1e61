"""Attention pooled to cells, straight from queries and keys or from a stored fine level; never a T x N matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lab.inspect import store
from lab.inspect.capture import Capture
from lab.inspect.scores import (
    Cancel,
    Cancelled,
    Progress,
    cells,
    column_blocks,
    log_weights,
    lse_whole,
)

FINE = 2048
"""Side of the stored fine level: a whole run is kept as at most this many cells squared, twice (max and sum)."""


class Reduce(NamedTuple):
    """How several heads of a layer become one, and then how several layers do: each "mean" or "max"."""

    heads: str
    layers: str


@dataclass(frozen=True)
class Source:
    """One head of one layer."""

    capture: Capture
    head: int


@dataclass(frozen=True)
class Frame:
    """Where the cells of a view lie: h x w cells of row_step x col_step tokens from (row, col); the last may be cut."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    row_step: int
    col_step: int

    @property
    def h(self) -> int:
        """Cells down."""
        return -(-(self.rows[1] - self.rows[0]) // self.row_step)

    @property
    def w(self) -> int:
        """Cells across."""
        return -(-(self.cols[1] - self.cols[0]) // self.col_step)


def pool(x: torch.Tensor, row_step: int, col_step: int, kind: str) -> torch.Tensor:
    """[R, C] to [ceil(R/row_step), ceil(C/col_step)] by ``kind`` "max" or "sum"; rows first, which vectorises well."""
    r, c = x.shape
    if r % row_step or c % col_step:
        x = F.pad(x, (0, -c % col_step, 0, -r % row_step), value=-torch.inf if kind == "max" else 0.0)
    if row_step > 1:
        x = x.view(-1, row_step, x.shape[1])
        x = x.amax(1) if kind == "max" else x.sum(1)
    if col_step > 1:
        x = x.view(x.shape[0], -1, col_step)
        x = x.amax(2) if kind == "max" else x.sum(2)
    return x


def draw(
    sources: Sequence[Source],
    reduce: Reduce,
    frame: Frame,
    kinds: Sequence[str],
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, torch.Tensor]:
    """Pooled weights of the frame, {"max": [h, w], "sum": [h, w]} for the asked kinds; 0 where nothing is visible.

    Several sources are combined weight by weight, as ``reduce`` says, before they are pooled.
    """
    if _by_kernel(sources, reduce, frame, kinds):
        return {kind: _kernel(sources, reduce, frame, kind, progress, cancel) for kind in kinds}
    capture = sources[0].capture
    out = {kind: torch.zeros(frame.h, frame.w, device=capture.q.device) for kind in kinds}
    # exp is monotone: where only maxima are asked it can wait until the cells are pooled.
    late_exp = tuple(kinds) == ("max",) and _only(sources, reduce, "max")
    (r0, r1), (c0, c1) = frame.rows, frame.cols
    size = max(frame.row_step, min(512, math.isqrt(cells(capture))) // frame.row_step * frame.row_step)
    for a in range(r0, r1, size):
        if cancel and cancel():
            raise Cancelled()
        rows = (a, min(a + size, r1))
        for cols in _spans(sources, rows, (c0, c1), frame.col_step):
            tile = _combined(sources, reduce, rows, cols, late_exp)
            for kind in kinds:
                part = pool(tile, frame.row_step, frame.col_step, kind)
                i, j = (a - r0) // frame.row_step, (cols[0] - c0) // frame.col_step
                out[kind][i : i + part.shape[0], j : j + part.shape[1]] = part.exp_() if late_exp else part
        if progress:
            # Work grows with the row number: a row reads everything before it.
            progress((rows[1] ** 2 - r0**2) / max(1, r1**2 - r0**2))
    return out


def _layers(sources: Sequence[Source]) -> list[list[Source]]:
    return [list(group) for _, group in itertools.groupby(sources, key=lambda s: s.capture.serial)]


def _only(sources: Sequence[Source], reduce: Reduce, kind: str) -> bool:
    """True when everything that is combined is combined by ``kind``."""
    groups = _layers(sources)
    return (reduce.heads == kind or all(len(g) == 1 for g in groups)) and (reduce.layers == kind or len(groups) == 1)


def _by_kernel(sources: Sequence[Source], reduce: Reduce, frame: Frame, kinds: Sequence[str]) -> bool:
    """Whether the fused kernel serves: it pools one head at a time, so pooling and combining have to commute."""
    from kernels.backend import has_triton

    if not (sources[0].capture.q.is_cuda and has_triton()):
        return False
    if frame.row_step == frame.col_step == 1:
        return True
    return all(_only(sources, reduce, "max" if kind == "max" else "mean") for kind in kinds)


def _kernel(sources, reduce, frame, kind, progress, cancel, impl: str = "auto") -> torch.Tensor:
    from kernels.view import pooled

    count = [0]

    def one(s: Source) -> torch.Tensor:
        if cancel and cancel():
            raise Cancelled()
        c, kv = s.capture, s.capture.kv_head(s.head)
        tile = pooled(
            c.q[s.head], c.k[kv], lse_whole(c, s.head, frame.rows), c.scale, rows=frame.rows, cols=frame.cols,
            row_step=frame.row_step, col_step=frame.col_step, kind=kind, softcap=c.softcap, window=c.window,
            key_bias=None if c.key_bias is None else c.key_bias[s.head],
            death=None if c.death is None else c.death[kv], impl=impl,
        )
        count[0] += 1
        if progress:
            progress(count[0] / len(sources))
        return tile

    return _fold((_fold(map(one, group), reduce.heads) for group in _layers(sources)), reduce.layers)


def _spans(sources: Sequence[Source], rows: tuple[int, int], cols: tuple[int, int], step: int):
    captures = {s.capture.serial: s.capture for s in sources}.values()
    widest = min(captures, key=lambda c: -(c.window or c.tokens))
    return column_blocks(widest, rows, cols, step)


def _combined(sources: Sequence[Source], reduce: Reduce, rows, cols, late_exp: bool) -> torch.Tensor:
    def one(s: Source) -> torch.Tensor:
        tile = log_weights(s.capture, s.head, rows, cols)
        return tile if late_exp else tile.exp_()

    return _fold((_fold(map(one, group), reduce.heads) for group in _layers(sources)), reduce.layers)


def _fold(tiles: Iterable[torch.Tensor], kind: str) -> torch.Tensor:
    """The mean or the maximum of tiles, taken one at a time; the first is changed in place."""
    total, count = None, 0
    for tile in tiles:
        count += 1
        if total is None:
            total = tile
        elif kind == "max":
            torch.maximum(total, tile, out=total)
        else:
            total.add_(tile)
    return total.div_(count) if kind == "mean" and count > 1 else total


def fine_step(tokens: int) -> int:
    """Tokens per cell of the stored fine level: the power of two that fits ``tokens`` into ``FINE`` cells, at least 2."""
    step = 2
    while -(-tokens // step) > FINE:
        step *= 2
    return step


def fine(
    sources: Sequence[Source], reduce: Reduce, progress: Progress | None = None, cancel: Cancel | None = None
) -> dict[str, torch.Tensor]:
    """The whole run at ``fine_step``, max and sum, computed once and stored."""
    key = (
        tuple(sorted({s.capture.serial for s in sources})),
        "fine",
        tuple(reduce) if len(sources) > 1 else "",
        tuple((s.capture.serial, s.head) for s in sources),
    )
    level = store.get(key)
    if level is None:
        t, step = sources[0].capture.tokens, fine_step(sources[0].capture.tokens)
        level = draw(sources, reduce, Frame((0, t), (0, t), step, step), ("max", "sum"), progress, cancel)
        store.put(key, level, sum(x.nbytes for x in level.values()))
    return level


def from_fine(level: torch.Tensor, step: int, frame: Frame, kind: str) -> torch.Tensor:
    """A view of the stored level; the frame's origin and steps are multiples of ``step``."""
    part = level[
        frame.rows[0] // step : -(-frame.rows[1] // step), frame.cols[0] // step : -(-frame.cols[1] // step)
    ]
    return pool(part, frame.row_step // step, frame.col_step // step, kind)
