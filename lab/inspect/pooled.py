"""Attention pooled to cells, straight from queries and keys or from a stored level; never a T x N matrix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lab.inspect import store, workers
from lab.inspect.bundle import Bundle, know_rows, spans
from lab.inspect.capture import Capture
from lab.inspect.scores import Cancel, Cancelled, Progress, lse_whole

FINE = 4096
"""Side of the stored level: a whole run is kept as at most this many cells squared, twice (largest and mean)."""
SIDE = 512
SMALL = 2048 * 2048
"""Cells of a level that is kept as float32."""
HALF = 2.0**14
DIRECT_CPU = 100_000_000
"""Weights computed afresh for one view on a CPU (about 150 ms on two cores); beyond it the stored level answers."""
DIRECT_GPU = 4_000_000_000


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

    Several sources are combined weight by weight, as ``reduce`` says, before they are pooled. What has to be known of the
    rows first (their log-sum-exp) is computed once and kept.
    """
    if _by_kernel(sources, reduce, frame, kinds):
        return {kind: _kernel(sources, reduce, frame, kind, progress, cancel) for kind in kinds}
    bundles = [Bundle(group[0].capture, tuple(s.head for s in group)) for group in _layers(sources)]
    device = sources[0].capture.q.device
    out = {kind: torch.zeros(frame.h, frame.w, device=device) for kind in kinds}
    # The exponential is monotone: where only maxima are asked it can wait until the cells are pooled.
    late = tuple(kinds) == ("max",) and _only(sources, reduce, "max")
    begun = know_rows(bundles, frame.rows, _part(progress, 0.0, 0.5), cancel)
    (r0, r1), (c0, c1) = frame.rows, frame.cols
    height, width = min(b.shape(r1 - r0, (frame.row_step, frame.col_step)) for b in bundles)
    widest = min((b.capture for b in bundles), key=lambda c: -(c.window or c.tokens))

    def one(rows: tuple[int, int]) -> None:
        for cols in spans(widest, rows, (c0, c1), width, frame.col_step):
            tile = _combined(bundles, reduce, rows, cols, late)
            for kind in kinds:
                part = pool(tile, frame.row_step, frame.col_step, kind)
                i, j = (rows[0] - r0) // frame.row_step, (cols[0] - c0) // frame.col_step
                out[kind][i : i + part.shape[0], j : j + part.shape[1]] = part.exp2_() if late else part

    blocks = [(a, min(a + height, r1)) for a in range(r0, r1, height)][::-1]
    workers.each(blocks, one, device, lambda rows: (rows[1] - rows[0]) * max(1, min(rows[1], c1) - c0),
                 _part(progress, 0.5 if begun else 0.0, 1.0), cancel)
    return out


def _part(progress: Progress | None, start: float, end: float) -> Progress | None:
    return None if progress is None else lambda fraction: progress(start + (end - start) * fraction)


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

    know_rows([Bundle(g[0].capture, tuple(s.head for s in g)) for g in _layers(sources)], frame.rows, None, cancel)

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


def _combined(bundles: Sequence[Bundle], reduce: Reduce, rows, cols, late: bool) -> torch.Tensor:
    """float32 [rows, cols] weights of all bundles combined; their base-2 logarithms when the exponential is ``late``."""
    total = None
    for b in bundles:
        s = b.log2(rows, cols)
        if reduce.heads == "max" or len(b.heads) == 1:
            tile = s.amax(0)
            if not late:
                tile.exp2_()
        else:
            tile = s.exp2_().sum(0)
        if total is None:
            total = tile
        elif reduce.layers == "max":
            torch.maximum(total, tile, out=total)
        else:
            total.add_(tile)
    shares = len(bundles[0].heads) if reduce.heads == "mean" else 1
    shares *= len(bundles) if reduce.layers == "mean" else 1
    return total.div_(shares) if shares > 1 else total


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


def fine_step(tokens: int, sources: int = 1, device: str = "cpu") -> int:
    """Tokens per cell of the stored level: the power of two that still serves the closest window that is not drawn afresh.

    A window of 512 x step tokens a side is drawn afresh while ``direct`` allows; the level has at most ``FINE`` cells a side.
    """
    step = 2
    while (2 * step * SIDE) ** 2 * sources <= direct(device):
        step *= 2
    while -(-tokens // step) > FINE:
        step *= 2
    return step


def direct(device: str) -> int:
    """Weights that a view may compute afresh."""
    return DIRECT_CPU if device == "cpu" else DIRECT_GPU


def fine(
    sources: Sequence[Source], reduce: Reduce, progress: Progress | None = None, cancel: Cancel | None = None
) -> Level:
    """The whole run at ``fine_step``, computed once and stored."""
    key = (
        tuple(sorted({s.capture.serial for s in sources})),
        "fine",
        tuple(reduce) if len(sources) > 1 else "",
        tuple((s.capture.serial, s.head) for s in sources),
    )
    level = store.get(key)
    if level is None:
        t, device = sources[0].capture.tokens, sources[0].capture.q.device.type
        step = fine_step(t, len(sources), device)
        drawn = draw(sources, reduce, Frame((0, t), (0, t), step, step), ("max", "sum"), progress, cancel)
        drawn["sum"] /= step * step
        if drawn["max"].numel() > SMALL:
            drawn = {kind: (x * HALF).half() for kind, x in drawn.items()}
        level = Level(step, drawn["max"], drawn["sum"])
        store.put(key, level, level.largest.nbytes + level.mean.nbytes)
    return level


class Level(NamedTuple):
    """A whole run in cells of ``step`` x ``step`` tokens: their largest weight and their mean, [n, n].

    Large ones are kept as float16 times ``HALF``, which holds weights down to 4e-9 to 11 bits.
    """

    step: int
    largest: torch.Tensor
    mean: torch.Tensor

    def frame(self, frame: Frame, kind: str) -> torch.Tensor:
        """float32 cells ("max" or "sum") of a frame whose origin and steps are multiples of ``step``."""
        (r0, r1), (c0, c1) = frame.rows, frame.cols
        part = (self.largest if kind == "max" else self.mean)[
            r0 // self.step : -(-r1 // self.step), c0 // self.step : -(-c1 // self.step)
        ]
        if part.dtype == torch.float16:
            part = part.float().div_(HALF)
        cells = pool(part, frame.row_step // self.step, frame.col_step // self.step, kind)
        return cells * self.step**2 if kind == "sum" else cells
