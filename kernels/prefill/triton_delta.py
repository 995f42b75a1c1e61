"""A-shape with Delta correction in two launches.

What a dense row adds to its A-shape is the keys between the sinks and the window. The first launch attends the chosen rows to
just those, the query heads of a KV head packed into one tile (their rows lie at the same positions, so a tile spans fewer of
them) and the keys cut among programs. The second is the A-shape, which joins those parts to its own chosen rows while it still
holds them and adds the difference to the rows it stands for: no pass over the output.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.prefill.triton_forward import FLOOR, _tile


@triton.jit
def rest_kernel(
    q_ptr, k_ptr, v_ptr, pos_ptr, part_ptr, lse_ptr,
    scale, start, n_exact, heads, group, sinks, window, chunk,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr, PDL: tl.constexpr,
):
    """Rows at positions pos_ptr [n_exact], ascending, against keys sinks .. pos - window, of which split program_id(2) takes
    `chunk`: part_ptr [splits,B,Hq,n_exact,D] float32, lse_ptr [splits,B,Hq,n_exact] base 2, -inf (and no part) where empty."""
    if PDL:
        gdc_launch_dependents()
    ROWS: tl.constexpr = BM // GP
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows have most keys: start them first
    lane = tl.program_id(1)
    split = tl.program_id(2)
    kv_heads = heads // group
    b = (lane // kv_heads).to(tl.int64)
    hk = (lane % kv_heads).to(tl.int64)
    r = tl.arange(0, BM)
    e = block * ROWS + r // GP
    inside = (e < n_exact) & (r % GP < group)
    h = hk * group + tl.minimum(r % GP, group - 1)
    pos = tl.load(pos_ptr + tl.minimum(e, n_exact - 1))
    first = tl.load(pos_ptr + block * ROWS)
    last = tl.load(pos_ptr + tl.minimum(block * ROWS + ROWS, n_exact) - 1)
    lo = sinks + split * chunk
    hi = tl.minimum(last - window + 1, lo + chunk)
    at = ((split * tl.num_programs(1) // kv_heads + b) * heads + h) * n_exact + e
    if lo >= hi:
        tl.store(lse_ptr + at, tl.full([BM], float("-inf"), tl.float32), mask=inside)
        return
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + b * q_b + h[:, None] * q_h + (pos - start).to(tl.int64)[:, None] * q_t + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += b * k_b + hk * k_h
    v_ptr += b * v_b + hk * v_h
    k_at = tl.arange(0, BN)[:, None] * k_t + d[None, :]
    v_at = tl.arange(0, BN)[:, None] * v_t + d[None, :]
    m = tl.full([BM], FLOOR, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    ent = tl.zeros([BM], tl.float32)
    whole = tl.minimum(tl.maximum(tl.minimum(first - window + 1, hi) - lo, 0) // BN, tl.cdiv(hi - lo, BN))
    for t in tl.range(0, whole, num_stages=STAGES):
        acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, lse_ptr, lo + t * BN, pos, hi, 0, 1, scale, 1.0, k_t,
                               v_t, d, D, DP, BN, False, "softmax", False, False, False, ASM)
    # what is seen of a block at the edge ends `window` before each row: rows moved there, under a window without end
    for t in tl.range(whole, tl.cdiv(hi - lo, BN), num_stages=EDGE_STAGES):
        acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, lse_ptr, lo + t * BN, pos - window, hi, 0, 0x40000000,
                               scale, 1.0, k_t, v_t, d, D, DP, BN, True, "softmax", False, False, False, ASM)
    seen = l > 0.0
    acc = acc * tl.where(seen, 1.0 / tl.maximum(l, 1e-37), 0.0)[:, None]
    tl.store(lse_ptr + at, tl.where(seen, m + tl.log2(tl.maximum(l, 1e-37)), float("-inf")), mask=inside)
    tl.store(part_ptr + at[:, None] * D + d[None, :], acc, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def delta_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, part_ptr, part_lse_ptr,
    scale, start, n_rows, n_keys, heads, group, sinks, window, n_exact, body, splits,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GAMMA: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
    GROUPED: tl.constexpr,  # programs of one KV head's query heads next to each other, else row blocks of one head
    MOST: tl.constexpr,  # a power of two, at least `splits`
    PDL: tl.constexpr,
):
    """A-shape of all rows, o_ptr [B,Hq,n_rows,D], with the parts of `rest_kernel` joined in.

    Rows before `body` are corrected by their anchor, the row at the multiple of GAMMA (which divides BM) at or before them; the
    others are made dense by their own part.
    """
    blocks = tl.cdiv(n_rows, BM)
    pid = tl.program_id(0)
    if GROUPED:
        block = blocks - 1 - pid // group % blocks
        bh = pid // (group * blocks) * group + pid % group
    else:
        block = blocks - 1 - pid % blocks
        bh = pid // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    local = tl.arange(0, BM)
    row = block * BM + local
    inside = row < n_rows
    pos = start + tl.minimum(row, n_rows - 1)
    first = start + block * BM
    last = start + tl.minimum(block * BM + BM, n_rows) - 1
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + b * q_b + h * q_h + (pos - start).to(tl.int64)[:, None] * q_t + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += b * k_b + (h // group) * k_h
    v_ptr += b * v_b + (h // group) * v_h
    k_at = tl.arange(0, BN)[:, None] * k_t + d[None, :]
    v_at = tl.arange(0, BN)[:, None] * v_t + d[None, :]
    m = tl.full([BM], FLOOR, tl.float32)
    l = tl.zeros([BM], tl.float32)
    ent = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    band_lo = tl.maximum(first - window + 1, 0) // BN
    band_hi = tl.cdiv(last + 1, BN)
    full_lo = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BN), band_hi)
    full_hi = tl.maximum((first + 1) // BN, full_lo)
    sink_full = tl.minimum(sinks // BN, band_lo)
    whole = sink_full + full_hi - full_lo
    for t in tl.range(0, whole, num_stages=STAGES):
        key0 = tl.where(t < sink_full, t, full_lo + t - sink_full) * BN
        acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, part_ptr, key0, pos, n_keys, sinks, window, scale,
                               1.0, k_t, v_t, d, D, DP, BN, False, "softmax", False, False, False, ASM)
    left = full_lo - band_lo
    right = band_hi - full_hi
    some = tl.where((sinks > sink_full * BN) & (sink_full < band_lo), 1, 0)
    for t in tl.range(0, left + right + some, num_stages=EDGE_STAGES):
        key0 = tl.where(t < left, band_lo + t, tl.where(t < left + right, full_hi + t - left, sink_full)) * BN
        acc, m, l, ent = _tile(acc, m, l, ent, q, k_ptr, v_ptr, k_at, v_at, part_ptr, key0, pos, n_keys, sinks, window, scale,
                               1.0, k_t, v_t, d, D, DP, BN, True, "softmax", False, False, False, ASM)
    acc = acc * (1.0 / l)[:, None]  # a row sees itself, so l > 0
    lse = m + tl.log2(l)
    if PDL:
        gdc_wait()  # the parts are needed only from here on
    n_anchors = body // GAMMA
    stride = tl.num_programs(0) // blocks * n_exact  # rows of one split
    base = bh.to(tl.int64) * n_exact
    if block * BM + BM <= body:
        # the usual case: whole groups of rows, each corrected by its first
        i = tl.arange(0, MOST)
        for a in tl.static_range(BM // GAMMA):
            where = base + block * (BM // GAMMA) + a + i * stride
            lses = tl.load(part_lse_ptr + where, mask=i < splits, other=float("-inf"))
            top = tl.maximum(tl.max(lses), FLOOR)
            w = tl.exp2(lses - top)
            z = tl.sum(w)
            parts = tl.load(part_ptr + where[:, None] * D + d[None, :], mask=(w > 0.0)[:, None] & (d < D)[None, :], other=0.0)
            own = tl.gather(acc, tl.full([1, DP], a * GAMMA, tl.int32), 0)
            own_lse = tl.sum(tl.where(local == a * GAMMA, lse, 0.0), 0)
            weight = z / (z + tl.exp2(tl.minimum(own_lse - top, 120.0)))
            shift = weight * ((tl.sum(parts * w[:, None], 0) / tl.maximum(z, 1e-30))[None, :] - own)
            if BM == GAMMA:
                acc += shift
            else:
                acc += tl.where((local // GAMMA == a)[:, None], shift, 0.0)
    else:
        which = base + tl.where(row < body, row // GAMMA, n_anchors + tl.minimum(row, n_rows - 1) - body)
        its = acc
        its_lse = lse
        for a in tl.static_range(BM // GAMMA):
            mine = (local // GAMMA == a) & (row < body)
            anchor = tl.sum(tl.where((local == a * GAMMA)[:, None], acc, 0.0), 0)
            anchor_lse = tl.sum(tl.where(local == a * GAMMA, lse, 0.0), 0)
            its = tl.where(mine[:, None], anchor[None, :], its)
            its_lse = tl.where(mine, anchor_lse, its_lse)
        tops = tl.full([BM], float("-inf"), tl.float32)
        for s in range(0, splits):
            tops = tl.maximum(tops, tl.load(part_lse_ptr + which + s * stride))
        tops = tl.maximum(tops, FLOOR)
        zs = tl.zeros([BM], tl.float32)
        for s in range(0, splits):
            zs += tl.exp2(tl.load(part_lse_ptr + which + s * stride) - tops)
        total = zs + tl.exp2(tl.minimum(its_lse - tops, 120.0))
        acc -= its * (zs / total)[:, None]
        for s in range(0, splits):
            ws = tl.exp2(tl.load(part_lse_ptr + which + s * stride) - tops)
            piece = tl.load(part_ptr + (which + s * stride)[:, None] * D + d[None, :],
                            mask=(d < D)[None, :] & (ws > 0.0)[:, None], other=0.0)
            acc += piece * (ws / total)[:, None]
    at = bh.to(tl.int64) * n_rows + row
    tl.store(o_ptr + at[:, None] * D + d[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
