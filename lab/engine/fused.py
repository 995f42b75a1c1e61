"""The fused kernels as the engine uses them on CUDA: the same rows over the same stored entries, one launch per layer.

Each function returns None where a kernel cannot serve the step, and the torch paths of `attend` do. On a CPU the kernels'
own references answer, which is how the conversions here are tested without a GPU.
"""

from __future__ import annotations

import torch

from kernels import decode, prefill
from kernels.decode import TierView
from kernels.prefill.blocks import SIZES
from lab.engine.context import LayerContext
from lab.engine.layer import LabLayer
from lab.engine.reads import Rows
from lab.engine.segments import Codec, Coded, Exact
from lab.engine.slots import Band


def prompt_rows(ctx: LayerContext, band: Band | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B,Hq,T,d], lse [B,Hq,T]) of prompt rows over exact keys, by structure: causal, window, sinks."""
    store = ctx.store
    found = prefill.attend(
        ctx.q.contiguous(), store.exact_k.decode().contiguous(), store.exact_v.decode().contiguous(), ctx.scale,
        start=ctx.first - store.base, window=band.window if band else None, sinks=band.sinks if band else 0,
    )
    return found.out, found.lse


def block_rows(ctx: LayerContext, chosen: list) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out [B,Hq,T,d], lse [B,Hq,T]) of prompt rows that read whole blocks of exact keys, or None.

    Notes what the newest row read. Served: one choice of blocks that the kernel's tiles can have, nothing else asked.
    """
    store, rows = ctx.store, ctx.q.shape[2]
    if len(chosen) != 1 or not isinstance(chosen[0], Rows) or chosen[0].blocks is None or chosen[0].blocks[1] not in SIZES:
        return None
    if ctx.pos_q is not None or ctx.window or not store.plain or store.base or store.longest != ctx.first + rows:
        return None
    keep, size = chosen[0].blocks
    found = prefill.block_sparse(
        ctx.q, store.exact_k.decode(), store.exact_v.decode(), ctx.scale, keep, size,
        start=ctx.first, softcap=ctx.softcap, sink=ctx.sink,
    )
    tokens = (store.longest - torch.arange(keep.shape[-1], device=keep.device) * size).clamp_max(size)
    union = keep[:, :, -1].unflatten(1, (ctx.kv_heads, ctx.groups)).any(2)
    store.last_read, store.last_probe = int((union * tokens).sum()), chosen[0].probe
    return found.out, found.lse


def column_mass(ctx: LayerContext, lse: torch.Tensor, band: Band | None) -> torch.Tensor:
    """Attention each stored key received from these rows, [B,Hk,N] float32, given their lse."""
    store = ctx.store
    return prefill.column_mass(
        ctx.q.contiguous(), store.exact_k.decode().contiguous(), lse, ctx.scale, start=ctx.first - store.base,
        window=band.window if band else None, sinks=band.sinks if band else 0, softcap=ctx.softcap,
    )


def one_row(ctx: LayerContext, want_mass: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """(out [B,Hq,1,d], lse [B,Hq,1], mass [B,Hk,N] or None) of a decode step over every tier, or None.

    Served: exact rows in any lanes, and integer codes whose keys and values were coded together, turned alike or not at all.
    """
    store = ctx.store
    tiers = _tiers(store, ctx.window)
    if tiers is None or (want_mass and (store.common is not None or any(t.rotation is not None for t in tiers))):
        return None  # the masses of all samples would meet in the slots they have in common
    got = decode.attend(ctx.q[:, :, 0].contiguous(), tiers, ctx.scale, softcap=ctx.softcap, sink=ctx.sink, want_mass=want_mass)
    mass = _in_logical_order(store, got.mass) if want_mass else None
    return got.out.unsqueeze(2), got.lse.unsqueeze(2), mass


def _tiers(store: LabLayer, window: int | None) -> list[TierView] | None:
    """Views of a layer's segments as the decode kernel reads them; None where key and value sides differ."""
    keys, values = store.keys_side, store.values_side
    if len(keys) != len(values):
        return None
    if window is not None and (len(keys) > 1 or store.meta is not None):
        return None  # which entries are inside the window is a question of positions, not of slots
    views = []
    for key, value in zip(keys, values):
        if key.rows.lens != value.rows.lens or key.rows.starts != value.rows.starts:
            return None
        if key.rows.longest == 0:
            continue
        view = tier_of(key, value, store.device, window)
        if view is None:
            return None
        views.append(view)
    return views or None


def tier_of(key: Exact | Coded, value: Exact | Coded, device: torch.device, window: int | None = None) -> TierView | None:
    """Keys and values of one segment, lying alike, as the decode kernel reads them; None for codes it does not know."""
    return _exact(key, value, device, window) if isinstance(key, Exact) else _coded(key, value, device)


def _exact(key: Exact, value: Exact, device: torch.device, window: int | None) -> TierView | None:
    k, v = key.rows.fields["x"], value.rows.fields["x"]
    if k.shape != v.shape:
        return None
    skip = [max(0, n - window) if window else 0 for n in key.rows.lens]
    starts = [s + d for s, d in zip(key.rows.starts, skip)]
    lens = [n - d for n, d in zip(key.rows.lens, skip)]
    return TierView(16, k, v, _int(starts, device), _int(lens, device), max(lens))


def _coded(key: Coded, value: Coded, device: torch.device) -> TierView | None:
    k, v = key.rows.fields, value.rows.fields
    if set(k) != {"codes", "scale", "zero"} or set(v) != set(k) or key.bits != value.bits or key.bits not in (8, 4, 2):
        return None
    if k["codes"].shape != v["codes"].shape:
        return None
    turn, other = (rotation_of(s.codec, device, k["codes"].shape[-1] * 8 // key.bits) for s in (key, value))
    if turn is not other:
        return None
    return TierView(
        key.bits, k["codes"], v["codes"], _int(key.rows.starts, device), _int(key.rows.lens, device), key.rows.longest,
        k_scale=k["scale"], k_zero=k["zero"], v_scale=v["scale"], v_zero=v["zero"], rotation=turn,
    )


def rotation_of(codec: Codec, device: torch.device, dim: int) -> torch.Tensor | None:
    """The rotation [dim,dim] under which a codec stores its vectors, the same tensor at every call, or None."""
    turn = getattr(codec, "turn", None)
    return None if turn is None else turn(dim, device)


def _int(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _in_logical_order(store: LabLayer, mass: list[torch.Tensor]) -> torch.Tensor:
    """Per-tier masses [slots] as [B,Hk,N] in the logical order of entries."""
    used = [segment.rows for segment in store.keys_side if segment.rows.longest]
    out = torch.zeros(store.batch * store.heads, store.longest, device=store.device)
    for lane in range(out.shape[0]):
        at = 0
        for rows, got in zip(used, mass):
            n = rows.lens[lane]
            out[lane, at : at + n] = got[rows.starts[lane] : rows.starts[lane] + n]
            at += n
    return out.view(store.batch, store.heads, -1)
