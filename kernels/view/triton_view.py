"""Triton kernel of the attention view."""

import triton
import triton.language as tl

from kernels.prefill.triton_forward import LOG2E, logits


# Where a window lies must not decide what is compiled: each of these numbers may or may not be a multiple of 16, and a fresh
# compilation of half a second at every new place is what a view would then wait for.
@triton.jit(do_not_specialize=["window", "r0", "r1", "c0", "c1", "row_step", "width"])
def view_kernel(
    q_ptr, k_ptr, lse_ptr, bias_ptr, death_ptr, out_ptr,
    scale, softcap, window, r0, r1, c0, c1, row_step, width, q_t, k_t,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUB: tl.constexpr, MAX: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DEATH: tl.constexpr,
):
    """Row of cells y, keys c0 + x*BN ..: out [h, width] holds the maximum or sum over row_step rows and SUB keys."""
    first = r0 + tl.program_id(1) * row_step
    last = tl.minimum(first + row_step, r1)
    j = c0 + tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    total = tl.zeros([BN], tl.float32)
    key0 = c0 + tl.program_id(0) * BN
    if (key0 < last) & (key0 + BN - 1 + window > first):
        kin = (j < c1)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + j.to(tl.int64)[:, None] * k_t + d[None, :], mask=kin, other=0.0)
        bias = 0.0
        if BIAS:
            bias = tl.load(bias_ptr + j, mask=j < c1, other=0.0).to(tl.float32)[:, None]
        if DEATH:
            death = tl.load(death_ptr + j, mask=j < c1, other=0)
        for t in range(first, last, BM):
            i = t + tl.arange(0, BM)
            qin = (i < last)[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + i.to(tl.int64)[:, None] * q_t + d[None, :], mask=qin, other=0.0)
            lse = tl.load(lse_ptr + i, mask=i < last, other=0.0)
            s = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, bias, SOFTCAP, BIAS, False)
            p = tl.exp2(s - (tl.maximum(lse, -1e30) * LOG2E)[None, :])
            see = (j[:, None] <= i[None, :]) & (i[None, :] - j[:, None] < window) & (i < last)[None, :]
            if DEATH:
                see = see & (i[None, :] < death[:, None])
            p = tl.where(see & (j < c1)[:, None], p, 0.0)
            if MAX:
                total = tl.maximum(total, tl.max(p, 1))
            else:
                total += tl.sum(p, 1)
    groups = tl.reshape(total, [BN // SUB, SUB])
    cell = tl.max(groups, 1) if MAX else tl.sum(groups, 1)
    x = tl.program_id(0) * (BN // SUB) + tl.arange(0, BN // SUB)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * width + x, cell, mask=x < width)
