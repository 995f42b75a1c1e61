"""What a run keeps of its attention once queries and keys are gone: cells of 1/128 of its length, in one byte each.

A byte is the logarithm of a weight, so that a kept weight is right to about 3%; what is visible, evicted or narrow in a cell
comes from the cache's own record and is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import counts
from lab.inspect.capture import Capture
from lab.inspect.pooled import Frame, Source, pool
from lab.inspect.survey import Survey
from lab.inspect.view import Cell, View

FLOOR = 1e-7
ZOOM = ("This run holds an overview of its attention, but not the queries and keys behind it",
        None, "Load the run's model and replay it to zoom to single tokens")


def is_kept(lens: Any) -> bool:
    """True when a lens (or a difference) shows what was kept, and cannot go further."""
    return isinstance(lens, (Stored, Seen)) or isinstance(getattr(lens, "a", None), (Stored, Seen))


def encode(weights: np.ndarray) -> np.ndarray:
    """Weights of 0..1 as bytes on a logarithmic scale: 0 for less than ``FLOOR`` or nothing, 255 for 1."""
    x = np.nan_to_num(np.asarray(weights, np.float32))
    scaled = 1 + np.rint(254 * (1 - np.log(np.clip(x, FLOOR, 1)) / np.log(FLOOR)))
    return np.where(x < FLOOR, 0, scaled).astype(np.uint8)


_DECODED = np.concatenate([[0.0], FLOOR ** (1 - np.arange(255) / 254)]).astype(np.float32)


def decode(codes: np.ndarray) -> np.ndarray:
    """float32 weights of bytes, within 3.3% of what was encoded."""
    return _DECODED[np.asarray(codes, np.uint8)]


def pack(survey: Survey) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(what it is, bytes of the lower triangle) of a survey, to be kept with its run."""
    n = survey.largest.shape[-1]
    y, x = np.tril_indices(n)
    about = {"tokens": survey.tokens, "step": survey.step, "side": n, "read": survey.read, "layers": list(survey.layers)}
    names = ("largest", "mean", "largest_of_mean")
    return about, {name: encode(getattr(survey, name)[..., y, x]) for name in names}


