"""Prefill attention: row blocks against key blocks, in two loops.

Structure first: for a block of rows the visible keys are a run of sinks and a band below the diagonal. Blocks that every
row sees whole go through the first loop without a mask; the few at an edge (window, diagonal, last sinks) through the
second. Nothing invisible is visited, so time follows the mask.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)


@triton.jit
def tanh(x, ASM: tl.constexpr):
    """Hyperbolic tangent: one instruction on the GPU (relative error 2^-11), exponentials elsewhere."""
    if ASM:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        e = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        y = tl.where(x < 0, -y, y)
    return y


@triton.jit
def logits(raw, scale, softcap, bias, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr):
    """Natural-unit logits times log2(e) from raw products; bias is already a row vector or nothing."""
    if SOFTCAP:
        s = softcap * LOG2E * tanh(raw * (scale / softcap), False)
    else:
        s = raw * (scale * LOG2E)
    if BIAS:
        s += bias * LOG2E
    return s


@triton.jit
def weigh(s, WEIGHT: tl.constexpr, ASM: tl.constexpr):
    """Weights that need no normaliser, from base-2 logits: sigmoid or relu."""
    if WEIGHT == "sigmoid":
        p = 0.5 + 0.5 * tanh(s * (0.5 / LOG2E), ASM)
    else:
        p = tl.maximum(s * (1.0 / LOG2E), 0.0)
    return p


@triton.jit
def _tile(
    acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, b_ptr, key0, pos, n_keys, sinks, window, scale, softcap, k_stride, v_stride, d,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ENTROPY: tl.constexpr, ASM: tl.constexpr,
):
    """One key block. EDGE: some key may be invisible to some row, or lie past the end.

    k_at, v_at [BN,DP] int32, the places of a block's numbers from its start, are the same for every block: an address is then
    one scalar and one addition instead of a 64-bit product.
    """
    j = key0 + tl.arange(0, BN)
    if DP <= 128:
        at = k_ptr + tl.cast(key0, tl.int64) * k_stride + k_at
        vat = v_ptr + tl.cast(key0, tl.int64) * v_stride + v_at
    else:  # too many registers
        at = k_ptr + j.to(tl.int64)[:, None] * k_stride + d[None, :]
        vat = v_ptr + j.to(tl.int64)[:, None] * v_stride + d[None, :]
    if EDGE:
        k = tl.load(at, mask=(j < n_keys)[:, None] & (d < D)[None, :], other=0.0)
    elif D == DP:
        k = tl.load(at)
    else:
        k = tl.load(at, mask=(d < D)[None, :], other=0.0)
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    bias = 0.0
    if BIAS:
        bias = tl.load(b_ptr + j, mask=j < n_keys, other=0.0).to(tl.float32)[None, :]
    # without cap or bias the scale waits for the exponent, where it is part of a fused multiply-add
    LATE: tl.constexpr = WEIGHT == "softmax" and not SOFTCAP and not BIAS
    if LATE:
        s = raw
    else:
        s = logits(raw, scale, softcap, bias, SOFTCAP, BIAS, ASM)
    if EDGE:
        # two comparisons a logit: what does not depend on both row and key is settled before, a sink by lying inside any window
        newest = tl.minimum(pos, n_keys - 1)[:, None]
        near = tl.where(j < sinks, 0x7FFFFFFF, j)[None, :]
        see = (j[None, :] <= newest) & (near > (pos - window)[:, None])
        s = tl.where(see, s, float("-inf"))
    if WEIGHT == "softmax":
        if LATE:
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        if ENTROPY:
            part = tl.sum(p * tl.maximum(s, FLOOR), 1) if EDGE else tl.sum(p * s, 1)
            if LATE:
                part = part * (scale * LOG2E)
            ent = ent * alpha + part
        acc = acc * alpha[:, None]
        m = m_new
    else:
        p = weigh(s, WEIGHT, ASM)
        if EDGE:
            p = tl.where(see, p, 0.0)
        l += tl.sum(p, 1)
    if EDGE:
        v = tl.load(vat, mask=(j < n_keys)[:, None] & (d < D)[None, :], other=0.0)
    elif D == DP:
        v = tl.load(vat)
    else:
        v = tl.load(vat, mask=(d < D)[None, :], other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m, l, ent


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ent_ptr, pos_ptr, window_ptr, sinks_ptr, bias_ptr, logit_ptr, list_ptr, count_ptr,
    scale, softcap, start, n_rows, n_keys, heads, group, bias_stride, list_width,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,  # pos_ptr names the absolute position (and q row, less start) of each output row
    LIST: tl.constexpr,  # visit only listed key blocks
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SINK: tl.constexpr, ENTROPY: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
    GROUPED: tl.constexpr,  # programs of one KV head's query heads next to each other, else row blocks of one head
):
    """q [B,Hq,T,d] (strided), k, v [B,Hk,N,d] -> o [B,Hq,n_rows,d], lse and entropy [B,Hq,n_rows]."""
    blocks = tl.cdiv(n_rows, BM)
    pid = tl.program_id(0)
    # the last rows see most keys: start them first
    if GROUPED:
        block = blocks - 1 - pid // group % blocks
        bh = pid // (group * blocks) * group + pid % group
    else:
        block = blocks - 1 - pid % blocks
        bh = pid // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    row = block * BM + tl.arange(0, BM)
    inside = row < n_rows
    if ROWS:
        pos = tl.load(pos_ptr + tl.minimum(row, n_rows - 1))
        first = tl.load(pos_ptr + block * BM)
        last = tl.load(pos_ptr + tl.minimum(block * BM + BM, n_rows) - 1)
    else:
        pos = start + tl.minimum(row, n_rows - 1)
        first = start + block * BM
        last = start + tl.minimum(block * BM + BM, n_rows) - 1
    window = tl.load(window_ptr + h)
    sinks = tl.load(sinks_ptr + h)
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + b * q_b + h * q_h + (pos - start).to(tl.int64)[:, None] * q_t + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += b * k_b + (h // group) * k_h
    v_ptr += b * v_b + (h // group) * v_h
    b_ptr = bias_ptr + (b * heads + h) * bias_stride
    k_at = tl.arange(0, BN)[:, None] * k_t + d[None, :]
    v_at = tl.arange(0, BN)[:, None] * v_t + d[None, :]
    m = tl.full([BM], FLOOR, tl.float32)
    l = tl.zeros([BM], tl.float32)
    ent = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)

    if LIST:
        list_ptr += (bh.to(tl.int64) * blocks + block) * list_width
        listed = tl.load(count_ptr + bh.to(tl.int64) * blocks + block)
        for t in tl.range(0, listed, num_stages=STAGES):
            key0 = tl.load(list_ptr + t) * BN
            acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, b_ptr, key0, pos, n_keys, sinks, window, scale,
                                   softcap, k_t, v_t, d, D, DP, BN, True, WEIGHT, SOFTCAP, BIAS, ENTROPY, ASM)
    else:
        end = tl.minimum(last + 1, n_keys)
        band_lo = tl.maximum(first - window + 1, 0) // BN
        band_hi = tl.cdiv(end, BN)
        full_lo = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BN), band_hi)
        full_hi = tl.maximum(tl.minimum(first + 1, n_keys) // BN, full_lo)
        sink_full = tl.minimum(sinks // BN, band_lo)
        whole = sink_full + full_hi - full_lo
        for t in tl.range(0, whole, num_stages=STAGES):
            key0 = tl.where(t < sink_full, t, full_lo + t - sink_full) * BN
            acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, b_ptr, key0, pos, n_keys, sinks, window, scale,
                                   softcap, k_t, v_t, d, D, DP, BN, False, WEIGHT, SOFTCAP, BIAS, ENTROPY, ASM)
        left = full_lo - band_lo
        right = band_hi - full_hi
        part = tl.where((sinks > sink_full * BN) & (sink_full < band_lo), 1, 0)
        for t in tl.range(0, left + right + part, num_stages=EDGE_STAGES):
            key0 = tl.where(t < left, band_lo + t, tl.where(t < left + right, full_hi + t - left, sink_full)) * BN
            acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, b_ptr, key0, pos, n_keys, sinks, window, scale,
                                   softcap, k_t, v_t, d, D, DP, BN, True, WEIGHT, SOFTCAP, BIAS, ENTROPY, ASM)

    at = bh.to(tl.int64) * n_rows + row
    if WEIGHT == "softmax":
        keys = l
        if SINK:
            logit = tl.load(logit_ptr + h).to(tl.float32) * LOG2E
            top = tl.maximum(m, logit)
            keys = l * tl.exp2(m - top)
            acc = acc * tl.exp2(m - top)[:, None]
            ent = ent * tl.exp2(m - top)
            l = keys + tl.exp2(logit - top)
            m = top
        inv = tl.where(l > 0.0, 1.0 / tl.maximum(l, 1e-37), 0.0)
        acc = acc * inv[:, None]
        lse = tl.where(l > 0.0, m + tl.log2(tl.maximum(l, 1e-37)), float("-inf"))
        tl.store(lse_ptr + at, lse * LN2, mask=inside)
        if ENTROPY:
            h_row = tl.maximum(lse, -1e30) * keys * inv - ent * inv
            tl.store(ent_ptr + at, tl.where(keys > 0.0, tl.maximum(h_row, 0.0), 0.0) * LN2, mask=inside)
    else:
        tl.store(lse_ptr + at, tl.where(l > 0.0, tl.log2(tl.maximum(l, 1e-37)), float("-inf")) * LN2, mask=inside)
    tl.store(o_ptr + at[:, None] * D + d[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
