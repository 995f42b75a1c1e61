"""Rectified block-sparse prefill (Rectified SpaAttn, arXiv 2511.19835; causal form), composed from pooling, block lists and a
correction: critical blocks are read exactly, scaled to their true share (IPAR), and the rest adds its mean value where that can
be trusted (GAPR)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import choose, home
from kernels.prefill.blocks import block_sparse
from kernels.select.sets import smallest_sets


@dataclass
class Plan:
    """Per block of rows and query head: pooled attention p float32, critical and rectified (skipped, but its mean counts) bool,
    all [B,Hq,RB,NB]; v float32 [B,Hk,NB,d], the blocks' mean values."""

    p: torch.Tensor
    critical: torch.Tensor
    rectified: torch.Tensor
    v: torch.Tensor


def pool(x: torch.Tensor, block: int, lead: int = 0, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, mean absolute deviation) float32 [B,H,blocks,d] of blocks of x [B,H,T,d], whose first row stands `lead` rows into
    its block; float64 for float64. block: a power of two on the Triton path."""
    rows, dim = x.shape[2:]
    if choose(impl, x) == "torch":
        wide = x if x.dtype == torch.float64 else x.float()
        pad = (0, 0, lead, -(lead + rows) % block)
        inside = torch.nn.functional.pad(torch.ones(rows, 1, dtype=wide.dtype, device=x.device), pad).unflatten(0, (-1, block))
        blocks = torch.nn.functional.pad(wide, pad).unflatten(2, (-1, block))
        count = inside.sum(-2).clamp_min(1)
        mean = blocks.sum(-2) / count
        return mean, ((blocks - mean.unsqueeze(-2)).abs() * inside).sum(-2) / count
    import triton

    from kernels.prefill.triton_pool import pool_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = triton.cdiv(lead + rows, block)
    mean = torch.empty(*x.shape[:2], blocks, dim, dtype=torch.float32, device=x.device)
    deviation = torch.empty_like(mean)
    home(pool_kernel)[(blocks, x.shape[0] * x.shape[1])](
        x, mean, deviation, rows, lead, *x.stride()[:3], x.shape[1], D=dim, DP=max(16, triton.next_power_of_2(dim)), BLOCK=block,
        num_warps=8 if block * dim > 8192 else 4,
    )
    return mean, deviation


def weigh(
    q: torch.Tensor, k: torch.Tensor, k_dev: torch.Tensor, size: torch.Tensor, doubt: torch.Tensor, seen: torch.Tensor,
    own: torch.Tensor, *, scale: float, share: float, least: int, jensen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(p, critical, rectified) [B,Hq,R,N] of queries q [B,Hk,G,R,d] over block means k and their deviations k_dev [B,Hk,1,N,d].

    size, doubt, seen and own broadcast to [B,Hk,G,R,N]: tokens of a block, how far its logit may be off, whether it may be read,
    and whether it must be. Critical are the fewest blocks that hold `share` of p, the `least` largest, and own ones.
    jensen: a block's weight counts its length and the spread of its keys, without which a mean is too low.
    """
    raw = q @ k.mT
    s = raw * scale
    if jensen:  # a Gaussian's deviation is sqrt(2/pi) of its standard deviation
        s = s + 0.5 * scale**2 * (q**2 @ (k_dev**2).mT) * (torch.pi / 2) + size.clamp_min(1).to(s.dtype).log()
    p = s.masked_fill(~seen, -torch.inf).softmax(-1)
    order = p.argsort(dim=-1, descending=True, stable=True)[..., :least]
    critical = (smallest_sets(p, share).scatter_(-1, order, True) | own) & seen
    rectified = ~critical & (raw.abs() > doubt) & seen
    return p.flatten(1, 2), critical.flatten(1, 2), rectified.flatten(1, 2)


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, block: int, share: float = 0.6, least: int = 1,
    jensen: bool = False, start: int | None = None, impl: str = "auto",
) -> Plan:
    """What each block of rows of q [B,Hq,T,d], at positions start..start+T, reads of k, v [B,Hk,N,d]; see `weigh`. Blocks count
    from position 0."""
    rows, n, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    start = n - rows if start is None else start
    q_mean, q_dev = (x.unflatten(1, (kv_heads, -1)) for x in pool(q, block, start % block, impl))
    k_mean, k_dev = (x.unsqueeze(2) for x in pool(k, block, 0, impl))
    row = torch.arange(q_mean.shape[3], device=q.device)[:, None] + start // block
    column = torch.arange(k_mean.shape[3], device=q.device)
    doubt = (q_dev @ k_mean.mT).abs() + (q_mean @ k_dev.mT).abs()
    found = weigh(
        q_mean, k_mean, k_dev, (n - column * block).clamp_max(block), doubt, column <= row, column == row,
        scale=scale, share=share, least=least, jensen=jensen,
    )
    return Plan(*found, pool(v, block, 0, impl)[0])


def correct(out: torch.Tensor, plan: Plan, block: int, lead: int = 0) -> torch.Tensor:
    """The outputs out [B,Hq,T,d] of block-sparse rows, the first `lead` rows into its block, with both corrections."""
    p = plan.p * plan.rectified
    kept = (1 - p.sum(-1)).unsqueeze(-1)  # the share of critical blocks and of those whose mean is not trusted
    pooled = (p.unflatten(1, (plan.v.shape[1], -1)) @ plan.v.to(p.dtype).unsqueeze(2)).flatten(1, 2)
    row = (torch.arange(out.shape[2], device=out.device) + lead) // block
    return torch.addcmul(pooled[:, :, row], out.to(p.dtype), kept[:, :, row]).to(out.dtype)


def rectified(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, block: int = 128, share: float = 0.6, least: int = 1,
    jensen: bool = False, start: int | None = None, impl: str = "auto",
) -> torch.Tensor:
    """Rectified sparse attention, out [B,Hq,T,d]: pooled attention chooses blocks, they are read exactly, the rest by its means.

    share 1 reads everything and is exact. Costs the chosen blocks and T*N/block**2 for the pooled attention.
    """
    start = k.shape[2] - q.shape[2] if start is None else start
    found = plan(q, k, v, scale, block=block, share=share, least=least, jensen=jensen, start=start, impl=impl)
    out = block_sparse(q, k, v, scale, found.critical, block, start=start, impl=impl).out
    return correct(out, found, block, start % block)
