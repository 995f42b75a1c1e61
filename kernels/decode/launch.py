"""Launching the decode kernels: views of the tiers as words, scratch for the parts, grids from capacities."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.backend import home, interpreting, overlaps
from kernels.decode import config
from kernels.decode.api import Decoded
from kernels.decode.tier import TierView
from kernels.decode.triton_merge import finish_kernel, mass_kernel, merge_kernel
from kernels.decode.triton_split import split_kernel

_INTEGER = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_FLOAT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _pairs(scale: torch.Tensor) -> torch.Tensor:
    """Scales as the kernel reads them: an even number of groups per token becomes int32 pairs."""
    return scale.view(torch.int32) if scale.shape[-1] % 2 == 0 else scale


def _code_arguments(t: TierView, dim: int, columns: int) -> tuple[list, dict]:
    """Pointers (k, v, k_scale, k_zero, v_scale, v_zero, k_group, levels) and constants for a tier's code."""
    nothing = t.start
    if t.bits == 16:
        pointers = [t.k, t.v] + [nothing] * 6
        sizes = dict(CODE="affine", K_MODE="token", GK=dim, GV=dim, CK=dim, CV=dim, WK=1, WV=1, PK=16, PV=16)
        return pointers, sizes
    width = dim * t.bits // 8
    gv = dim // t.v_scale.shape[-1]
    if t.k_group is None:
        mode, gk = "token", dim // t.k_scale.shape[-1]
    else:
        mode, gk = ("block" if t.k_block and t.pages is None else "gather"), dim
    # keys contract over channels and read fastest as 2-byte words; values contract over tokens and want 4
    ck, wk, pk = config.words(width, gk, 2)
    cv, wv, pv = config.words(width, gv, 4)
    paired = mode == "token" or (mode == "block" and wk % 2 == 0)
    pointers = [
        t.k.view(_INTEGER[wk]), t.v.view(_INTEGER[wv]), _pairs(t.k_scale) if paired else t.k_scale,
        nothing if t.k_zero is None else (_pairs(t.k_zero) if paired else t.k_zero),
        _pairs(t.v_scale), nothing if t.v_zero is None else _pairs(t.v_zero),
        nothing if t.k_group is None else t.k_group, nothing if t.levels is None else t.levels,
    ]
    sizes = dict(CODE=t.code, K_MODE=mode, GK=gk, GV=gv, CK=ck, CV=cv, WK=wk, WV=wv, PK=pk, PV=pv)
    return pointers, sizes


def _extent(t: TierView) -> int:
    """The most entries of a lane that can be visited."""
    return t.capacity if t.pages is None else t.pages.shape[1] * t.page


def plan(t: TierView, group: int, dtype: torch.dtype) -> config.Split:
    """The configuration a tier will run with."""
    exact = dtype == torch.float32 if t.bits < 16 else t.k.dtype == torch.float32
    odd = t.bits < 16 and t.v_scale.shape[-1] % 2 == 1
    slots = t.slots if t.pages is None else t.lanes * _extent(t)
    c = config.split(t.bits, t.dim, group, t.lanes, _extent(t), slots, odd, t.k_block > 0, exact)
    if t.k_block and t.pages is None and c.tile > t.k_block:
        raise ValueError(f"per-channel blocks of {t.k_block} tokens are shorter than the tile of {c.tile}; "
                         "set k_block=0 to gather scales per token.")
    return c


def _order(tiers: list[TierView]) -> list[int]:
    """Widest, narrowest, second widest, ...: launches overlap, and what memory bounds runs well beside what
    arithmetic bounds."""
    left = sorted(range(len(tiers)), key=lambda n: -tiers[n].bits)
    return [left.pop(-(i % 2)) for i in range(len(left))]


