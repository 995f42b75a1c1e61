"""Triton kernels that write codes and move rows. Bit for bit the same codes as `kernels.codes`."""

import triton
import triton.language as tl


@triton.jit
def _round(x):
    """Nearest integer, halves to even, for |x| < 2^22: adding 1.5*2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _encode(
    x_ptr, r, slot, ok, code_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows r int64 [BR] of x [.,D] coded into slots slot int64 [BR], where ok bool [BR]."""
    PARTS: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    x_row = x_ptr + r[:, None] * D
    scales = ()
    zeros = ()
    c = tl.arange(0, GP)
    for g in tl.static_range(D // GROUP):
        inside = ok[:, None] & (c < GROUP)[None, :]
        x = tl.load(x_row + g * GROUP + c[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.min(tl.where(inside, x, float("inf")), 1)
        high = tl.max(tl.where(inside, x, float("-inf")), 1)
        low = tl.where(ok, low, 0.0)
        high = tl.where(ok, high, 0.0)
        # rounded outwards, as kernels.codes.affine_range
        zero = (low - tl.abs(low) * 0.0009765625).to(tl.float16)
        step = tl.div_rn(tl.maximum(high - zero.to(tl.float32), 0.0), TOP * 1.0 + tl.zeros_like(high))
        scale = (step * 1.0009765625 + 5.9604644775390625e-08).to(tl.float16)
        tl.store(scale_ptr + slot * (D // GROUP) + g, scale, mask=ok)
        tl.store(zero_ptr + slot * (D // GROUP) + g, zero, mask=ok)
        scales = scales + (scale.to(tl.float32),)
        zeros = zeros + (zero.to(tl.float32),)
    j = tl.arange(0, WP)
    byte = tl.zeros([BR, WP], tl.int32)
    for p in tl.static_range(PARTS):
        ch = p * W + j
        inside = ok[:, None] & (j < W)[None, :]
        x = tl.load(x_row + ch[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.zeros([BR, WP], tl.float32)
        zero = tl.zeros([BR, WP], tl.float32)
        for g in tl.static_range(D // GROUP):
            mine = (ch // GROUP == g)[None, :]
            scale = tl.where(mine, scales[g][:, None], scale)
            zero = tl.where(mine, zeros[g][:, None], zero)
        code = _round(tl.div_rn(x - zero, tl.where(scale == 0.0, 1.0, scale)))
        code = tl.minimum(tl.maximum(code, 0.0), TOP * 1.0)
        code = tl.where(scale == 0.0, 0.0, code).to(tl.int32)
        byte = byte | (code << (BITS * p))
    tl.store(code_ptr + slot[:, None] * W + j[None, :], byte.to(tl.uint8), mask=ok[:, None] & (j < W)[None, :])


@triton.jit
def encode_kernel(
    x_ptr, slot_ptr, code_ptr, scale_ptr, zero_ptr, rows,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BR: tl.constexpr,
):
    """Per-token affine codes of x [rows,D] into the slots named by slot_ptr (-1: skip): code [slots,W] uint8, scale and
    zero [slots, D/GROUP] float16."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    slot = tl.load(slot_ptr + r, mask=r < rows, other=-1).to(tl.int64)
    _encode(x_ptr, r.to(tl.int64), slot, slot >= 0, code_ptr, scale_ptr, zero_ptr, D, BITS, GROUP, GP, W, WP, BR)


@triton.jit
def encode_sides_kernel(
    x0_ptr, x1_ptr, source_ptr, slot_ptr, code0_ptr, scale0_ptr, zero0_ptr, code1_ptr, scale1_ptr, zero1_ptr, rows, stride,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BR: tl.constexpr, GATHER: tl.constexpr,
):
    """As `encode_kernel` for one or two tensors at once (the second program axis), whose row r is source[r] with GATHER; the
    slot of row r is slot[r] + r * stride."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = r < rows
    slot = tl.load(slot_ptr + r, mask=ok, other=0).to(tl.int64) + r * stride
    source = r.to(tl.int64)
    if GATHER:
        source = tl.load(source_ptr + r, mask=ok, other=0).to(tl.int64)
    if tl.program_id(1) == 0:
        _encode(x0_ptr, source, slot, ok, code0_ptr, scale0_ptr, zero0_ptr, D, BITS, GROUP, GP, W, WP, BR)
    else:
        _encode(x1_ptr, source, slot, ok, code1_ptr, scale1_ptr, zero1_ptr, D, BITS, GROUP, GP, W, WP, BR)


@triton.jit
def scatter_kernel(x_ptr, slot_ptr, out_ptr, D: tl.constexpr, DP: tl.constexpr):
    """Row x[r] to out[slot[r]], converted; a slot below 0 is skipped."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    slot = tl.load(slot_ptr + r).to(tl.int64)
    if slot >= 0:
        x = tl.load(x_ptr + r * D + d, mask=d < D, other=0.0)
        tl.store(out_ptr + slot * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def count_kernel(keep_ptr, start_ptr, len_ptr, kept_ptr, BN: tl.constexpr):
    """How many entries of each lane survive."""
    lane = tl.program_id(0)
    n = tl.load(len_ptr + lane).to(tl.int32)
    base = tl.load(start_ptr + lane).to(tl.int64)
    total = tl.zeros([BN], tl.int32)
    for t in range(0, n, BN):
        i = t + tl.arange(0, BN)
        total += tl.load(keep_ptr + base + i, mask=i < n, other=0).to(tl.int32)
    tl.store(kept_ptr + lane, tl.sum(total, 0))


@triton.jit
def compact_kernel(
    x_ptr, keep_ptr, start_ptr, len_ptr, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):
    """Moves the kept rows of one lane to its front, order preserved, in place: x [slots,W] words.

    A row never moves to a later slot, and a tile is read whole before it is written, so nothing unread is overwritten.
    """
    lane = tl.program_id(0)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    n = tl.load(len_ptr + lane).to(tl.int32)
    base = tl.load(start_ptr + lane).to(tl.int64)
    done = 0
    for t in range(0, n, BN):
        i = t + tl.arange(0, BN)
        keep = tl.load(keep_ptr + base + i, mask=i < n, other=0).to(tl.int32)
        at = (base + i)[:, None] * W + w[None, :]
        x = tl.load(x_ptr + at, mask=(keep > 0)[:, None] & (w < W)[None, :], other=0)
        tl.debug_barrier()
        to = done + tl.cumsum(keep, 0) - 1
        tl.store(x_ptr + (base + to)[:, None] * W + w[None, :], x, mask=(keep > 0)[:, None] & (w < W)[None, :])
        tl.debug_barrier()
        done += tl.sum(keep, 0)


@triton.jit
def _move(x_ptr, stride, source, target, D: tl.constexpr, P: tl.constexpr):
    """Row `source` of a lane's rows to row `target`."""
    d = tl.arange(0, P)
    row = tl.load(x_ptr + stride + source * D + d, mask=d < D)
    tl.store(x_ptr + stride + target * D + d, row, mask=d < D)


@triton.jit
def evict_kernel(
    tag_ptr, score_ptr, stat_ptr, one_ptr, two_ptr, log_ptr, step_ptr, slot_ptr, base_ptr, quarter_ptr, cos_ptr, sin_ptr,
    n, first, last, tag_stride, score_stride, stat_stride, one_stride, two_stride, lanes,
    BN: tl.constexpr, D1: tl.constexpr, P1: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
    SCORE: tl.constexpr, ADD: tl.constexpr, STAT: tl.constexpr, ROWS: tl.constexpr, LOG: tl.constexpr, FRONT: tl.constexpr,
):
    """One lane: the unprotected entry with the lowest score leaves, the newest (n-1) takes its place; see `evict`."""
    lane = tl.program_id(0).to(tl.int64)
    tags = tag_ptr + lane * tag_stride
    newest = tl.load(tags + n - 1)
    i = tl.arange(0, BN)
    best = float("inf")
    at = n - 1
    for t in range(0, n, BN):
        j = t + i
        inside = j < n
        pos = tl.load(tags + j, mask=inside, other=0)
        if SCORE:
            s = tl.load(score_ptr + lane * score_stride + j, mask=inside, other=float("inf")).to(tl.float32)
            if ADD:
                s += tl.load(stat_ptr + lane * stat_stride + j, mask=inside, other=0.0)
                tl.store(stat_ptr + lane * stat_stride + j, s, mask=inside)
        else:
            s = pos.to(tl.float32)
        s = tl.where(inside & (pos >= first) & (pos <= newest - last), s, float("inf"))
        low = tl.min(s, 0)
        where = tl.max(tl.where((s == low) & inside, j, -1), 0)
        at = tl.where(low <= best, where, at)  # of equals the later
        best = tl.minimum(low, best)
    if ADD:
        tl.debug_barrier()  # the sums just written are read below by other threads
    gone = tl.load(tags + at)
    if LOG:
        tl.store(log_ptr + tl.load(step_ptr) * lanes + lane, gone)
    if STAT:
        stats = stat_ptr + lane * stat_stride
        moved = tl.load(stats + n - 1)
    tl.debug_barrier()  # every read of the old contents before the first write
    tl.store(tags + at, newest)
    tl.store(tags + n - 1, newest + 1)
    if STAT:
        tl.store(stats + at, moved)
        tl.store(stats + n - 1, 0.0)
    if ROWS > 0:
        _move(one_ptr, lane * one_stride, n - 1, at, D1, P1)
    if ROWS > 1:
        _move(two_ptr, lane * two_stride, n - 1, at, D2, P2)
    if FRONT > 0:
        d = tl.arange(0, P1)
        turn = (tl.load(step_ptr) + 1) * D1 + d
        cos = tl.load(cos_ptr + turn, mask=d < D1, other=0.0)
        sin = tl.load(sin_ptr + turn, mask=d < D1, other=0.0)
        for row in range(FRONT):
            own = (lane * FRONT + row) * D1 + d
            base = tl.load(base_ptr + own, mask=d < D1, other=0.0)
            quarter = tl.load(quarter_ptr + own, mask=d < D1, other=0.0)
            turned = base * cos + quarter * sin
            tl.store(one_ptr + lane * one_stride + row * D1 + d, turned.to(one_ptr.dtype.element_ty), mask=d < D1)
    tl.store(slot_ptr + lane, at.to(tl.int64))
