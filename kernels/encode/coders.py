"""Codes of whole blocks and of tables, from any leading shape: what the engine's codecs call.

`codes` and `levels` say what the codes are; here Triton writes them on CUDA, in one launch each, into fresh tensors or in
place into given slots.
"""

from __future__ import annotations

import math

import torch

from kernels import codes
from kernels import levels as grid
from kernels.backend import choose, home, interpreting
from kernels.decode.tier import TierView
from kernels.encode.api import encode_tokens

Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(x: torch.Tensor, bits: int, group: int, impl: str = "auto") -> Coded:
    """`kernels.codes.encode_tokens` of x [...,d]: (bytes [...,d*bits/8], scale, zero float16 [...,d/group])."""
    if choose(impl, x) == "torch":
        return codes.encode_tokens(x, bits, group)
    found = encode_tokens(x.reshape(-1, x.shape[-1]), bits, group, impl=impl)
    return tuple(t.view(*x.shape[:-1], t.shape[-1]) for t in found)


def channels(
    x: torch.Tensor, bits: int, *, out: Coded | None = None, slots: torch.Tensor | None = None,
    rows: torch.Tensor | None = None, names: torch.Tensor | None = None, impl: str = "auto",
) -> Coded:
    """Per-channel affine codes of blocks x [...,g,d] (KIVI's keys, arXiv 2402.02750), as `kernels.codes.encode_channels`:
    (bytes [...,g,d*bits/8] uint8, scale, zero float16 [...,d]).

    With out = (bytes [slots,.], scale, zero [groups,d]), int64 slots [n] and rows [n], x is [n,g,d]: block i's rows go to slots
    slots[i] .. slots[i]+g and its scales to row rows[i]; a slot below 0 is skipped. names int32 [slots], where given, gets the
    row's number at those slots (a tier's `k_group`). ValueError where d does not fill whole bytes.
    """
    size, dim = x.shape[-2:]
    if (dim * bits) % 8:
        raise ValueError(f"{dim} channels of {bits} bits do not fill whole bytes.")
    width = dim * bits // 8
    if out is not None and (slots is None or rows is None):
        raise ValueError("codes in place need the first slot and the row of scales of every block.")
    if choose(impl, x) == "torch":
        if out is None:
            return codes.encode_channels(x, bits)
        live = slots >= 0
        place, row = slots[live].long(), rows[live].long()
        found, scale, zero = codes.encode_channels(x[live], bits)
        inside = (place[:, None] + torch.arange(size, device=x.device)).flatten()
        out[0][inside], out[1][row], out[2][row] = found.flatten(0, 1), scale, zero
        if names is not None:
            names[inside] = row.repeat_interleave(size).to(names.dtype)
        return out
    import triton

    from kernels.encode.triton_channels import channels_kernel

    blocks = x.reshape(-1, size, dim).contiguous()
    n = blocks.shape[0]
    fresh = out is None
    if fresh:
        out = (torch.empty(n * size, width, dtype=torch.uint8, device=x.device),
               *(torch.empty(n, dim, dtype=torch.float16, device=x.device) for _ in range(2)))
        rows = torch.arange(n, device=x.device)
        slots = rows * size
    wide = min(32, triton.next_power_of_2(width))
    if n:
        home(channels_kernel)[(n, triton.cdiv(width, wide))](
            blocks, slots, rows, *out, slots if names is None else names, G=size, GP=triton.next_power_of_2(size), D=dim,
            BITS=bits, W=width, BW=wide, NAMES=names is not None, num_warps=4,
            **({} if interpreting() else {"enable_fp_fusion": False}),  # the CPU's codes, bit for bit
        )
    if not fresh:
        return out
    return out[0].view(*x.shape[:-1], width), *(t.view(*x.shape[:-2], dim) for t in out[1:])


def append_blocks(
    tier: TierView, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, impl: str = "auto"
) -> None:
    """Write whole blocks k, v [n,g,d] into a per-channel (KIVI) tier in place: block i to slots slots[i] .. slots[i]+g, its key
    scales to row rows[i]; a slot below 0 is skipped. Two launches, one per side. Lengths are the caller's to raise."""
    if tier.code != "affine" or tier.k_group is None:
        raise ValueError("append_blocks writes per-channel affine tiers; per-token tiers take `append`.")
    n, size, dim = k.shape
    channels(k, tier.bits, out=(tier.k, tier.k_scale, tier.k_zero), slots=slots, rows=rows, names=tier.k_group, impl=impl)
    each = torch.arange(size, device=slots.device)
    places = torch.where(slots[:, None] >= 0, slots[:, None] + each, -1).flatten()
    encode_tokens(v.reshape(n * size, dim), tier.bits, dim // tier.v_scale.shape[-1], out=(tier.v, tier.v_scale, tier.v_zero),
                  slots=places, impl=impl)


MANY = 2048
"""Vectors from which a matrix product of its own turns them: inside the kernel exact products do not run on tensor cores."""


