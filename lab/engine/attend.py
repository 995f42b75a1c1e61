"""Attention of new rows over a layer's stored entries: the fast paths and the general one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels import cpu_attention as core
from kernels.merge import merge, scale_columns, sink_logit
from lab.engine.common import stacked, unstacked
from lab.engine.context import LayerContext
from lab.engine.slots import Band, ColumnBias, EntryBias, Shift

ROWS = 128  # query rows per block of the general path: bounds the logits to [B, Hk, G*ROWS, N]


@dataclass
class Result:
    """out [B,Hq,T,d]; lse [B,Hq,T] or None; mass [B,Hk,N] the attention each stored entry got from these rows."""

    out: torch.Tensor
    lse: torch.Tensor | None
    mass: torch.Tensor | None = None
    last: torch.Tensor | None = None


def prompt_rows(ctx: LayerContext, k: torch.Tensor, v: torch.Tensor, band: Band | None) -> Result:
    """Rows of a prompt whose keys and values are all exact and unpadded. k, v [B,Hk,T,d] are the new rows.

    Uses the structure (causal, window, band) instead of masks, so work follows what is read.
    """
    store, q = ctx.store, ctx.q
    keys, values = store.exact_k.decode(), store.exact_v.decode()
    if band is not None:
        first = ctx.first - store.base
        out, lse = core.band(q, keys, values, ctx.scale, sinks=band.sinks, window=band.window, start=first)
        return Result(out, lse)
    out, lse = core.grouped_causal(q, k, v, ctx.scale)
    past = keys.shape[2] - k.shape[2]
    if past:
        grouped = q.unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3)
        old, old_lse = core.plain(grouped, keys[:, :, :past], values[:, :, :past], ctx.scale)
        shape = (ctx.groups, q.shape[2])
        old, old_lse = old.unflatten(2, shape).flatten(1, 2), old_lse.unflatten(2, shape).flatten(1, 2)
        out, lse = merge([old, out], [old_lse, lse])
    return Result(out, lse)


def one_row(ctx: LayerContext) -> Result:
    """A decode step over exact rows, nothing observed: flash attention with the group's query heads packed as rows."""
    store = ctx.store
    if store.split is not None:
        return _split_row(ctx)
    keys, values = store.exact_k.decode(), store.exact_v.decode()
    if ctx.window and keys.shape[2] > ctx.window:
        keys, values = keys[:, :, -ctx.window :], values[:, :, -ctx.window :]
    store.last_read = keys.shape[2] * store.heads * store.batch
    q = ctx.q.reshape(ctx.q.shape[0], ctx.kv_heads, ctx.groups, -1)
    out, lse = core.plain(q, keys, values, ctx.scale)
    return Result(out.reshape(*ctx.q.shape[:3], -1), lse.reshape(ctx.q.shape[:3]))


def _split_row(ctx: LayerContext) -> Result:
    store, shape = ctx.store, ctx.q.shape
    q = ctx.q.reshape(shape[0], ctx.kv_heads, ctx.groups, -1)
    out, lse = samples_row(q, store.split, store.exact_k.decode(), store.exact_v.decode(), ctx.scale)
    store.last_read = sum(store.counts)
    return Result(out.reshape(*shape[:3], -1), lse.reshape(shape[:3]))


