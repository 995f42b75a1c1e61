"""The public attention view."""

from __future__ import annotations

import itertools

import torch

from kernels.backend import choose, home
from kernels.view import reference


_compiled: set[tuple] = set()


def pooled(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, *, rows: tuple[int, int], cols: tuple[int, int],
    row_step: int, col_step: int, kind: str = "max", softcap: float | None = None, window: int | None = None,
    key_bias: torch.Tensor | None = None, death: torch.Tensor | None = None, impl: str = "auto",
) -> torch.Tensor:
    """Weights of one head over a window, pooled to cells: float32 [ceil(R/row_step), ceil(C/col_step)].

    q [T,d], k [N,d], lse [T] natural: row i at position i. rows, cols: half-open token ranges. kind "max" or "sum" over
    the row_step x col_step weights under a cell (the last cells may be cut). window: keys further back are invisible.
    key_bias float [N] is part of the logits. death int32 [N]: row from which a key is invisible (evicted). A cell in
    which nothing is visible is 0.
    """
    if kind not in ("max", "sum"):
        raise ValueError(f"unknown pooling {kind!r}; expected 'max' or 'sum'.")
    (r0, r1), (c0, c1) = rows, cols
    if not (0 <= r0 < r1 <= q.shape[0] and 0 <= c0 < c1 <= k.shape[0]):
        raise ValueError(f"rows {rows} and cols {cols} do not lie in {q.shape[0]} rows and {k.shape[0]} keys.")
    if choose(impl, q) == "torch":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return reference.pooled(q, k, lse, scale, rows, cols, row_step, col_step, kind, softcap, window, key_bias, death,
                                dtype).float()
    import triton

    from kernels.backend import interpreting
    from kernels.view.triton_view import view_kernel

    height, dim = -(-(r1 - r0) // row_step), q.shape[1]
    made = (q.device, q.dtype, dim, softcap is None, key_bias is None, death is None)
    if made not in _compiled and not interpreting():
        # every shape is compiled at the first view, so that no later one has to wait for a compiler
        _compiled.add(made)
        corner = {"rows": (0, min(64, q.shape[0])), "cols": (0, min(64, k.shape[0]))}
        for step, wide, how in itertools.product((1, 64), (1, 16), ("max", "sum")):
            pooled(q, k, lse, scale, **corner, row_step=step, col_step=wide, kind=how, softcap=softcap, window=window,
                   key_bias=key_bias, death=death)
    bn = 32 if interpreting() else 128
    # few shapes, so that few are ever compiled; cells wider than `sub` are pooled once more below
    bm = 16 if row_step <= 16 else 64
    sub = 16 if col_step % 16 == 0 else 1
    width = -(-(c1 - c0) // sub)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out = torch.empty(height, width, dtype=torch.float32, device=q.device)
    home(view_kernel)[(triton.cdiv(c1 - c0, bn), height)](
        q, k, lse.contiguous(), lse if key_bias is None else key_bias.contiguous(), lse if death is None else death.contiguous(),
        out, scale, softcap or 1.0, window or 2**30, r0, r1, c0, c1, row_step, width, q.stride(0), k.stride(0),
        D=dim, DP=max(16, triton.next_power_of_2(dim)), BM=bm, BN=bn, SUB=sub, MAX=kind == "max",
        SOFTCAP=softcap is not None, BIAS=key_bias is not None, DEATH=death is not None, num_warps=4, num_stages=2,
    )
    rest = col_step // sub
    if rest == 1:
        return out
    out = torch.nn.functional.pad(out, (0, -width % rest)).unflatten(1, (-1, rest))
    return out.amax(2) if kind == "max" else out.sum(2)