def table(
    x: torch.Tensor, levels: torch.Tensor, bits: int, *, low: torch.Tensor | None = None, high: torch.Tensor | None = None,
    turn: torch.Tensor | None = None, by_norm: bool = False, out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    slots: torch.Tensor | None = None, impl: str = "auto", edges: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest of 2**bits ascending `levels` to every number of x [...,d]: (bytes [...,d*bits/8] uint8, norm or None).

    turn     [d,d]: x is multiplied by it first (a rotation, `kernels.levels.rotation`).
    by_norm  numbers are divided by their vector's length over sqrt(d) (TurboQuant, arXiv 2504.19874); the length is returned,
             float16 [...,1], and is what the division uses.
    low, high  or numbers are brought to [-1, 1] from ranges [...,1] of each vector or, for x [...,H,T,d], [H,1,d] of each channel
             (KVQuant, arXiv 2401.18079).
    out      with slots int [n]: vector i is written to slots[i] of (bytes [slots,.], norm [slots,1] or None), -1: nowhere.
    edges    the middles between levels, where they lie at hand on x's device.
    bits 1, 2, 3, 4 or 8, packed as `kernels.levels.pack`. ValueError where d does not fill whole bytes.
    """
    dim = x.shape[-1]
    if dim * (1 if bits == 3 else bits) % 8 or levels.numel() != 2**bits:
        raise ValueError(f"{dim} channels and {levels.numel()} levels do not make whole bytes of {bits}-bit codes.")
    if choose(impl, x) == "torch":
        found, norm = _table_torch(x, levels, bits, low, high, turn, by_norm)
        if out is None:
            return found, norm
        live = slots >= 0
        place = slots[live].long()
        out[0][place] = found.reshape(-1, found.shape[-1])[live]
        if norm is not None:
            out[1][place] = norm.reshape(-1, 1)[live]
        return out
    import triton

    from kernels.encode.triton_table import table_kernel

    rows = x.reshape(-1, dim).contiguous()
    n, device = rows.shape[0], x.device
    if edges is None:
        edges = ((levels[1:] + levels[:-1]) / 2).float().to(device)
    mode, span, lanes = "norm" if by_norm else "given", 1, 1
    if low is not None:
        if low.shape[-1] == 1:
            mode = "vector"
            low, high = (t.expand(*x.shape[:-1], 1).reshape(-1).float().contiguous() for t in (low, high))
        else:
            mode, span, lanes = "channel", x.shape[-2], low.shape[0]
            low, high = (t.to(device).reshape(lanes, dim).float().contiguous() for t in (low, high))
    fresh = out is None
    if fresh:
        out = (torch.empty(n, dim * bits // 8, dtype=torch.uint8, device=device),
               torch.empty(n, 1, dtype=torch.float16, device=device) if by_norm else None)
        slots = torch.arange(n, device=device)
    streams = [dim // 4, dim // 8] if bits == 3 else [dim * bits // 8, 16]
    p1, p2 = (max(16, triton.next_power_of_2(w)) for w in streams)
    turned = rows
    if turn is not None and n > MANY:
        turned, turn = rows.float() @ turn.to(device, torch.float32).mT, None
    if n:
        home(table_kernel)[(triton.cdiv(n, 16),)](
            turned, rows, slots, edges, edges if low is None else low, edges if high is None else high,
            edges if turn is None else turn.to(device, torch.float32).contiguous(), out[0], out[0] if out[1] is None else out[1],
            n, math.sqrt(dim), span, lanes, D=dim, DP=triton.next_power_of_2(dim), BK=32 if dim >= 32 else 16, BITS=bits, BR=16,
            P1=p1, P2=p2, MODE=mode, TURN=turn is not None, num_warps=4,
        )
    if not fresh:
        return out
    return out[0].view(*x.shape[:-1], -1), None if out[1] is None else out[1].view(*x.shape[:-1], 1)


def from_table(
    packed: torch.Tensor, norm: torch.Tensor, levels: torch.Tensor, bits: int, turn: torch.Tensor,
    dtype: torch.dtype = torch.float32, impl: str = "auto",
) -> torch.Tensor:
    """Inverse of `table` by norm and under a rotation: bytes [...,d*bits/8], norm [...,1] -> [...,d] of dtype, turned back.

    levels float32 [2**bits] and turn float32 [d,d] lie where the codes do.
    """
    dim = turn.shape[0]
    if choose(impl, packed) == "torch":
        return (norm.float() * (levels[grid.unpack(packed, bits).int()] / math.sqrt(dim) @ turn)).to(dtype)
    import triton

    from kernels.encode.triton_table import from_table_kernel

    coded, lengths = (x.reshape(-1, x.shape[-1]).contiguous() for x in (packed, norm))
    n = coded.shape[0]
    out = torch.empty(n, dim, dtype=dtype, device=packed.device)
    if n:
        wide = 32 if dim >= 32 else 16
        home(from_table_kernel)[(triton.cdiv(n, 16), triton.cdiv(dim, wide))](
            coded, lengths, levels, turn.contiguous(), out, n, 1 / math.sqrt(dim), D=dim, BN=wide, BK=wide, BITS=bits, BR=16,
            num_warps=4,
        )
    return out.view(*packed.shape[:-1], dim)


def _table_torch(x, levels, bits, low, high, turn, by_norm) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide, norm = x.float(), None
    y = wide if turn is None else wide @ turn.to(x.device, torch.float32).mT
    if by_norm:
        norm = wide.norm(dim=-1, keepdim=True).half()
        y = y / norm.float().clamp_min(1e-12) * math.sqrt(x.shape[-1])
    elif low is not None:
        low, high = low.to(x.device).float(), high.to(x.device).float()
        y = 2 * (y - low) / (high - low).clamp_min(1e-6) - 1
    return grid.pack(grid.nearest(y, levels), bits), norm
