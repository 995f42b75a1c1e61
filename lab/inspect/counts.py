"""How many entries a cell holds, shows and has lost: counted per entry, without looking at single weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lab.inspect.capture import NEVER
from lab.inspect.pooled import Frame, Source
from lab.inspect.scores import visible_until


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


def _since(frame: Frame, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """int64 [h, w] rows of each cell at or after ``start``, summed over entries that lie in cell columns ``x`` (both [m])."""
    (r0, r1), step = frame.rows, frame.row_step
    inside = start < r1
    x, start = x[inside], start[inside].clamp(min=r0)
    y = (start - r0) // step
    where, size = y * frame.w + x, frame.h * frame.w
    begun = torch.bincount(where, minlength=size).view(frame.h, frame.w)
    rest = (r0 + (y + 1) * step).clamp(max=r1) - start
    first = torch.bincount(where, weights=rest.double(), minlength=size).view(frame.h, frame.w).long()
    lo = torch.arange(r0, r1, step, device=x.device)
    height = ((lo + step).clamp(max=r1) - lo)[:, None]
    return first + (begun.cumsum(0) - begun) * height


def _between(frame: Frame, x: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """int64 [h, w] rows of each cell in ``start`` to ``end``, summed over entries."""
    return _since(frame, x, start) - _since(frame, x, torch.maximum(start, end))


def _lanes(sources: Sequence[Source]) -> dict[tuple[int, int], list[Source]]:
    """Sources by (capture, KV head): those of one lane lose the same entries."""
    out: dict[tuple[int, int], list[Source]] = {}
    for s in sources:
        out.setdefault((s.capture.serial, s.capture.kv_head(s.head)), []).append(s)
    return out


def _ends(sources: Sequence[Source], c0: int, c1: int) -> list[torch.Tensor] | None:
    """int64 [c1 - c0] first row that no longer sees each entry, per lane or head; None when one of them sees all for good."""
    out = []
    for lane in _lanes(sources).values():
        for s in lane if lane[0].capture.key_bias is not None else lane[:1]:
            end = visible_until(s.capture, s.head, (c0, c1))
            if end is None:
                return None
            out.append(end.long())
    return out


def visible(sources: Sequence[Source], frame: Frame) -> torch.Tensor:
    """int64 [h, w] entries of each cell that their row sees in at least one source."""
    device = sources[0].capture.q.device
    whole, (c0, c1) = causal(frame, 0, device), frame.cols
    ends = _ends(sources, c0, c1)
    if ends is None:
        return whole
    columns = torch.arange(c0, c1, device=device)
    end = torch.maximum(torch.stack(ends).amax(0), columns)  # an end before its own row hides the entry from everyone
    return whole - _since(frame, (columns - c0) // frame.col_step, end)


def evicted(sources: Sequence[Source], frame: Frame) -> torch.Tensor:
    """uint8 [h, w] share of each cell's causal, in-window entries that the cache had evicted, 0..255, never rounded to 0.

    With several sources the share is over all of them; 255 means all.
    """
    device = sources[0].capture.q.device
    (c0, c1), columns = frame.cols, torch.arange(*frame.cols, device=device)
    x = (columns - c0) // frame.col_step
    total, lost = (torch.zeros(frame.h, frame.w, dtype=torch.int64, device=device) for _ in range(2))
    alike: dict[tuple[int, int | None], list[Source]] = {}
    for lane in _lanes(sources).values():
        alike.setdefault((len(lane), lane[0].capture.window), []).append(lane[0])
    for (count, window), lanes in alike.items():
        reach = causal(frame, 0, device) - (causal(frame, window, device) if window else 0)
        total += reach * (count * len(lanes))
        deaths = [s.capture.death[s.capture.kv_head(s.head), c0:c1] for s in lanes if s.capture.death is not None]
        if deaths:
            death = torch.maximum(torch.stack(deaths).long(), columns)
            until = (columns + window if window else torch.full_like(columns, NEVER)).expand_as(death)
            lost += _between(frame, x.expand_as(death).flatten(), death.flatten(), until.flatten()) * count
    share = (lost * 255 + total.clamp(min=1) - 1) // total.clamp(min=1)
    share = torch.where((share == 255) & (lost < total), 254, share)
    return share.to(torch.uint8)


def lowest_bits(sources: Sequence[Source], frame: Frame) -> torch.Tensor | None:
    """uint8 [h, w] fewest bits in which an entry of the cell was read (16 = exact), or None when no source knows.

    Entries count while they are visible; an entry is narrow from its demotion row on, or always when that is unknown.
    """
    known = [lane[-1] for lane in _lanes(sources).values() if lane[-1].capture.bits is not None]
    if not known:
        return None
    device, (c0, c1) = sources[0].capture.q.device, frame.cols
    out = torch.full((frame.h, frame.w), 16, dtype=torch.uint8, device=device)
    columns = torch.arange(c0, c1, device=device)
    bits = torch.stack([s.capture.bits[s.capture.kv_head(s.head), c0:c1] for s in known])
    widths = sorted({int(b) for b in bits.unique()} - {0, 16}, reverse=True)
    if not widths:
        return out
    first, end = [], []
    for s in known:
        c, kv = s.capture, s.capture.kv_head(s.head)
        first.append(columns if c.demoted is None else torch.maximum(columns, c.demoted[kv, c0:c1].long()))
        until = visible_until(c, s.head, (c0, c1))
        end.append(torch.full_like(columns, NEVER) if until is None else until.long())
    first, end = torch.stack(first), torch.stack(end)
    x = ((columns - c0) // frame.col_step).expand_as(bits)
    for width in widths:
        which = bits == width
        read = _between(frame, x[which], first[which], end[which]) > 0
        out[read] = out[read].clamp(max=width)
    return out
