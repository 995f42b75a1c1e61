"""Attention that fetches only the entries chosen by the `select` slot, and weighs them by the `weigh` slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch

from kernels import cpu_attention as core
from kernels.merge import sink_logit
from lab.engine.attend import Result
from lab.engine.context import LayerContext
from lab.engine.layer import LabLayer
from lab.engine.reads import Pick, Place, Rows, Weighed
from lab.engine.slots import Band, ColumnBias, Shift

ROWS = 64  # prompt rows that share one fetch: fewer read less, more run faster
Weigh = Callable[[LayerContext, torch.Tensor, Place], Weighed]


def attend(
    ctx: LayerContext, bands: list[Band], chosen: list[Pick | Rows], edits: list, weigh: Weigh | None, want_mass: bool,
    want_last: bool,
) -> Result:
    """Rows of ctx over the entries that bands and chosen leave (their intersection), in blocks of ROWS rows.

    Sets the layer's read ledger for the newest row.
    """
    store, q = ctx.store, ctx.q
    pos, valid = store.positions(), store.valid()
    pos_q = ctx.pos_q if ctx.pos_q is not None else torch.arange(ctx.first, ctx.row + 1, device=q.device)[None]
    mass = torch.zeros(pos.shape, dtype=torch.float32, device=q.device) if want_mass else None
    outs, lses, last = [], [], None
    direct = _direct(ctx, bands, chosen, valid)
    for r0 in range(0, q.shape[2], ROWS):
        r1 = min(r0 + ROWS, q.shape[2])
        if direct is not None:
            slots, used, keep = direct.index, direct.used, None
        else:
            keep = _visible(ctx, pos, valid, pos_q[:, r0:r1], bands, chosen, r0, r1)
            slots, used, keep = _columns(store, keep)
        out, lse, p = _block(ctx, (r0, r1), pos_q[:, r0:r1], pos, slots, used, keep, edits, weigh)
        outs.append(out)
        lses.append(lse)
        if want_mass:
            got = p.sum((2, 3))
            mass = mass + got if slots is None else mass.scatter_add(2, slots, got)
        if want_last and r1 == q.shape[2]:
            last = p[:, :, :, -1]
            if slots is not None:
                last = last.new_zeros(*last.shape[:3], pos.shape[2]).scatter_(3, slots[:, :, None].expand(last.shape), last)
            last = last.flatten(1, 2)
    store.last_probe = sum(c.probe for c in chosen)
    return Result(torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2), mass, last)


def fetch(store: LabLayer, side: str, slots: torch.Tensor | None) -> torch.Tensor:
    """Stored rows of side "key" or "value" at slots int64 [B, Hk, n], decoded: [B, Hk, n, d]; None fetches all."""
    segments = store.keys_side if side == "key" else store.values_side
    if slots is None:
        return store.all_keys() if side == "key" else store.all_values()
    start = torch.zeros(store.batch, store.heads, 1, dtype=torch.long, device=slots.device)
    out = None
    for segment in segments:
        rows = segment.rows
        if rows.longest == 0:
            continue
        lens = rows.lens_tensor(slots.device).unsqueeze(-1)
        inside = slots - start
        here = (inside >= 0) & (inside < lens)
        firsts = torch.tensor(rows.starts, device=slots.device).view(store.batch, store.heads, 1)
        flat = (firsts + inside.clamp_min(0).minimum((lens - 1).clamp_min(0))).flatten()
        fields = {n: f.index_select(0, flat).unflatten(0, slots.shape) for n, f in rows.fields.items()}
        if hasattr(segment, "codec"):
            ids = fields.pop("block", None)
            where = store.positions().gather(2, slots)
            got = segment.codec.decode(fields, segment._per_row(ids), where).to(store.dtype)
        else:
            got = fields["x"]
        out = got if out is None else torch.where(here.unsqueeze(-1), got, out)
        start = start + lens
    return out


def _direct(ctx: LayerContext, bands: list, chosen: list, valid) -> Pick | None:
    """The one index list that decides everything, where there is one."""
    one = len(chosen) == 1 and isinstance(chosen[0], Pick) and chosen[0].index is not None
    return chosen[0] if one and not bands and not ctx.window and valid is None and ctx.pos_q is None else None


def _visible(
    ctx: LayerContext, pos: torch.Tensor, valid: torch.Tensor | None, pos_q: torch.Tensor, bands: list[Band],
    chosen: list[Pick | Rows], r0: int, r1: int,
) -> torch.Tensor:
    """bool [B, Hk, G|1, R|1, N] of what each row reads."""
    j, i = pos[:, :, None, None, :], pos_q[:, None, None, :, None]
    keep = j <= i
    if ctx.window:
        keep = keep & (i - j < ctx.window)
    for band in bands:
        keep = keep & ((j < band.sinks) | (i - j < band.window))
    if valid is not None:
        keep = keep & valid[:, :, None, None, :]
    for choice in chosen:
        if isinstance(choice, Rows):
            keep = keep & choice.keep(r0, r1)
        elif choice.keep is not None:
            flags = choice.keep
            per_query = flags.shape[1] == ctx.heads and ctx.groups > 1
            flags = flags.unflatten(1, (ctx.kv_heads, ctx.groups)) if per_query else flags.unsqueeze(2)
            keep = keep & flags.unsqueeze(3)
        else:
            flags = torch.zeros(pos.shape, dtype=torch.bool, device=pos.device)
            used = torch.ones_like(choice.index, dtype=torch.bool) if choice.used is None else choice.used
            flags = flags.to(torch.uint8).scatter_reduce(2, choice.index, used.to(torch.uint8), "amax").bool()
            keep = keep & flags[:, :, None, None]
    return keep


def _columns(store: LabLayer, keep: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(slots [B, Hk, n] read by any row, used [B, Hk, n], keep gathered to those columns); slots None for all."""
    any_row = keep.any(3).any(2).expand(store.batch, store.heads, -1)
    counts = any_row.sum(-1)
    most = int(counts.max())
    if most == keep.shape[-1] or (keep.shape[3] > 1 and most > 0.75 * keep.shape[-1]):  # a view is cheaper to read
        return None, None, keep
    slots = (~any_row).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, :most]
    used = torch.arange(most, device=keep.device) < counts.unsqueeze(-1)
    shape = (*slots.shape[:2], *keep.shape[2:4], most)
    wide = keep.expand(*slots.shape[:2], *keep.shape[2:])
    return slots, used, wide.gather(4, slots[:, :, None, None].expand(shape))


