"""Triton kernels of codes by table: normalise, turn, find the nearest level, pack, in one launch; and back in one."""

import triton
import triton.language as tl


@triton.jit
def _nearest(u, edge_ptr, BITS: tl.constexpr):
    """How many of the 2**BITS - 1 ascending edges lie below each number: the nearest level's index (the lower one at an edge)."""
    code = tl.zeros_like(u).to(tl.int32)
    if BITS <= 4:  # the edges are the same for everybody: a few scalar loads and comparisons
        for e in tl.static_range((1 << BITS) - 1):
            code += (u > tl.load(edge_ptr + e)).to(tl.int32)
    else:
        for s in tl.static_range(BITS):
            reach = code + (1 << (BITS - 1 - s))
            code = tl.where(u > tl.load(edge_ptr + reach - 1), reach, code)
    return code


@triton.jit
def _stream(
    x_ptr, r, ok, at, edge_ptr, low_ptr, high_ptr, lane, turn_ptr, norm, root, code_ptr,
    D: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, SHIFT: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, BR: tl.constexpr, MODE: tl.constexpr, TURN: tl.constexpr,
):
    """PART bits of every code from bit SHIFT on, packed into W bytes at code_ptr + at."""
    j = tl.arange(0, WP)
    inside = ok[:, None] & (j < W)[None, :]
    byte = tl.zeros([BR, WP], tl.int32)
    for p in tl.static_range(8 // PART):
        ch = p * W + j
        if TURN:
            y = tl.zeros([BR, WP], tl.float32)
            for c in tl.static_range((D + BK - 1) // BK):
                k = c * BK + tl.arange(0, BK)
                x = tl.load(x_ptr + r[:, None] * D + k[None, :], mask=ok[:, None] & (k < D)[None, :], other=0.0).to(tl.float32)
                turn = tl.load(turn_ptr + ch[None, :] * D + k[:, None], mask=(k < D)[:, None] & (j < W)[None, :], other=0.0)
                y = tl.dot(x, turn, y, input_precision="ieee")
        else:
            y = tl.load(x_ptr + r[:, None] * D + ch[None, :], mask=inside, other=0.0).to(tl.float32)
        if MODE == "norm":
            y = tl.div_rn(y, tl.maximum(norm, 1e-12)[:, None] + tl.zeros([BR, WP], tl.float32)) * root
        if MODE == "vector" or MODE == "channel":
            if MODE == "vector":
                low = tl.load(low_ptr + r, mask=ok, other=0.0).to(tl.float32)[:, None] + tl.zeros([BR, WP], tl.float32)
                high = tl.load(high_ptr + r, mask=ok, other=1.0).to(tl.float32)[:, None] + tl.zeros([BR, WP], tl.float32)
            else:
                bound = lane[:, None] * D + ch[None, :]
                low = tl.load(low_ptr + bound, mask=inside, other=0.0).to(tl.float32)
                high = tl.load(high_ptr + bound, mask=inside, other=1.0).to(tl.float32)
            y = tl.div_rn(2.0 * (y - low), tl.maximum(high - low, 1e-6)) - 1.0
        byte = byte | (((_nearest(y, edge_ptr, BITS) >> SHIFT) & ((1 << PART) - 1)) << (PART * p))
    tl.store(code_ptr + at[:, None] + j[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit
def table_kernel(
    x_ptr, plain_ptr, slot_ptr, edge_ptr, low_ptr, high_ptr, turn_ptr, code_ptr, norm_ptr, rows, root, span, lanes,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr,  # padded widths of the one or two streams of bytes
    MODE: tl.constexpr,  # "given"; "norm" by the vector's length; "vector", "channel" by ranges of that shape
    TURN: tl.constexpr,  # multiply by turn [D,D] first
):
    """x [rows,D] to code [slots, D*BITS/8] uint8 (and norm float16 [slots]) at the slots named by slot_ptr (-1: skip).

    plain: x before it was turned, whose length is the norm (x itself where the kernel turns, or nobody does).

    edge float32 [2**BITS - 1]: the middles between levels. low, high: [rows], or [lanes,D] of which row r takes lane
    (r // span) % lanes.
    """
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    slot = tl.load(slot_ptr + r, mask=r < rows, other=-1).to(tl.int64)
    ok = slot >= 0
    norm = tl.zeros([BR], tl.float32)
    if MODE == "norm":
        d = tl.arange(0, DP)
        x = tl.load(plain_ptr + r[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        half = tl.sqrt_rn(tl.sum(x * x, 1)).to(tl.float16)
        tl.store(norm_ptr + slot, half, mask=ok)
        norm = half.to(tl.float32)
    lane = (r // span) % lanes
    at = slot * (D * BITS // 8)
    if BITS == 3:  # two bits in one stream, the high bit in another
        _stream(x_ptr, r, ok, at, edge_ptr, low_ptr, high_ptr, lane, turn_ptr, norm, root, code_ptr,
                D, BK, BITS, 2, 0, D // 4, P1, BR, MODE, TURN)
        _stream(x_ptr, r, ok, at + D // 4, edge_ptr, low_ptr, high_ptr, lane, turn_ptr, norm, root, code_ptr,
                D, BK, BITS, 1, 2, D // 8, P2, BR, MODE, TURN)
    else:
        _stream(x_ptr, r, ok, at, edge_ptr, low_ptr, high_ptr, lane, turn_ptr, norm, root, code_ptr,
                D, BK, BITS, BITS, 0, D * BITS // 8, P1, BR, MODE, TURN)


@triton.jit
def from_table_kernel(
    code_ptr, norm_ptr, level_ptr, turn_ptr, out_ptr, rows, unit,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr,
):
    """code [rows, D*BITS/8] uint8 to out [rows,D]: levels times norm times `unit`, multiplied by turn [D,D].

    BR rows and BN channels a program, from BK channels at a time: exact products run outside the tensor cores, so tiles are
    small.
    """
    W: tl.constexpr = D * BITS // 8
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    ok = r < rows
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    y = tl.zeros([BR, BN], tl.float32)
    row = code_ptr + r[:, None] * W
    for c in tl.static_range((D + BK - 1) // BK):
        k = c * BK + tl.arange(0, BK)
        inside = ok[:, None] & (k < D)[None, :]
        if BITS == 3:  # two bits in one stream, the high bit in another
            low = tl.load(row + (k % (D // 4))[None, :], mask=inside, other=0).to(tl.int32)
            high = tl.load(row + (D // 4 + k % (D // 8))[None, :], mask=inside, other=0).to(tl.int32)
            code = ((low >> (2 * (k // (D // 4)))[None, :]) & 3) | (((high >> (k // (D // 8))[None, :]) & 1) << 2)
        else:
            byte = tl.load(row + (k % W)[None, :], mask=inside, other=0).to(tl.int32)
            code = (byte >> (BITS * (k // W))[None, :]) & ((1 << BITS) - 1)
        x = tl.where(inside, tl.load(level_ptr + code), 0.0)
        turn = tl.load(turn_ptr + k[:, None] * D + d[None, :], mask=(k < D)[:, None] & (d < D)[None, :], other=0.0)
        y = tl.dot(x, turn, y, input_precision="ieee")
    norm = tl.load(norm_ptr + r, mask=ok, other=0.0).to(tl.float32) * unit
    y = (y * norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * D + d[None, :], y, mask=ok[:, None] & (d < D)[None, :])
