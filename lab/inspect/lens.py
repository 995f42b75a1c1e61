"""One way of looking at a run: a head or a reduction of one layer, the rollout of all layers, or a difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lab.errors import LabError
from lab.inspect import rollout
from lab.inspect import view as views
from lab.inspect.capture import Capture
from lab.inspect.rollout import rollout_view
from lab.inspect.scores import Cancel, Progress
from lab.inspect.view import Cell, View


class Lens(Protocol):
    """What a map needs: windows, exact rows and exact cells of ``tokens`` rows and columns."""

    tokens: int

    def view(self, rows, cols, width: int, height: int, pool: str, progress: Progress | None = None,
             cancel: Cancel | None = None) -> View:
        """Pooled cells of a window, see ``view.view``."""

    def row(self, i: int) -> np.ndarray:
        """float32 [tokens] of one row, NaN where it cannot see the entry."""

    def cell(self, i: int, j: int) -> Cell:
        """One exact weight (or difference) with its rank."""


def trim(capture: Capture, tokens: int) -> Capture:
    """The first ``tokens`` tokens of a capture (itself when it has no more), to lay runs of two lengths side by side."""
    if tokens >= capture.tokens:
        return capture
    cut = {name: None if getattr(capture, name) is None else getattr(capture, name)[:, :tokens]
           for name in ("death", "bits", "demoted", "key_bias")}
    return replace(capture, q=capture.q[:, :tokens], k=capture.k[:, :tokens], **cut)


@dataclass(frozen=True)
class Heads:
    """One head, or "mean" or "max" over heads, of one layer, or of several layers combined by ``layers`` "mean" or "max"."""

    captures: Sequence[Capture]
    head: int | str
    layers: str | None = None

    @property
    def tokens(self) -> int:
        """Rows and columns."""
        return self.captures[0].tokens

    def view(self, rows, cols, width, height, pool, progress=None, cancel=None) -> View:
        """See ``view.view``."""
        return views.view(self.captures, self.head, rows, cols, width, height, pool, layers=self.layers, progress=progress,
                          cancel=cancel)

    def row(self, i: int) -> np.ndarray:
        """See ``view.row``."""
        return views.row(self.captures, self.head, i, self.layers)

    def cell(self, i: int, j: int) -> Cell:
        """See ``view.cell``."""
        return views.cell(self.captures, self.head, i, j, self.layers)


@dataclass(frozen=True)
class Rollout:
    """Attention multiplied through all captured layers (2005.00928).

    Rows are exact; columns of a long run are known in groups, see ``rollout.rollout_view``. ``exact``: the single tokens of
    a window's rows, however long they take.
    """

    captures: Sequence[Capture]
    exact: bool = False

    @property
    def tokens(self) -> int:
        """Rows and columns."""
        return self.captures[0].tokens

    def view(self, rows, cols, width, height, pool, progress=None, cancel=None) -> View:
        """See ``rollout.rollout_view``."""
        return rollout_view(self.captures, rows, cols, width, height, pool, exact=self.exact, progress=progress, cancel=cancel)

    def groups(self, i: int) -> tuple[int, np.ndarray]:
        """(tokens per group, float32 [groups] shares of row i); groups of one token where single tokens are known.

        Raises:
            LabError: when the run is long and nobody has drawn its rollout yet.
        """
        self.captures[0].check_row(i)
        single = rollout.kept_rows(self.captures, (i, i + 1))
        if single is not None:
            return 1, single[0].cpu().numpy()
        held = rollout.known(self.captures)
        if held is None:
            if sum(c.heads for c in self.captures) * self.tokens**2 // 2 > rollout.QUICK:
                raise LabError("The rollout of this run is not computed yet", "Its map is drawn first", "Wait for the map")
            held = rollout.shares(self.captures)
        return held.step, held.part((i, i + 1), (0, held.shares.shape[1]))[0].cpu().numpy()

    def row(self, i: int) -> np.ndarray:
        """Shares of every token at or before row i (a group's share spread over its tokens); the future is NaN."""
        step, found = self.groups(i)
        values = np.repeat(found, step)[: self.tokens].copy()
        if step > 1:
            own = i // step * step
            values /= step
            values[own : i + 1] = found[i // step] / (i + 1 - own)
        values[i + 1:] = math.nan
        return values

    def cell(self, i: int, j: int) -> Cell:
        """One share and its rank; the future has none."""
        self.captures[0].check_row(j)
        return _cell(self.row(i), i, j, "future")


@dataclass(frozen=True)
class Difference:
    """b - a of two lenses of equally many tokens. A max-pooled cell is the difference of two largest weights."""

    a: Lens
    b: Lens

    def __post_init__(self) -> None:
        if self.a.tokens != self.b.tokens:
            raise LabError("Two variants of different length cannot be subtracted", "Both need the same tokens",
                           "Trim the longer one")

    @property
    def tokens(self) -> int:
        """Rows and columns."""
        return self.a.tokens

    def view(self, rows, cols, width, height, pool, progress=None, cancel=None) -> View:
        """The window of both, subtracted; NaN where either sees nothing."""
        def half(offset: float):
            return None if progress is None else lambda fraction: progress(offset + fraction / 2)
        first = self.a.view(rows, cols, width, height, pool, half(0.0), cancel)
        return views.difference(first, self.b.view(rows, cols, width, height, pool, half(0.5), cancel))

    def row(self, i: int) -> np.ndarray:
        """float32 [tokens] b - a of one row."""
        return self.b.row(i) - self.a.row(i)

    def cell(self, i: int, j: int) -> Cell:
        """The difference; its rank is that of its size. ``why`` is that of the side which sees nothing."""
        known = self.b.cell(i, j)
        if known.weight is None or (known := self.a.cell(i, j)).weight is None:
            return replace(known, weight=None, rank=None)
        return replace(_cell(self.row(i), i, j, None), bits=self.b.cell(i, j).bits)


def _cell(values: np.ndarray, i: int, j: int, why: str | None) -> Cell:
    seen = np.sort(np.abs(values[np.isfinite(values)]))[::-1]
    weight = None if np.isnan(values[j]) else float(values[j])
    rank = None if weight is None else int((seen > abs(weight)).sum()) + 1
    return Cell(i, j, weight, rank, seen.size, float(seen[0]) if seen.size else 0.0, float(seen[8:].sum()), None,
                why if weight is None else None)
