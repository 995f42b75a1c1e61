"""Logits of a block of rows and columns of one head, and the log-sum-exp of rows: the two things every view is made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import store
from lab.inspect.capture import NEVER, Capture

CELLS_CPU = 1 << 20
"""Cells of one block on a CPU: 4 MiB of float32 stays in the cache and is enough work for two threads."""
CELLS_GPU = 1 << 26
_lse_lock = threading.Lock()

Progress = Callable[[float], None]
Cancel = Callable[[], bool]


class Cancelled(LabError):
    """The caller's ``cancel`` returned True; nothing was lost, what was computed stays stored."""

    def __init__(self) -> None:
        super().__init__("The drawing was cancelled")


def cells(capture: Capture) -> int:
    """How many cells a block of this capture may have."""
    return CELLS_CPU if capture.q.device.type == "cpu" else CELLS_GPU


def logits(capture: Capture, head: int, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    """float32 [rows, cols] logits of one block, -inf where the row cannot see the entry."""
    (r0, r1), (c0, c1) = rows, cols
    kv = capture.kv_head(head)
    s = capture.queries(head)[r0:r1] @ capture.keys(kv)[c0:c1].T
    if capture.softcap:
        s.mul_(1 / capture.softcap).tanh_().mul_(capture.softcap)
    if capture.key_bias is not None:
        s.add_(capture.key_bias[head, c0:c1])
    index = torch.arange(r0, r1, device=s.device, dtype=torch.int32)[:, None]
    if c1 - 1 > r0:
        a = max(c0, r0 + 1)
        s[:, a - c0 :].masked_fill_(
            torch.arange(a, c1, device=s.device, dtype=torch.int32) > index, -torch.inf
        )
    if capture.window and r1 - 1 - capture.window >= c0:
        # Only columns that some row of the block has left behind need the elementwise comparison.
        b = min(c1, r1 - capture.window)
        s[:, : b - c0].masked_fill_(
            torch.arange(c0, b, device=s.device, dtype=torch.int32) <= index - capture.window, -torch.inf
        )
    if capture.death is not None:
        death = capture.death[kv, c0:c1]
        gone = torch.nonzero(death < r1).flatten()
        if 3 * gone.numel() > c1 - c0:
            s.masked_fill_(death <= index, -torch.inf)
        elif gone.numel():
            s[:, gone] = s[:, gone].masked_fill_(death[gone] <= index, -torch.inf)
    return s


def visible_until(capture: Capture, head: int, cols: tuple[int, int] | None = None) -> torch.Tensor | None:
    """int32 [cols]: first row that no longer sees each entry, or None when every entry of the run stays visible."""
    if capture.death is None and not capture.window and capture.key_bias is None:
        return None
    device, (a, b) = capture.q.device, cols or (0, capture.tokens)
    end = torch.full((b - a,), NEVER, dtype=torch.int32, device=device)
    if capture.death is not None:
        end = torch.minimum(end, capture.death[capture.kv_head(head), a:b])
    if capture.window:
        end = torch.minimum(end, torch.arange(a, b, device=device, dtype=torch.int32) + capture.window)
    if capture.key_bias is not None:
        end = torch.where(torch.isneginf(capture.key_bias[head, a:b]), 0, end).to(torch.int32)
    return end


def lse_rows(capture: Capture, head: int, rows: tuple[int, int]) -> torch.Tensor:
    """float32 [rows] log-sum-exp of the visible logits; computed once per row, -inf where nothing is visible."""
    return lse_whole(capture, head, rows)[rows[0] : rows[1]]


def lse_whole(capture: Capture, head: int, rows: tuple[int, int]) -> torch.Tensor:
    """float32 [T] the log-sum-exp of every row, of which only ``rows`` are sure to be known; the others may be NaN."""
    from lab.inspect.bundle import Bundle, know_rows

    know_rows([Bundle(capture, (head,))], rows)
    return stored_lse(capture)[head]


def stored_lse(capture: Capture) -> torch.Tensor:
    """float32 [Hq, T] natural log of the sum of exponentials of each row's visible logits, NaN where not yet computed."""
    key = ((capture.serial,), "lse")
    with _lse_lock:
        lse = store.get(key)
        if lse is None:
            lse = torch.full((capture.heads, capture.tokens), torch.nan, device=capture.q.device)
            store.put(key, lse, lse.nbytes)
    return lse


def row_lse(capture: Capture, head: int) -> np.ndarray:
    """float32 [T]: natural log of the sum of exponentials of each row's visible logits (-inf: nothing visible)."""
    return lse_rows(capture, capture.check_head(head), (0, capture.tokens)).cpu().numpy().copy()


def log_weights(capture: Capture, head: int, rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    """float32 [rows, cols] natural log of the attention weights, -inf where the row cannot see the entry."""
    lse = lse_rows(capture, head, rows)
    lse = torch.where(torch.isneginf(lse), torch.inf, lse)
    return logits(capture, head, rows, cols).sub_(lse[:, None])


def weights(
    capture: Capture, head: int, rows: tuple[int, int], cols: tuple[int, int] | None = None
) -> torch.Tensor:
    """float32 [rows, cols] attention weights, 0 where the row cannot see the entry; keep the block small."""
    return log_weights(capture, head, rows, cols or (0, capture.tokens)).exp_()


def row_blocks(capture: Capture, rows: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges small enough that a block of all columns is bounded."""
    r0, r1 = rows or (0, capture.tokens)
    size = max(1, min(512, cells(capture) // r1))
    for a in range(r0, r1, size):
        yield a, min(a + size, r1)