def unpack(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Survey | None:
    """The survey that ``pack`` kept, or None when it is damaged."""
    try:
        n, t, step = int(about["side"]), int(about["tokens"]), int(about["step"])
        layers = tuple(int(x) for x in about["layers"])
        if not 0 < n <= 1024 or -(-t // step) != n or len(arrays["largest"]) != len(layers):
            return None
        y, x = np.tril_indices(n)
        out = []
        for name in ("largest", "mean", "largest_of_mean"):
            codes = np.asarray(arrays[name], np.uint8)
            full = np.zeros((*codes.shape[:-1], n, n), np.float32)
            full[..., y, x] = decode(codes)
            out.append(full)
        return Survey(*out, layers, t, step, about.get("read"))
    except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError):
        return None


def light(
    arrays: Mapping[str, np.ndarray], letter: str, layer: int, tokens: int, heads: int, kv_heads: int, window: int | None = None,
) -> Capture:
    """A capture without queries and keys: only what the cache did and what the layer's window hides, for counting."""
    life = {}
    for name in ("death", "bits", "demoted"):
        stack = arrays.get(f"cache/{letter}/{name}")
        if stack is not None and 0 <= layer < stack.shape[0] and stack.shape[-1] >= tokens:
            life[name] = np.asarray(stack[layer])[:, :tokens]
    q, k = (torch.zeros(1).expand(n, tokens, 1) for n in (heads, kv_heads))
    return Capture(q, k, scale=1.0, window=window, layer=layer, letter=letter, **life)


@dataclass(frozen=True)
class Stored:
    """One head, or "mean" or "max" over heads, of one layer or of all, as far as a survey tells: a ``lens.Lens`` of cells.

    Attributes:
        survey: what was kept.
        captures: ``light`` captures of its layers, in the same order.
        head: a query head, "mean" or "max".
        layer: a layer number, or "mean" or "max" over all layers.
    """

    survey: Survey
    captures: Sequence[Capture]
    head: int | str
    layer: int | str

    @property
    def tokens(self) -> int:
        """Rows and columns."""
        return self.survey.tokens

    def cut(self, tokens: int) -> Stored:
        """The whole cells within the first ``tokens`` tokens, to lay runs of two lengths side by side."""
        from lab.inspect.lens import trim

        s, n = self.survey, tokens // self.survey.step
        part = replace(s, largest=s.largest[..., :n, :n], mean=s.mean[..., :n, :n], tokens=n * s.step,
                       largest_of_mean=s.largest_of_mean[..., :n, :n])
        return replace(self, survey=part, captures=[trim(c, n * s.step) for c in self.captures])

    @cached_property
    def _chosen(self) -> list[int]:
        s = self.survey
        if self.layer in ("mean", "max"):
            return list(range(len(s.layers)))
        if self.layer not in s.layers:
            have = f"layers {', '.join(map(str, s.layers))}"
            raise LabError(f"This run's overview does not hold layer {self.layer}", f"It holds {have}", ZOOM[2])
        return [s.layers.index(self.layer)]

    @cached_property
    def _sources(self) -> list[Source]:
        heads = range(self.captures[0].heads) if isinstance(self.head, str) else [self.captures[0].check_head(self.head)]
        return [Source(self.captures[n], h) for n in self._chosen for h in heads]

    def cells(self, kind: str) -> np.ndarray | None:
        """float32 [n, n] largest ("max") or mean ("mean": sum by causal entries) weights, None where they were not kept."""
        s, chosen = self.survey, self._chosen
        one, several = isinstance(self.head, int), len(chosen) > 1
        if kind == "mean":
            if self.head == "max" or several and self.layer == "max":
                return None
            picked = s.mean[chosen]
            return (picked[:, self.head] if one else picked.mean(1)).mean(0)
        if several and self.layer == "mean":
            return None
        if self.head == "mean":
            return s.largest_of_mean[chosen].max(0)
        picked = s.largest[chosen]
        return (picked[:, self.head] if one else picked.max(1)).max(0)

    def view(self, rows, cols, width, height, pool_by, progress=None, cancel=None) -> View:
        """Cells of at least the kept size. Where the asked pooling was not kept, the other one: ``View.pool`` says which.

        Raises:
            LabError: when neither was kept.
        """
        sources = self._sources
        order = [pool_by, "mean" if pool_by == "max" else "max"]
        found = next(((k, c) for k, c in ((k, self.cells(k)) for k in order) if c is not None), None)
        if found is None:
            raise LabError("The kept overview cannot tell this mixture of mean and largest", None, ZOOM[2])
        (kind, cells), t, step = found, self.tokens, self.survey.step
        (r0, r1), (c0, c1) = ((a // step * step, min(t, -(-b // step) * step)) for a, b in (rows or (0, t), cols or (0, t)))
        by = [step * -(-(-(-(b - a) // step)) // n) for a, b, n in ((r0, r1, height), (c0, c1, width))]
        fine, frame = Frame((r0, r1), (c0, c1), step, step), Frame((r0, r1), (c0, c1), *by)
        part = torch.as_tensor(cells[r0 // step : -(-r1 // step), c0 // step : -(-c1 // step)])
        shown = counts.visible(sources, frame)
        if kind == "mean":
            whole = part * counts.causal(fine, 0, "cpu")
            values = pool(whole, by[0] // step, by[1] // step, "sum") / shown.clamp(min=1)
        else:
            values = pool(part, by[0] // step, by[1] // step, "max").clone()
        values = values.float()
        values[shown == 0] = torch.nan
        bits = counts.lowest_bits(sources, frame)
        return View(values.numpy(), counts.evicted(sources, frame).numpy(), None if bits is None else bits.numpy(),
                    frame.rows, frame.cols, *by, self.head, kind)

    def row(self, i: int) -> np.ndarray:
        """Raises LabError: single rows were not kept."""
        raise LabError(*ZOOM)

    def cell(self, i: int, j: int) -> Cell:
        """Raises LabError: single weights were not kept."""
        raise LabError(*ZOOM)


@dataclass(frozen=True)
class Seen:
    """A whole run as it was once drawn in at most 128 x 128 cells (a rollout, a reduction over layers): a ``lens.Lens``."""

    about: Mapping[str, Any]
    codes: np.ndarray
    head: int | str

    @property
    def tokens(self) -> int:
        """Rows and columns."""
        return int(self.about["tokens"])

    def view(self, rows, cols, width, height, pool_by, progress=None, cancel=None) -> View:
        """The kept cells under a window; ``View.pool`` says how they were pooled."""
        t, ry, cx = self.tokens, int(self.about["row_step"]), int(self.about["col_step"])
        (r0, r1), (c0, c1) = rows or (0, t), cols or (0, t)
        y0, y1, x0, x1 = r0 // ry, -(-r1 // ry), c0 // cx, -(-c1 // cx)
        span = Frame((y0 * ry, min(t, y1 * ry)), (x0 * cx, min(t, x1 * cx)), ry, cx)
        values = decode(self.codes[y0:y1, x0:x1])
        values[counts.causal(span, 0, "cpu").numpy() == 0] = np.nan
        return View(values, np.zeros(values.shape, np.uint8), None, span.rows, span.cols, ry, cx, self.head,
                    str(self.about["pool"]), int(self.about.get("group") or 1))

    row, cell = Stored.row, Stored.cell