def run(
    q: torch.Tensor, tiers: list[TierView], scale: float, softcap: float | None, sink: torch.Tensor | None,
    threshold: torch.Tensor | None, want_mass: bool, want_entropy: bool, plans: list[config.Split] | None = None,
    early: bool = False, weights_as: str | None = None, gate: torch.Tensor | None = None,
) -> Decoded:
    """The Triton path of `kernels.decode.attend`; arguments are checked there."""
    weights_as = weights_as or ("bytes" if q.dtype == torch.bfloat16 else "halves")
    as_bytes = want_mass and weights_as == "bytes"
    batch, heads, dim = q.shape
    lanes = tiers[0].lanes
    group = batch * heads // lanes
    rows = batch * heads
    device = q.device
    q = q.contiguous()
    plans = plans or [plan(t, group, q.dtype) for t in tiers]
    counts = [max(1, math.ceil(_extent(t) / p.chunk)) for t, p in zip(tiers, plans)]
    splits = sum(counts)
    part_o = torch.empty(splits, rows, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(splits, rows, dtype=torch.float32, device=device)
    part_ent = torch.empty_like(part_lse) if want_entropy else part_lse
    bounds = part_lse if threshold is None else threshold.float().expand(batch, heads).contiguous()
    columns = config.heads_padded(group)
    overlap = overlaps(q)
    locals_: list = [None] * len(tiers)
    first = 0
    chained = False
    for n in _order(tiers):
        t, p, count = tiers[n], plans[n], counts[n]
        dot = _FLOAT[t.k.dtype] if t.bits == 16 else (tl.float32 if q.dtype == torch.float32 else tl.float16)
        pointers, sizes = _code_arguments(t, dim, columns)
        block = config.MASS_ENTRIES // p.tile
        tiles = triton.cdiv(count * p.chunk // p.tile, block) * block  # mass is made a block at a time
        # bytes to a word, and rows to a sum: what one thread holds of a product, 4 rows of 32 or 2 of 16
        pack, fold = (4, 4) if p.warps == 1 else (2, 1)
        weights = tops = part_lse
        if as_bytes:
            word = torch.int32 if pack == 4 else torch.int16
            weights = torch.empty(lanes, tiles, p.tile // pack, group, dtype=word, device=device)
        elif want_mass:
            weights = torch.empty(t.slots, group, dtype=torch.float16, device=device)
        if want_mass:
            tops = torch.empty(lanes, tiles, group, dtype=torch.float32, device=device)
        locals_[n] = (weights, tops, tiles, p.tile, pack)
        options = {} if p.registers is None or interpreting() else {"maxnreg": p.registers}
        first_early = early and overlap and not chained
        if chained or first_early:
            options["launch_pdl"] = True  # tiers do not depend on each other: let their launches overlap
        home(split_kernel)[(count, lanes)](
            q, *pointers, t.start, t.length, part_lse if t.bias is None else t.bias, bounds,
            t.start if t.pages is None else t.pages,
            part_o, part_lse, part_ent, weights, tops,
            scale, softcap or 1.0, p.chunk, first, tiles,
            0 if t.bias is None or t.bias.dim() == 1 else t.bias.stride(0), 0 if t.pages is None else t.pages.shape[1],
            G=group, NQ=columns, D=dim, DP=max(16, triton.next_power_of_2(dim)), BITS=t.bits, **sizes,
            BN=p.tile, DT=dot, ASM=not interpreting(), STAGES=p.stages,
            AHEAD=t.bits < 16 and p.ahead and t.pages is None, PDL=overlap, CHAIN=chained, EARLY=first_early,
            SOFTCAP=softcap is not None, BIAS=t.bias is not None, THETA=threshold is not None,
            PAGE=0 if t.pages is None else t.page, MASS=(2 if as_bytes else 1) if want_mass else 0,
            PACK=pack, FOLD=fold, ENTROPY=want_entropy,
            num_warps=p.warps, num_stages=p.stages, **options,
        )
        first += count
        chained = overlap
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=device)
    entropy = torch.empty_like(lse) if want_entropy else None
    how = config.merge(splits, rows, dim)
    ent_out, sink_in = lse if entropy is None else entropy, part_lse if sink is None else sink
    early_launch = {"launch_pdl": True} if overlap else {}
    gate_in = part_lse if gate is None else gate
    masses = []
    if as_bytes:
        pieces = rows * triton.cdiv(dim, how.channels)
        for t, (weights, tops, tiles, tile, pack) in zip(tiers, locals_):
            mass = torch.empty(t.slots, dtype=torch.bfloat16, device=device)  # as exact as the bytes are, and half to write
            blocks = triton.cdiv(max(1, t.capacity), config.MASS_ENTRIES)
            home(finish_kernel)[(pieces + blocks * lanes,)](
                part_o, part_lse, part_ent, sink_in, gate_in, out, lse, ent_out, weights, tops, t.start, t.length, mass,
                splits, rows, heads, tiles, pieces, blocks, D=dim, BD=how.channels, BS=how.parts, SINK=sink is not None,
                GATE=gate is not None, ENTROPY=want_entropy, G=group, GP=triton.next_power_of_2(group), TILE=tile, PACK=pack,
                BN=config.MASS_ENTRIES, PDL=overlap, ASM=not interpreting(), num_warps=config.MASS_WARPS, **early_launch,
            )
            masses.append(mass)
            pieces = 0  # merged already
        return Decoded(out, lse, entropy, masses)
    home(merge_kernel)[(rows, triton.cdiv(dim, how.channels))](
        part_o, part_lse, part_ent, sink_in, gate_in, out, lse, ent_out, splits, rows, heads, D=dim, BD=how.channels,
        BS=how.parts, SINK=sink is not None, GATE=gate is not None, ENTROPY=want_entropy, PDL=overlap,
        num_warps=how.warps, **early_launch,
    )
    if want_mass:
        for t, (weights, tops, tiles, tile, _) in zip(tiers, locals_):
            mass = torch.empty(t.slots, dtype=torch.float32, device=device)
            home(mass_kernel)[(triton.cdiv(max(1, t.capacity), 1024), lanes)](
                weights, tops, lse, t.start, t.length, mass, tiles,
                G=group, GP=triton.next_power_of_2(group), TILE=tile, BN=1024, PDL=overlap, num_warps=4, **early_launch,
            )
            masses.append(mass)
    return Decoded(out, lse, entropy, masses)
