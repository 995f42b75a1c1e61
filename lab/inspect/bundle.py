"""Heads of one layer read together: blocks of their log weights in one batched product, and the log-sum-exp of their rows.

A row's log-sum-exp and an evicted column are two more channels of the product, so that neither costs a pass over the
block; logarithms are to base 2, whose exponential is the cheapest a processor has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lab.errors import LabError
from lab.inspect import scores, store, workers
from lab.inspect.capture import Capture
from lab.inspect.scores import Cancel, Progress

LOG2E = 1 / math.log(2)
GONE = -1e30
"""Log weight of an entry that its rows no longer see: finite, since -inf times 0 has no value, and 2 to it is 0."""
ROWS = 128
_scratch = threading.local()


@dataclass(frozen=True)
class Bundle:
    """Query heads ``heads`` of one layer."""

    capture: Capture
    heads: tuple[int, ...]

    @property
    def grouped(self) -> bool:
        """True when these are all heads in order, so that those of a KV head lie together."""
        return self.heads == tuple(range(self.capture.heads))

    @property
    def kv(self) -> list[int]:
        """The KV head of every lane of the product: one per KV head, or one per head."""
        c = self.capture
        return list(range(c.kv_heads)) if self.grouped else [c.kv_head(h) for h in self.heads]

    def log2(self, rows: tuple[int, int], cols: tuple[int, int], normal: bool = True) -> torch.Tensor:
        """float32 [heads, rows, cols] base-2 logarithms of the weights (``normal``), or of exp(logits).

        At most ``GONE`` where the row cannot see the entry. The block lies in memory that the thread's next call reuses.
        """
        c, (r0, r1), (c0, c1) = self.capture, rows, cols
        check_finite(c)
        plain = c.softcap is None and c.key_bias is None
        n, height, width, d = len(self.heads), r1 - r0, c1 - c0, c.q.shape[2]
        pick = slice(None) if self.grouped else list(self.heads)
        q = torch.empty(n, height, d + 2, device=c.q.device)
        q[..., :d] = c.q[pick, r0:r1]
        q[..., :d].mul_(c.scale * (LOG2E if plain else 1.0))
        q[..., d + 1] = 1.0
        lse = None
        if normal:
            lse = scores.stored_lse(c)[pick, r0:r1]
            if bool(torch.isnan(lse).any()):  # forgotten since: more layers are drawn than the store holds
                lse = _lse_block(self, rows)
            lse = lse * -LOG2E
            lse = torch.where(torch.isposinf(lse), GONE, lse)  # a row that sees nothing
        q[..., d] = lse if plain and normal else 0.0
        lanes = self.kv
        k = torch.empty(len(lanes), width, d + 2, device=q.device)
        k[..., :d] = c.k[:, c0:c1] if self.grouped else c.k[lanes, c0:c1]
        k[..., d], k[..., d + 1] = 1.0, 0.0
        death = None
        if c.death is not None:
            death = c.death[:, c0:c1] if self.grouped else c.death[lanes, c0:c1]
            if plain:
                k[..., d + 1].masked_fill_(death <= r0, GONE)
        s = buffer(n * height * width, q.device).view(len(lanes), n // len(lanes) * height, width)
        torch.bmm(q.view(len(lanes), -1, d + 2), k.transpose(1, 2), out=s)
        s = s.view(n, height, width)
        if not plain:
            self._edit(s, pick, cols, lse)
        self._hide(s, rows, cols, death, r0 if plain else -1)
        return s

    def _edit(self, s: torch.Tensor, pick, cols: tuple[int, int], lse: torch.Tensor | None) -> None:
        """Cap and bias natural logits, then make them base-2 logarithms."""
        c = self.capture
        if c.softcap:
            s.mul_(1 / c.softcap).tanh_().mul_(c.softcap)
        if c.key_bias is not None:
            s.add_(c.key_bias[pick, cols[0] : cols[1]].unsqueeze(1))
        s.mul_(LOG2E)
        if lse is not None:
            s.add_(lse.unsqueeze(-1))

    def _hide(self, s, rows, cols, death: torch.Tensor | None, known: int) -> None:
        """-inf for the future, beyond the window, and where the entry died after row ``known``."""
        c, (r0, r1), (c0, c1) = self.capture, rows, cols
        index = torch.arange(r0, r1, device=s.device, dtype=torch.int32)[:, None]
        if c1 - 1 > r0:
            a = max(c0, r0 + 1)
            s[..., a - c0 :].masked_fill_(torch.arange(a, c1, device=s.device, dtype=torch.int32) > index, -torch.inf)
        if c.window and r1 - 1 - c.window >= c0:
            b = min(c1, r1 - c.window)  # only columns that some row of the block has left behind
            passed = torch.arange(c0, b, device=s.device, dtype=torch.int32) <= index - c.window
            s[..., : b - c0].masked_fill_(passed, -torch.inf)
        if death is None:
            return
        which = torch.nonzero(((death > known) & (death < r1)).any(0)).flatten()
        by_lane = s.view(death.shape[0], -1, *s.shape[1:])
        if 3 * which.numel() > c1 - c0:
            by_lane.masked_fill_((death[:, None, :] <= index)[:, None], -torch.inf)
        elif which.numel():
            gone = (death[:, None, which] <= index)[:, None]
            by_lane[..., which] = by_lane[..., which].masked_fill_(gone, -torch.inf)

    def shape(self, rows: int, step: tuple[int, int] = (1, 1)) -> tuple[int, int]:
        """(rows, columns) of a block: bounded by ``scores.cells``, multiples of ``step``."""
        room = max(1, scores.cells(self.capture) // len(self.heads))
        most = ROWS if self.capture.q.device.type == "cpu" else 1024
        height = max(step[0], min(rows, most, math.isqrt(room)) // step[0] * step[0])
        return height, max(step[1], room // height // step[1] * step[1])


def buffer(size: int, device: torch.device) -> torch.Tensor:
    """float32 [size] of this thread, its content whatever was left in it: fresh memory would cost as much as the product."""
    if device.type != "cpu":
        return torch.empty(size, device=device)
    held = getattr(_scratch, "block", None)
    if held is None or held.numel() < size:
        held = _scratch.block = torch.empty(size)
    return held[:size]


def check_finite(capture: Capture) -> None:
    """Raises LabError, once asked, when queries or keys hold infinities or NaN."""
    key = ((capture.serial,), "finite")
    if store.get(key) is None:
        if not (torch.isfinite(capture.q).all() and torch.isfinite(capture.k).all()):
            raise LabError(
                f"The captured vectors of {capture.title} contain infinities or NaN",
                "Attention can only be drawn from finite numbers",
                "Run again in bfloat16 or float32",
            )
        store.put(key, True, 0)


def spans(capture: Capture, rows: tuple[int, int], cols: tuple[int, int], width: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Column ranges of at most ``width`` (a multiple of ``step``) covering the part of ``cols`` that ``rows`` can see."""
    (r0, r1), (c0, c1) = rows, cols
    last = min(c1, c0 + -(-(min(c1, r1) - c0) // step) * step)
    first = c0
    if capture.window:
        first = max(c0, c0 + (r0 - capture.window + 1 - c0) // step * step)
    for a in range(first, last, width):
        yield a, min(a + width, last)


def know_rows(
    bundles: Sequence[Bundle], rows: tuple[int, int], progress: Progress | None = None, cancel: Cancel | None = None
) -> bool:
    """Compute the log-sum-exp of ``rows`` of every bundle where it is not known; True when there was something to do."""
    todo = []
    for b in bundles:
        lse = scores.stored_lse(b.capture)[slice(None) if b.grouped else list(b.heads), rows[0] : rows[1]]
        missing = torch.nonzero(torch.isnan(lse).any(0)).flatten()
        if missing.numel():
            first, end = rows[0] + int(missing[0]), rows[0] + int(missing[-1]) + 1
            height = b.shape(end - first)[0]
            todo += [(b, (a, min(a + height, end))) for a in range(first, end, height)]

    def one(block: tuple[Bundle, tuple[int, int]]) -> None:
        b, (r0, r1) = block
        scores.stored_lse(b.capture)[list(b.heads), r0:r1] = _lse_block(b, (r0, r1))

    if todo:
        todo.sort(key=lambda block: -block[1][1])  # the longest rows first, so that no thread is left with them
        workers.each(todo, one, bundles[0].capture.q.device, lambda t: len(t[0].heads) * (t[1][1] - t[1][0]) * t[1][1],
                     progress, cancel)
    return bool(todo)


def _lse_block(b: Bundle, rows: tuple[int, int]) -> torch.Tensor:
    """float32 [heads, rows], natural."""
    total = None
    for cols in spans(b.capture, rows, (0, rows[1]), b.shape(rows[1] - rows[0])[1]):
        s = b.log2(rows, cols, normal=False)
        top = s.amax(-1).clamp_(min=GONE)
        part = s.sub_(top.unsqueeze(-1)).exp2_().sum(-1).log2_().add_(top)
        total = part if total is None else torch.logaddexp2(total, part)
    return torch.where(total < GONE / 10, -torch.inf, total / LOG2E)
