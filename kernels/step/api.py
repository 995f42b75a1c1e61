"""The operators of a decode step. Each takes the residual stream h float32 [B, K] of one token per sequence.

All run without synchronising and read positions and slots on the device, so they can be captured in a CUDA graph. On
CUDA every launch may start before its predecessor ends and waits for it before it reads what that one wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.backend import choose, home, overlaps
from kernels.step import config, reference

WIDEST = 4  # sequences for which reading the weights decides; more are matrix products


@dataclass
class Heads:
    """Where the query, key and value heads of a step go, and how they are turned.

    q [B,Hq,d] is written; k, v [slots,d]: row slot[b*Hk + h] (int64 [B*Hk]) is written. cos, sin [n,d] by position, of
    which row position - first is used; position int64 [1]. norms (weight_q [d], weight_k [d], eps): RMS norms of each head
    before it is turned (Qwen3), or None. tag int32 [slots] gets the position at tag_slot int64 [B*Hk], or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slot: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    position: torch.Tensor
    first: int
    kv_heads: int
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None
    tag: torch.Tensor | None = None
    tag_slot: torch.Tensor | None = None


def embed(ids: torch.Tensor, table: torch.Tensor, h: torch.Tensor, impl: str = "auto") -> None:
    """h [B,K] = rows ids int64 [B] of table [V,K]."""
    if choose(impl, h) == "torch":
        h.copy_(table[ids.view(-1)])
        return
    import triton

    from kernels.step.triton_step import embed_kernel

    batch, width = h.shape
    home(embed_kernel)[(batch, triton.cdiv(width, 1024))](ids, table, h, K=width, BK=1024, PDL=overlaps(h), num_warps=4)


def project(
    h: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None, heads: Heads,
    impl: str = "auto",
) -> None:
    """Queries, keys and values of h: RMS norm, weight [(Hq + 2 Hk)*d, K], rotary embedding, and into their places.

    ValueError for more than WIDEST sequences.
    """
    batch, count, dim = heads.q.shape
    _check(h, weight, (count + 2 * heads.kv_heads) * dim)
    if choose(impl, h) == "torch":
        _project_torch(h, norm, eps, weight, bias, heads)
        return
    where = (heads.cos, heads.sin, heads.position, heads.k, heads.v, heads.slot,
             heads.slot if heads.tag is None else heads.tag, heads.slot if heads.tag is None else heads.tag_slot)
    sizes = dict(D=dim, HQ=count, HK=heads.kv_heads, TAGS=heads.tag is not None)
    if heads.norms is None:
        _run("rotate", h, norm, eps, weight, bias, heads.q, weight.shape[0] // 2, where, heads.first, sizes)
        return
    import triton

    from kernels.step.triton_step import turn_kernel

    raw = torch.empty(batch, weight.shape[0], dtype=torch.float32, device=h.device)
    _run("plain", h, norm, eps, weight, bias, raw, weight.shape[0])
    cos, sin, position, k, v, *rest = where
    home(turn_kernel)[(count + 2 * heads.kv_heads, batch)](
        raw, heads.norms[0], heads.norms[1], cos, sin, position, heads.q, k, v, *rest, heads.norms[2], heads.first,
        DP=triton.next_power_of_2(dim), PDL=overlaps(h), num_warps=1, **sizes, **({"launch_pdl": True} if overlaps(h) else {}),
    )


def add_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, impl: str = "auto") -> None:
    """h [B,N] += x [B,K] @ weight [N,K].T + bias."""
    _check(x, weight, h.shape[1])
    if choose(impl, h) == "torch":
        h += reference.product(x, None, 0.0, weight, bias)
        return
    _run("add", x, None, 0.0, weight, bias, h, weight.shape[0])


def gated(
    h: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    impl: str = "auto",
) -> None:
    """out [B,I] = silu(gate) * up of the normed h, where weight [2*I, K] holds the gate's rows, then those of up."""
    _check(h, weight, 2 * out.shape[1])
    if choose(impl, h) == "torch":
        gate, up = reference.product(h, norm, eps, weight, bias).chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)
        return
    _run("gated", h, norm, eps, weight, bias, out, out.shape[1])


def logits(
    h: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None, impl: str = "auto"
) -> torch.Tensor:
    """float32 [B,V] of the normed h and the head's weight [V,K]."""
    _check(h, weight, weight.shape[0])
    if choose(impl, h) == "torch":
        return reference.product(h, norm, eps, weight, bias)
    out = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float32, device=h.device)
    _run("plain", h, norm, eps, weight, bias, out, weight.shape[0])
    return out


def _run(end: str, x, norm, eps, weight, bias, y, rows: int, where: tuple | None = None, first: int = 0,
         sizes: dict | None = None) -> None:
    """Launch `product_kernel`; pointers that an end does not use are given the input's."""
    import triton

    from kernels.step.triton_step import product_kernel

    batch, columns = x.shape
    overlap = overlaps(x)
    c = config.shape(rows, columns, end in ("gated", "rotate"))
    home(product_kernel)[(triton.cdiv(rows, c.rows),)](
        x, x if norm is None else norm, weight, x if bias is None else bias, y, *(where or (x,) * 8), rows, eps, first,
        B=batch, K=columns, BN=c.rows, BK=c.width, TILES=c.tiles, END=end, NORM=int(norm is not None), BIAS=bias is not None,
        PDL=overlap, num_warps=c.warps, **(sizes or dict(D=2, HQ=0, HK=0, TAGS=False)),
        **({"launch_pdl": True} if overlap else {}),
    )


def _check(x: torch.Tensor, weight: torch.Tensor, rows: int) -> None:
    if x.shape[0] > WIDEST:
        raise ValueError(f"{x.shape[0]} sequences: the step's products serve at most {WIDEST}; use a matrix product.")
    if weight.shape != (rows, x.shape[1]) or not (weight.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"a contiguous weight [{rows}, {x.shape[1]}] and input were expected, not {tuple(weight.shape)}.")


def _project_torch(h, norm, eps, weight, bias, heads: Heads) -> None:
    batch, count, dim = heads.q.shape
    kv = heads.kv_heads
    x = reference.product(h, norm, eps, weight, bias).view(batch, -1, dim)
    q, k, v = x.split([count, kv, kv], 1)
    if heads.norms is not None:
        q, k = (reference.normed(part, g, heads.norms[2]) for part, g in ((q, heads.norms[0]), (k, heads.norms[1])))
    row = heads.position.view(1) - heads.first
    cos, sin = heads.cos[row].float(), heads.sin[row].float()
    heads.q.copy_(reference.turned(q, cos, sin))
    heads.k.index_copy_(0, heads.slot, reference.turned(k, cos, sin).reshape(-1, dim).to(heads.k.dtype))
    heads.v.index_copy_(0, heads.slot, v.reshape(-1, dim).to(heads.v.dtype))
    if heads.tag is not None:
        heads.tag.index_copy_(0, heads.tag_slot, heads.position.view(1).expand(heads.tag_slot.shape).to(heads.tag.dtype))
