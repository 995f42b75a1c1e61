"""How many entries a cell holds, shows and has lost: counted per column, without looking at single weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lab.inspect.pooled import Frame, Source
from lab.inspect.scores import visible_until

_CHUNK = 1 << 22


def causal(frame: Frame, shift: int, device) -> torch.Tensor:
    """int64 [h, w] entries (i, j) of each cell with ``j + shift <= i``, in closed form."""
    (r0, r1), (c0, c1) = frame.rows, frame.cols
    a = torch.arange(r0, r1, frame.row_step, device=device)[:, None]
    b = (a + frame.row_step).clamp(max=r1)
    c = torch.arange(c0, c1, frame.col_step, device=device) + shift
    d = (c + frame.col_step).clamp(max=c1 + shift)
    return _triangle(b - c) - _triangle(a - c) - _triangle(b - d) + _triangle(a - d)


def _triangle(n: torch.Tensor) -> torch.Tensor:
    n = n.clamp(min=0)
    return n * (n + 1) // 2


def _columns(frame: Frame, first: torch.Tensor, end: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """int64 [h, w] rows i of each cell with ``first[j] <= i < end[j]``, summed over the columns ``which``."""
    (r0, r1), (c0, _) = frame.rows, frame.cols
    device = which.device
    out = torch.zeros(frame.w, frame.h, dtype=torch.int64, device=device)
    lo = torch.arange(r0, r1, frame.row_step, device=device)
    hi = (lo + frame.row_step).clamp(max=r1)
    for part in which.split(max(1, _CHUNK // max(1, frame.h))):
        top = torch.maximum(lo, first[part].long()[:, None])
        bottom = torch.minimum(hi, end[part].long()[:, None])
        out.index_add_(0, (part - c0) // frame.col_step, (bottom - top).clamp_(min=0))
    return out.T


def visible(sources: Sequence[Source], frame: Frame) -> torch.Tensor:
    """int64 [h, w] entries of each cell that their row sees in at least one source."""
    device = sources[0].capture.q.device
    whole = causal(frame, 0, device)
    end = None
    for s in sources:
        one = visible_until(s.capture, s.head)
        if one is None:
            return whole
        end = one if end is None else torch.maximum(end, one)
    c0, c1 = frame.cols
    columns = torch.arange(end.shape[0], device=device)
    limited = torch.nonzero(end[c0:c1] < frame.rows[1]).flatten() + c0
    # A column's end before its own row hides the entry from everyone.
    return whole - _columns(frame, torch.maximum(columns, end), torch.full_like(end, 2**31 - 1), limited)


def evicted(sources: Sequence[Source], frame: Frame) -> torch.Tensor:
    """uint8 [h, w] share of each cell's causal, in-window entries that the cache had evicted, 0..255, never
    rounded to 0.

    With several sources the share is over all of them; 255 means all.
    """
    device = sources[0].capture.q.device
    lost = torch.zeros(frame.h, frame.w, dtype=torch.int64, device=device)
    seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    total = torch.zeros_like(lost)
    for s in sources:
        c = s.capture
        key = (c.serial, c.kv_head(s.head))
        if key not in seen:
            reach = causal(frame, 0, device) - (causal(frame, c.window, device) if c.window else 0)
            gone = torch.zeros_like(lost)
            if c.death is not None:
                columns = torch.arange(c.tokens, device=device)
                death = c.death[key[1]]
                which = (
                    torch.nonzero(death[frame.cols[0] : frame.cols[1]] < frame.rows[1]).flatten()
                    + frame.cols[0]
                )
                until = columns + c.window if c.window else torch.full_like(columns, 2**31 - 1)
                if which.numel():
                    gone = _columns(frame, torch.maximum(columns, death), until, which)
            seen[key] = (reach, gone)
        total += seen[key][0]
        lost += seen[key][1]
    share = (lost * 255 + total.clamp(min=1) - 1) // total.clamp(min=1)
    share = torch.where((share == 255) & (lost < total), 254, share)
    return share.to(torch.uint8)


def lowest_bits(sources: Sequence[Source], frame: Frame) -> torch.Tensor | None:
    """uint8 [h, w] fewest bits in which an entry of the cell was read (16 = exact), or None when no source
    knows.

    Entries count while they are visible; an entry is narrow from its demotion row on, or always when that is
    unknown.
    """
    known = {(s.capture.serial, s.capture.kv_head(s.head)): s for s in sources if s.capture.bits is not None}
    if not known:
        return None
    device = sources[0].capture.q.device
    out = torch.full((frame.h, frame.w), 16, dtype=torch.uint8, device=device)
    c0, c1 = frame.cols
    for (_, kv), s in known.items():
        c = s.capture
        columns = torch.arange(c.tokens, device=device)
        first = columns if c.demoted is None else torch.maximum(columns, c.demoted[kv])
        end = visible_until(c, s.head)
        end = torch.full_like(columns, 2**31 - 1) if end is None else end
        for bits in sorted({int(b) for b in c.bits.unique()} - {0, 16}, reverse=True):
            which = torch.nonzero(c.bits[kv, c0:c1] == bits).flatten() + c0
            if which.numel():
                read = _columns(frame, first, end, which) > 0
                out[read] = out[read].clamp(max=bits)
    return out
