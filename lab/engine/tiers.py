"""Moving chosen entries of a layer to narrower tiers, and changing the values of entries where they lie.

A side with several tiers is laid out narrow to wide before the exact rows. `narrow` keeps that order the same on the key
side, the value side and in `meta`: entries that move join the end of their new tier in the order they had.
"""

from __future__ import annotations

from typing import Callable

import torch

from lab.engine.common import Stacked
from lab.engine.layer import LabLayer
from lab.engine.segments import Codec, Coded, Exact

Codecs = Callable[[int], tuple[Codec, Codec]]


def held_bits(layer: LabLayer) -> torch.Tensor:
    """Width of every entry's tier, int64 [B, Hk, longest]; past a lane's end the value is undefined."""
    line = torch.arange(layer.longest, device=layer.device)
    bits = torch.full((layer.batch, layer.heads, layer.longest), Exact.bits, device=layer.device)
    end = layer.exact_k.rows.lens_tensor(layer.device) * 0
    for segment in layer.coded_rows("key"):
        start, end = end, end + segment.rows.lens_tensor(layer.device)
        inside = (line >= start.unsqueeze(-1)) & (line < end.unsqueeze(-1))
        bits = torch.where(inside, segment.bits, bits)
    return bits


def narrow(layer: LabLayer, bits: torch.Tensor, codecs: Codecs, row: int) -> None:
    """Move every entry whose wanted `bits` int [B, Hk, longest] are fewer than it has to the tier of that width.

    codecs(width) gives the (key, value) codecs of a tier that does not exist yet. Codes that share scales over a block of
    rows take whole blocks only; the newest entries beyond the last whole block stay where they are.
    """
    have = held_bits(layer)
    move = bits.to(have.device).long() < have
    valid = layer.valid()
    if valid is not None:
        move &= valid
    widths = torch.unique(bits[move]).tolist() if bool(move.any()) else []
    target = have
    if layer.common is not None and widths and layer.touches(move):
        layer.part()
    for width in widths:
        made = codecs(width)
        flags = move & (bits == width)
        block = max(c.block for c in made)
        if block > 1:
            count = flags.sum(-1, keepdim=True)
            flags = flags & (flags.cumsum(-1) <= count - count % block)
        target = torch.where(flags, width, target)
        for coded, codec in zip((layer.coded_k, layer.coded_v), made):
            if bool(flags.any()) and all(s.bits != width for s in coded):
                coded.append(Coded(codec, layer.batch, layer.heads))
                coded.sort(key=lambda s: s.bits)
    moved = target < have
    if not bool(moved.any()):
        return
    if layer.history is not None:
        pos = layer.positions()
        for width in widths:
            layer.history.coded(pos, width, row, moved & (target == width))
    for side in (layer.keys_side, layer.values_side):
        _move(layer, side, moved, target)
    order = target if valid is None else target.masked_fill(~valid, 2 * Exact.bits)
    layer.part_meta()
    layer.meta.order(order.argsort(dim=-1, stable=True))


def _move(layer: LabLayer, side: list, moved: torch.Tensor, target: torch.Tensor) -> None:
    """Carry the moved entries of one side over; every source is read before anything is written."""
    arriving, leaving = [], []
    start = torch.zeros(layer.batch, layer.heads, 1, dtype=torch.long, device=layer.device)
    for segment, pos in layer.spans(side):
        width = segment.rows.longest
        index = (start + torch.arange(width, device=layer.device)).clamp_max(moved.shape[-1] - 1)
        goes, wanted = moved.gather(2, index), target.gather(2, index)
        valid = segment.rows.valid(layer.device)
        goes = goes if valid is None else goes & valid
        start = start + segment.rows.lens_tensor(layer.device).unsqueeze(-1)
        if not bool(goes.any()):
            continue
        leaving.append((segment, ~goes))
        for goal in (s for s in side if not isinstance(s, Stacked)):
            if goal.bits < segment.bits and bool((goes & (wanted == goal.bits)).any()):
                arriving.append((goal, *_picked(segment, pos, goes & (wanted == goal.bits))))
    for segment, stay in leaving:
        segment.keep(stay, spare=layer.slack if segment is side[-1] else 0)
    for goal, x, pos, inside in arriving:
        goal.append(x, pos, None if bool(inside.all()) else inside)


def _picked(segment, pos: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(vectors [B,Hk,m,d], positions [B,Hk,m], inside [B,Hk,m]) of the flagged rows, packed to the front of each lane."""
    inside = torch.arange(int(flags.sum(-1).max()), device=flags.device) < flags.sum(-1, keepdim=True)
    slots = (~flags).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, : inside.shape[-1]]
    x = segment.decode(pos)
    return x.gather(2, slots.unsqueeze(-1).expand(*slots.shape, x.shape[-1])), pos.gather(2, slots), inside


def replace(layer: LabLayer, side: str, changed: torch.Tensor, x: torch.Tensor) -> None:
    """Give the entries flagged by changed bool [B,Hk,longest] the vectors x [B,Hk,longest,d] on one side.

    Coded entries are encoded again at their own width, so merging into them costs a second rounding. Entries whose code
    shares scales with neighbours (blocks) are left as they are.
    """
    if layer.common is not None and layer.touches(changed):
        layer.part()
    segments = layer.keys_side if side == "key" else layer.values_side
    start = torch.zeros(layer.batch, layer.heads, 1, dtype=torch.long, device=layer.device)
    for segment, pos in layer.spans(segments):
        width = segment.rows.longest
        index = (start + torch.arange(width, device=layer.device)).clamp_max(changed.shape[-1] - 1)
        start = start + segment.rows.lens_tensor(layer.device).unsqueeze(-1)
        flags = changed.gather(2, index)
        valid = segment.rows.valid(layer.device)
        flags = flags if valid is None else flags & valid
        if not bool(flags.any()):
            continue
        counts = flags.sum(-1, keepdim=True)
        inside = torch.arange(int(counts.max()), device=layer.device) < counts
        slots = (~flags).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, : inside.shape[-1]]
        source = index.gather(2, slots)
        new = x.gather(2, source.unsqueeze(-1).expand(*source.shape, x.shape[-1])).to(layer.dtype)
        if isinstance(segment, Exact):
            segment.rows.overwrite({"x": new}, slots, inside)
        elif segment.codec.block == 1:
            rows, _ = segment.codec.encode(new, pos.gather(2, slots))
            segment.rows.overwrite(rows, slots, inside)
