"""Launching the prefill kernels."""

from __future__ import annotations

import torch
import triton

from kernels.backend import home, interpreting
from kernels.prefill.options import Options
from kernels.prefill.triton_forward import forward_kernel
from kernels.prefill.triton_mass import mass_kernel

# (rows, keys, warps, stages, stages at the edges) of a tile, by padded head_dim; measured on one H100
# (benchmarks/NOTES.md holds the alternatives that lost)
FORWARD = {64: (128, 128, 8, 3, 1), 128: (128, 128, 8, 3, 1), 256: (64, 64, 4, 2, 1)}
BANDED = {64: (64, 64, 4, 3, 3), 128: (64, 64, 4, 3, 3), 256: (64, 64, 4, 2, 1)}
UNNORMALISED = {64: (128, 64, 8, 3, 1), 128: (128, 64, 8, 3, 1), 256: (64, 64, 4, 2, 1)}
FEW_ROWS = {64: (64, 64, 4, 3, 3), 128: (64, 64, 4, 3, 3), 256: (64, 64, 4, 2, 2)}
MASS = {64: (128, 64, 4, 3, 1), 128: (128, 128, 4, 2, 1), 256: (64, 64, 4, 2, 1)}


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(table: dict, dim: int, exact: bool) -> tuple[int, int, int, int, int]:
    small = exact or interpreting()
    return (32, 32, 4, 1, 1) if small else table[max(64, triton.next_power_of_2(dim))]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, o: Options, want_entropy: bool,
    config: tuple[int, int, int, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The Triton path of `kernels.prefill.attend`: out, lse, entropy or None."""
    q, k, v = _contiguous(q), _contiguous(k), _contiguous(v)
    batch, heads, count, dim = q.shape
    n_rows = count if o.rows is None else len(o.rows)
    exact = q.dtype == torch.float32
    if o.rows is not None:
        table = FEW_ROWS
    elif o.weight != "softmax":
        table = UNNORMALISED
    else:
        table = BANDED if o.banded else FORWARD
    bm, bn, warps, stages, edge_stages = config or _config(table, dim, exact)
    if o.blocks is not None:
        bm, bn = o.block_size
        warps = 8 if bm > 64 else 4 if bm > 32 else 2  # the lists decide the tile, the tile how many warps it feeds
        stages = 1 if exact or interpreting() else 2 if dim > 128 else 3
    out = torch.empty(batch, heads, n_rows, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, n_rows, dtype=torch.float32, device=q.device)
    entropy = torch.empty_like(lse) if want_entropy else None
    index, counts = (x.contiguous() for x in o.blocks) if o.blocks is not None else (o.window, o.window)
    home(forward_kernel)[(triton.cdiv(n_rows, bm) * batch * heads,)](
        q, k, v, out, lse, lse if entropy is None else entropy, o.window if o.rows is None else o.rows, o.window, o.sinks,
        lse if o.key_bias is None else o.key_bias, lse if o.sink is None else o.sink, index, counts,
        scale, o.softcap or 1.0, o.start, n_rows, k.shape[2], heads, heads // k.shape[1],
        0 if o.key_bias is None else k.shape[2], index.shape[-1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        D=dim, DP=max(16, triton.next_power_of_2(dim)), BM=bm, BN=bn, WEIGHT=o.weight, ROWS=o.rows is not None,
        LIST=o.blocks is not None, SOFTCAP=o.softcap is not None, BIAS=o.key_bias is not None, SINK=o.sink is not None,
        ENTROPY=want_entropy, ASM=not interpreting() and not exact, STAGES=stages, EDGE_STAGES=edge_stages,
        GROUPED=table is BANDED, num_warps=warps, num_stages=stages,
    )
    return out, lse, entropy


def mass_of(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, o: Options,
    config: tuple[int, int, int, int, int] | None = None,
) -> torch.Tensor:
    """The Triton path of `kernels.prefill.column_mass`."""
    q, k = _contiguous(q), _contiguous(k)
    # a row that saw nothing has lse -inf; it is masked, but must not make NaN on the way
    lse = (lse.float() * 1.4426950408889634).clamp_min(-1e30).contiguous()
    batch, heads, count, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    exact = q.dtype == torch.float32
    bm, bn, warps, stages, _ = config or _config(MASS, dim, exact)
    mass = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=q.device)
    home(mass_kernel)[(triton.cdiv(n, bn), batch * kv_heads)](
        q, k, lse, mass, o.window, o.sinks, lse if o.key_bias is None else o.key_bias,
        scale, o.softcap or 1.0, o.start, count, n, heads, 0 if o.key_bias is None else n,
        *q.stride()[:3], *k.stride()[:3],
        G=heads // kv_heads, D=dim, DP=max(16, triton.next_power_of_2(dim)), BM=bm, BN=bn, WEIGHT=o.weight,
        SOFTCAP=o.softcap is not None, BIAS=o.key_bias is not None, ASM=not interpreting() and not exact, STAGES=stages,
        num_warps=warps, num_stages=stages,
    )
    return mass