def _block(
    ctx: LayerContext, span: tuple[int, int], pos_q: torch.Tensor, pos: torch.Tensor, slots: torch.Tensor | None,
    used: torch.Tensor | None, keep: torch.Tensor | None, edits: list, weigh: Weigh | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [B,Hq,R,d], lse [B,Hq,R], p [B,Hk,G,R,n]) of one block of rows over the fetched columns."""
    q = ctx.q[:, :, span[0] : span[1]]
    store, groups, rows = ctx.store, ctx.groups, q.shape[2]
    keys = fetch(store, "key", slots)
    where = pos if slots is None else pos.gather(2, slots)
    packed = q.unflatten(1, (ctx.kv_heads, groups)).flatten(2, 3)
    s = packed @ keys.to(q.dtype).mT
    for shift in (e for e in edits if isinstance(e, Shift)):
        delta = shift.delta if isinstance(shift.delta, int) else shift.delta.unsqueeze(-1)
        s = torch.where((where < shift.before)[:, :, None], ctx.rope.rotate(packed, -delta) @ keys.to(q.dtype).mT, s)
    s = s.float().mul_(ctx.scale)
    if ctx.softcap:
        s = ctx.softcap * torch.tanh(s / ctx.softcap)
    s = s.unflatten(2, (groups, rows))
    for edit in (e for e in edits if isinstance(e, ColumnBias)):
        bias = edit.bias.to(s.device).view(ctx.kv_heads, groups)[None, :, :, None, None]
        s = torch.where((where == edit.position)[:, :, None, None, :], s + bias, s)
    if keep is not None:
        s = s.masked_fill(~keep, -torch.inf)
    if used is not None:
        s = s.masked_fill(~used[:, :, None, None, :], -torch.inf)
    done = Weighed(*core.softmax(s)) if weigh is None else weigh(ctx, s, Place(where, pos_q, span[0], slots))
    if ctx.sink is not None and done.softmax:
        done = _with_sink(ctx, done)
    out = _mixed(ctx, done, slots, used, rows)
    if done.extra is not None:
        out = out + done.extra
    return out.flatten(1, 2), done.lse.flatten(1, 2), done.p


def _with_sink(ctx: LayerContext, done: Weighed) -> Weighed:
    """The weights once the model's learned sink logit has taken its share."""
    shape = (ctx.kv_heads, ctx.groups)
    p, lse = (x.unflatten(1, shape) for x in sink_logit(done.p.flatten(1, 2), done.lse.flatten(1, 2), ctx.sink))
    extra = None if done.extra is None else done.extra * torch.exp(done.lse - lse).unsqueeze(-1).to(done.extra.dtype)
    return replace(done, p=p, lse=lse, extra=extra)


def _mixed(ctx: LayerContext, done: Weighed, slots, used, rows: int) -> torch.Tensor:
    """Weights times values, fetching only columns with weight where the weighing is sparse; notes what was read."""
    store, p = ctx.store, done.p
    width = store.longest if slots is None else slots.shape[2]
    keys_read = values_read = width * store.batch * store.heads if used is None else int(used.sum())
    if used is None and slots is None:
        keys_read = values_read = sum(store.counts)
    if done.sparse and rows == 1:
        nonzero = (p != 0).any(3).any(2)
        counts = nonzero.sum(-1)
        values_read = int(counts.sum())
        order = (~nonzero).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, : int(counts.max())]
        p = p.gather(4, order[:, :, None, None].expand(*p.shape[:4], order.shape[2]))
        slots = order if slots is None else slots.gather(2, order)
    values = fetch(store, "value", slots)
    store.last_read = (keys_read + values_read) / 2
    return (p.to(values.dtype).flatten(2, 3) @ values).unflatten(2, (ctx.groups, rows))
