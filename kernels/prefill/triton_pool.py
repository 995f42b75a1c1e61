"""Triton kernel of block means and deviations."""

import triton
import triton.language as tl


@triton.jit
def pool_kernel(
    x_ptr, mean_ptr, deviation_ptr, rows, lead, x_b, x_h, x_t, heads,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one head of x [B,H,rows,D] (strided): mean and mean absolute deviation float32 [B,H,blocks,D], read once."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    r = block * BLOCK - lead + tl.arange(0, BLOCK)
    inside = (r >= 0) & (r < rows)
    at = x_ptr + (bh // heads) * x_b + (bh % heads) * x_h + r.to(tl.int64)[:, None] * x_t + d[None, :]
    x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    count = tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0)
    mean = tl.sum(x, 0) / count
    off = tl.where(inside[:, None], tl.abs(x - mean[None, :]), 0.0)
    to = (bh * tl.num_programs(0) + block) * D + d
    tl.store(mean_ptr + to, mean, mask=d < D)
    tl.store(deviation_ptr + to, tl.sum(off, 0) / count, mask=d < D)