def samples_row(
    q: torch.Tensor, common: tuple, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B,Hk,G,d], lse [B,Hk,G]) of one row per sample over the exact rows they have in common and over their own.

    q [B,Hk,G,d]; common (keys, values), segments of one sequence; keys, values [B,Hk,n,d]. The common rows are read once, for
    the rows of all samples together; the two parts are merged exactly. mask: additive, [1,Hk,G,N] on the common rows, where
    lanes hold equally many.
    """
    batch, rows = q.shape[0], stacked(q)
    if common[0].rows.level:
        mask = None if mask is None else mask.repeat(1, 1, batch, 1)
        found = core.plain(rows, common[0].decode(), common[1].decode(), scale, mask=mask)
    else:
        lanes = [[s.rows.lane("x", h)[None, None] for s in common] for h in range(rows.shape[1])]
        heads = [core.plain(rows[:, h : h + 1], k, v, scale) for h, (k, v) in enumerate(lanes)]
        found = [torch.cat(parts, 1) for parts in zip(*heads)]
    first, first_lse = (unstacked(x, batch) for x in found)
    if not keys.shape[2]:
        return first, first_lse
    rest, rest_lse = core.plain(q, keys, values, scale)
    share = torch.sigmoid(rest_lse - first_lse)
    return torch.lerp(first, rest, share.to(first.dtype).unsqueeze(-1)), torch.logaddexp(first_lse, rest_lse)


def general(ctx: LayerContext, bands: list[Band], edits: list, want_mass: bool, want_last: bool) -> Result:
    """Any rows over any mixture of segments: logits per segment, one softmax, values mixed per segment."""
    store, q = ctx.store, ctx.q
    rows, groups, kv = q.shape[2], ctx.groups, ctx.kv_heads
    pos, valid = store.positions(), store.valid()
    pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.first + rows, device=q.device)[None]
    shift = next((e for e in edits if isinstance(e, Shift)), None)
    biases = [e for e in edits if isinstance(e, ColumnBias)]
    simple = rows == 1 and valid is None and ctx.pos_q is None and not bands and not ctx.window
    outs, lses, mass, last = [], [], None, None
    for r0 in range(0, rows, ROWS):
        block = q[:, :, r0 : r0 + ROWS]
        count = block.shape[2]
        packed = block.unflatten(1, (kv, groups)).flatten(2, 3)
        s = _logits(ctx, packed, pos, shift).float().mul_(ctx.scale)
        if ctx.softcap:
            s = ctx.softcap * torch.tanh(s / ctx.softcap)
        s = s.unflatten(2, (groups, count))  # [B,Hk,G,T,N]
        for edit in biases:
            bias = edit.bias.to(s.device).view(kv, groups)[None, :, :, None, None]
            s = torch.where((pos == edit.position)[:, :, None, None, :], s + bias, s)
        for edit in edits:
            if isinstance(edit, EntryBias):
                s = s + edit.bias[:, :, None, None, :]
        if not simple:
            s = s.masked_fill(_hidden(pos, valid, pos_q[:, r0 : r0 + ROWS], ctx.window, bands), -torch.inf)
        p, lse = core.softmax(s)
        if ctx.sink is not None:
            p, lse = (x.unflatten(1, (kv, groups)) for x in sink_logit(p.flatten(1, 2), lse.flatten(1, 2), ctx.sink))
        outs.append(_mix(ctx, p.flatten(2, 3), pos).unflatten(2, (groups, count)).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
        if want_mass:
            got = p.sum((2, 3))
            mass = got if mass is None else mass + got
        last = p[:, :, :, -1].flatten(1, 2) if want_last else None
    store.last_read = sum(store.counts)
    return Result(torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2), mass, last)


def biased_columns(ctx: LayerContext, result: Result, edits: list[ColumnBias]) -> Result:
    """Apply column biases to a finished prompt attention, exactly, without a second pass over the keys."""
    store = ctx.store
    keys, values = store.exact_k.decode(), store.exact_v.decode()
    q = ctx.q.unflatten(1, (ctx.kv_heads, ctx.groups))
    out, lse = result.out.unflatten(1, (ctx.kv_heads, ctx.groups)), result.lse.unflatten(1, (ctx.kv_heads, ctx.groups))
    rows = torch.arange(ctx.first, ctx.first + ctx.q.shape[2], device=q.device)
    for edit in edits:
        column = edit.position - store.base
        if not 0 <= column < keys.shape[2]:
            continue
        k, v = keys[:, :, None, column : column + 1], values[:, :, None, column : column + 1]
        s = (q @ k.mT).float() * ctx.scale
        hidden = rows < edit.position
        if ctx.window:
            hidden = hidden | (rows - edit.position >= ctx.window)
        s = s.masked_fill(hidden[:, None], -torch.inf)
        bias = edit.bias.to(s.device).view(1, ctx.kv_heads, ctx.groups, 1, 1)
        out, lse = scale_columns(out, lse, s, v, bias)
    return Result(out.flatten(1, 2), lse.flatten(1, 2), result.mass, result.last)


def dense_rows(ctx: LayerContext, rows: torch.Tensor, edits: list) -> torch.Tensor:
    """Outputs [B,Hq,R,d] of chosen rows (int64 [R], counted within this call) over every key they may see, under the
    same edits as the rows they stand beside."""
    place = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=ctx.q.device)[None]
    return general(replace(ctx, q=ctx.q[:, :, rows], pos_q=place[:, rows]), [], edits, False, False).out


def _logits(ctx: LayerContext, q: torch.Tensor, pos: torch.Tensor, shift: Shift | None) -> torch.Tensor:
    side = ctx.store.keys_side
    if len(side) == 1:
        s = side[0].logits(q)
    else:
        s = _joined(ctx, q)
    return s if shift is None else _shifted(ctx, s, q, pos, shift)


def _shifted(ctx: LayerContext, s: torch.Tensor, q: torch.Tensor, pos: torch.Tensor, shift: Shift) -> torch.Tensor:
    """s [B,Hk,R,N] with the logits of the keys before position shift.before replaced by those of the turned keys."""
    store = ctx.store
    valid = store.valid()
    place = pos if valid is None else pos.masked_fill(~valid, torch.iinfo(torch.int64).max)
    place, slot = place.topk(min(shift.before, pos.shape[-1]), dim=-1, largest=False)
    delta = shift.delta if isinstance(shift.delta, int) else shift.delta.unsqueeze(-1)
    keys = store.all_keys()
    keys = keys.gather(2, slot.unsqueeze(-1).expand(*slot.shape, keys.shape[-1]))
    turned = ctx.rope.rotate(q, -delta) @ keys.to(q.dtype).mT
    at = slot.unsqueeze(2).expand(turned.shape)
    return s.scatter(-1, at, torch.where((place < shift.before).unsqueeze(2), turned, s.gather(-1, at)))


def _joined(ctx: LayerContext, q: torch.Tensor) -> torch.Tensor:
    """Per-segment logits of q [B,Hk,R,d] in logical order [B,Hk,R,N], lane by lane where lanes are uneven."""
    used = ctx.store.spans(ctx.store.keys_side)
    blocks = [seg.logits(q, where) for seg, where in used]
    if len(used) == 1:
        return blocks[0]
    if all(seg.rows.level for seg, _ in used):
        return torch.cat(blocks, -1)
    store = ctx.store
    out = blocks[0].new_zeros(store.batch, store.heads, q.shape[2], store.longest)
    for lane in range(store.batch * store.heads):
        b, h = divmod(lane, store.heads)
        at = 0
        for (seg, _), block in zip(used, blocks):
            n = seg.rows.lens[lane]
            out[b, h, :, at : at + n] = block[b, h, :, :n]
            at += n
    return out


def _mix(ctx: LayerContext, p: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    store = ctx.store
    p = p.to(store.dtype)
    side = [seg for seg in store.values_side if seg.rows.longest]
    if len(side) == 1:
        return side[0].mix(p, pos)
    total, starts = 0, [0] * (store.batch * store.heads)
    for seg in side:
        width = seg.rows.longest
        if all(s == starts[0] for s in starts) and seg.rows.level:
            part, where = p[..., starts[0] : starts[0] + width], pos[:, :, starts[0] : starts[0] + width]
        else:
            part, where = p.new_zeros(*p.shape[:3], width), pos.new_zeros(*pos.shape[:2], width)
            for lane, n in enumerate(seg.rows.lens):
                b, h = divmod(lane, store.heads)
                part[b, h, :, :n] = p[b, h, :, starts[lane] : starts[lane] + n]
                where[b, h, :n] = pos[b, h, starts[lane] : starts[lane] + n]
        total = total + seg.mix(part, where)
        starts = [s + n for s, n in zip(starts, seg.rows.lens)]
    return total


def _hidden(
    pos: torch.Tensor, valid: torch.Tensor | None, pos_q: torch.Tensor, window: int | None, bands: list[Band]
) -> torch.Tensor:
    """bool [B,Hk,1,T,N]: what a row may not read."""
    j, i = pos[:, :, None, None, :], pos_q[:, None, None, :, None]
    hidden = j > i
    if window:
        hidden = hidden | (i - j >= window)
    for band in bands:
        hidden = hidden | ((j >= band.sinks) & (i - j >= band.window))
    return hidden if valid is None else hidden | ~valid[:, :, None, None, :]


def single_band(bands: list[Band], window: int | None, seen: int) -> tuple[bool, Band | None]:
    """(possible, band): the one band that bands and a sliding window amount to; None means full causal attention.

    Bands intersect to a band only when they are nested; where they are not, the general path masks them.
    """
    found = [b for b in bands if b.window < seen]
    if window and window < seen:
        found.append(Band(0, window))
    found.sort(key=lambda b: (b.window, b.sinks))
    if any(a.sinks > b.sinks for a, b in zip(found, found[1:])):
        return False, None
    return True, found[0] if found else None
