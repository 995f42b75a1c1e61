"""Triton kernel of per-channel codes (KIVI's keys). Bit for bit the same codes as `kernels.codes.encode_channels`."""

import triton
import triton.language as tl


@triton.jit
def channels_kernel(
    x_ptr, slot_ptr, row_ptr, code_ptr, scale_ptr, zero_ptr, group_ptr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    NAMES: tl.constexpr,
):
    """One block of x [n,G,D], BW bytes wide: its rows to slots slot[i] .. slot[i]+G of code [slots,W] uint8, the scale and
    zero of its channels to row row[i] of scale, zero [rows,D] float16; with NAMES that row's number to the slots of group
    int32 [slots]. A slot below 0 is skipped.

    A byte holds channels that lie W apart, so a program reads 8/BITS tiles of BW channels, and each channel is reduced,
    rounded and packed in registers: x is read once.
    """
    PARTS: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    block = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + block).to(tl.int64)
    if slot >= 0:
        row = tl.load(row_ptr + block).to(tl.int64)
        r = tl.arange(0, GP)
        j = tl.program_id(1) * BW + tl.arange(0, BW)
        inside = (r < G)[:, None] & (j < W)[None, :]
        byte = tl.zeros([GP, BW], tl.int32)
        for p in tl.static_range(PARTS):
            ch = p * W + j
            x = tl.load(x_ptr + (block * G + r)[:, None] * D + ch[None, :], mask=inside, other=0.0).to(tl.float32)
            low = tl.where(j < W, tl.min(tl.where(inside, x, float("inf")), 0), 0.0)
            high = tl.where(j < W, tl.max(tl.where(inside, x, float("-inf")), 0), 0.0)
            # rounded outwards, as kernels.codes.affine_range
            zero = (low - tl.abs(low) * 0.0009765625).to(tl.float16)
            step = tl.div_rn(tl.maximum(high - zero.to(tl.float32), 0.0), TOP * 1.0 + tl.zeros_like(high))
            scale = (step * 1.0009765625 + 5.9604644775390625e-08).to(tl.float16)
            tl.store(scale_ptr + row * D + ch, scale, mask=j < W)
            tl.store(zero_ptr + row * D + ch, zero, mask=j < W)
            wide = scale.to(tl.float32)[None, :] + tl.zeros([GP, BW], tl.float32)
            code = tl.div_rn(x - zero.to(tl.float32)[None, :], tl.where(wide == 0.0, 1.0, wide))
            code = (code + 12582912.0) - 12582912.0  # nearest, halves to even: 1.5*2^23 leaves no fraction bits
            code = tl.minimum(tl.maximum(code, 0.0), TOP * 1.0)
            byte = byte | (tl.where(wide == 0.0, 0.0, code).to(tl.int32) << (BITS * p))
        tl.store(code_ptr + (slot + r)[:, None] * W + j[None, :], byte.to(tl.uint8), mask=inside)
        if NAMES:
            if tl.program_id(1) == 0:
                tl.store(group_ptr + slot + r, (row + 0 * r).to(tl.int32), mask=r < G)
