"""Column mass without the matrix: what every key received, recomputed key block by key block from the row LSEs.

One program owns one key block of one KV head and walks the rows that see it, for every query head of the group, so
each sum has a single writer: no atomics, and the same result every time.
"""

import triton
import triton.language as tl

from kernels.prefill.triton_forward import logits, weigh


@triton.jit
def _rows_tile(total, k, q_ptr, lse_ptr, bias, row0, j, n_rows, n_keys, start, sinks, window, scale, softcap, q_t, d,
               D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, EDGE: tl.constexpr, WEIGHT: tl.constexpr,
               SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr):
    """Adds the weights [BN keys, BM rows] of one row block to total [BN]."""
    row = row0 + tl.arange(0, BM)
    at = q_ptr + row.to(tl.int64)[:, None] * q_t + d[None, :]
    if EDGE:
        q = tl.load(at, mask=(row < n_rows)[:, None] & (d < D)[None, :], other=0.0)
        lse = tl.load(lse_ptr + row, mask=row < n_rows, other=0.0)
    elif D == DP:
        q = tl.load(at)
        lse = tl.load(lse_ptr + row)
    else:
        q = tl.load(at, mask=(d < D)[None, :], other=0.0)
        lse = tl.load(lse_ptr + row)
    s = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, bias, SOFTCAP, BIAS, ASM)
    if WEIGHT == "softmax":
        p = tl.exp2(s - lse[None, :])
    else:
        p = weigh(s, WEIGHT, ASM)
    if EDGE:
        i = start + row[None, :]
        see = (j[:, None] <= i) & ((j[:, None] < sinks) | (i - j[:, None] < window)) & (row < n_rows)[None, :]
        p = tl.where(see & (j < n_keys)[:, None], p, 0.0)
    return total + tl.sum(p, 1)


@triton.jit
def mass_kernel(
    q_ptr, k_ptr, lse_ptr, mass_ptr, window_ptr, sinks_ptr, bias_ptr,
    scale, softcap, start, n_rows, n_keys, heads, bias_stride, q_b, q_h, q_t, k_b, k_h, k_t,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):
    """q [B,Hq,T,d], k [B,Hk,N,d], lse [B,Hq,T] base 2 and finite -> mass [B,Hk,N], summed over rows and the group's heads."""
    key0 = tl.program_id(0) * BN
    kv_heads = heads // G
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    j = key0 + tl.arange(0, BN)
    d = tl.arange(0, DP)
    k = tl.load(k_ptr + b * k_b + kv * k_h + j.to(tl.int64)[:, None] * k_t + d[None, :],
                mask=(j < n_keys)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.zeros([BN], tl.float32)
    for g in range(G):
        h = kv * G + g
        window = tl.load(window_ptr + h)
        sinks = tl.load(sinks_ptr + h)
        qh_ptr = q_ptr + b * q_b + h * q_h
        row_ptr = lse_ptr + (b * heads + h) * n_rows
        bias = 0.0
        if BIAS:
            bias = tl.load(bias_ptr + (b * heads + h) * bias_stride + j, mask=j < n_keys, other=0.0).to(tl.float32)[:, None]
        # rows (relative to start) that see anything here, and those between them that see every key of the block
        reach = tl.where(key0 < sinks, n_rows, tl.minimum(key0 + BN - 1 + window - start, n_rows))
        keep = tl.where(key0 + BN <= sinks, n_rows, tl.minimum(key0 + window - start, n_rows))
        lo = tl.maximum(key0 - start, 0) // BM
        hi = tl.maximum(tl.cdiv(reach, BM), lo)
        full_lo = tl.minimum(tl.cdiv(tl.maximum(key0 + BN - 1 - start, 0), BM), hi)
        full_hi = tl.maximum(tl.minimum(keep // BM, hi), full_lo)
        full_hi = tl.where(key0 + BN <= n_keys, full_hi, full_lo)
        for t in tl.range(full_lo, full_hi, num_stages=STAGES):
            total = _rows_tile(total, k, qh_ptr, row_ptr, bias, t * BM, j, n_rows, n_keys, start, sinks, window, scale,
                               softcap, q_t, d, D, DP, BM, False, WEIGHT, SOFTCAP, BIAS, ASM)
        left = full_lo - lo
        for t in tl.range(0, left + hi - full_hi, num_stages=1):
            block = tl.where(t < left, lo + t, full_hi + t - left)
            total = _rows_tile(total, k, qh_ptr, row_ptr, bias, block * BM, j, n_rows, n_keys, start, sinks, window, scale,
                               softcap, q_t, d, D, DP, BM, True, WEIGHT, SOFTCAP, BIAS, ASM)
    tl.store(mass_ptr + (b * kv_heads + kv) * n_keys + j, total, mask=j < n_keys)
