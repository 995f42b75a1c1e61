"""Launching A-shape with Delta correction in two launches, and its tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from kernels.backend import home, interpreting, overlaps
from kernels.prefill.triton_delta import delta_kernel, rest_kernel

SMS = 132  # multiprocessors of an H100 or H200
MOST = 16  # parts of a row


@dataclass(frozen=True)
class Joined:
    """Tiles of the two launches as (rows, keys, warps, stages, stages at the edges), programs that should share the chosen rows'
    keys (waves of the card), whether the A-shape's programs go head by head of a group, and whether it starts early."""

    rest: tuple[int, int, int, int, int]
    shape: tuple[int, int, int, int, int]
    waves: int = 5
    grouped: bool = True
    overlap: bool = True


def choice(dim: int, gamma: int, exact: bool) -> Joined:
    """The choice for a head of `dim` channels; exact: float32."""
    if exact or interpreting():
        return Joined((32, 32, 4, 1, 1), (max(32, gamma), 32, 4, 1, 1))
    if dim > 128:
        return Joined((64, 64, 4, 2, 2), (max(64, gamma), 64, 8 if gamma > 64 else 4, 2, 1))
    shape = (64, 64, 4, 3, 2) if gamma <= 64 else (128, 64, 8, 3, 3)
    return Joined((64, 64, 4, 3, 3), shape)


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: int, options: dict) -> bool:
    """True where the two launches do what was asked: plain logits, anchors at a power of two from 16 to 128."""
    plain = all(x is None or (n == "weight" and x == "softmax") for n, x in options.items())
    return plain and gamma in (16, 32, 64, 128) and q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, exact: torch.Tensor, body: int, *, gamma: int, sinks: int,
    window: int, start: int, c: Joined | None = None, only: str | None = None,
) -> torch.Tensor:
    """out [B,Hq,T,d]; exact int32 [E] ascending: the absolute positions of the body/gamma anchors and of every row from body on.

    only: "rest" or "shape" launches just one of the two, for timing (the other's results are then missing).
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    c = c or choice(dim, gamma, q.dtype == torch.float32)
    padded = triton.next_power_of_2(group)
    bm, bn, warps, stages, edge = c.rest
    bm = max(bm, padded)
    n_exact = len(exact)
    tiles = triton.cdiv(n_exact * padded, bm)
    most = max(1, start + rows - window - sinks)
    # about half of the programs have keys: rows see a half of them on average
    splits = min(MOST, triton.cdiv(most, 1024), max(1, triton.cdiv(2 * c.waves * SMS, tiles * batch * kv_heads)))
    chunk = triton.cdiv(triton.cdiv(most, splits), bn) * bn
    part = torch.empty(splits, batch, heads, n_exact, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, batch, heads, n_exact, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, rows, dim, dtype=q.dtype, device=q.device)
    overlap = c.overlap and overlaps(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    asm = not interpreting() and q.dtype != torch.float32
    common = dict(D=dim, DP=max(16, triton.next_power_of_2(dim)), ASM=asm, PDL=overlap)
    if only == "shape":
        lse.fill_(-torch.inf)
    else:
        home(rest_kernel)[(tiles, batch * kv_heads, splits)](
            q, k, v, exact, part, lse, scale, start, n_exact, heads, group, sinks, window, chunk, *strides,
            BM=bm, GP=padded, BN=bn, STAGES=stages, EDGE_STAGES=edge, num_warps=warps, num_stages=stages, **common,
        )
    if only == "rest":
        return part
    bm, bn, warps, stages, edge = c.shape
    home(delta_kernel)[(triton.cdiv(rows, bm) * batch * heads,)](
        q, k, v, out, part, lse, scale, start, rows, k.shape[2], heads, group, sinks, window, n_exact, body, splits, *strides,
        BM=bm, BN=bn, GAMMA=gamma, MOST=MOST, STAGES=stages, EDGE_STAGES=edge, GROUPED=c.grouped, num_warps=warps,
        num_stages=stages, **common, **({"launch_pdl": True} if overlap and only is None else {}),
    )
    return out


def variants(dim: int, gamma: int) -> list[Joined]:
    """What `benchmarks/prefill_variants.py --delta` times beside the choice, for heads of 128 channels in 16 bits."""
    c = choice(dim, gamma, False)
    some = [c, replace(c, grouped=False), replace(c, overlap=False), replace(c, waves=3), replace(c, waves=8)]
    some += [replace(c, rest=r) for r in ((128, 64, 8, 3, 3), (128, 32, 4, 3, 3), (128, 64, 4, 2, 2))]
    some += [replace(c, shape=s) for s in ((64, 64, 4, 3, 3), (128, 32, 4, 3, 3), (128, 32, 4, 4, 4), (128, 64, 4, 2, 2))]
    return some
