"""Triton kernels of page selection."""

import triton
import triton.language as tl


@triton.jit
def summary_kernel(
    k_ptr, start_ptr, len_ptr, low_ptr, high_ptr, pages,
    PAGE: tl.constexpr,
    PP: tl.constexpr,  # PAGE up to a power of two
    D: tl.constexpr, DP: tl.constexpr, MEAN: tl.constexpr,
    NEWEST: tl.constexpr,  # the page of the lane's last entry instead of page program_id(0)
):
    """One page of one lane: k [slots,D] -> low, high [lanes,pages,D] (or the centroid in low)."""
    lane = tl.program_id(1).to(tl.int64)
    n = tl.load(len_ptr + lane).to(tl.int32)
    if NEWEST:
        p = tl.maximum(n - 1, 0) // PAGE
    else:
        p = tl.program_id(0)
    d = tl.arange(0, DP)
    within = tl.arange(0, PP)
    i = p * PAGE + within
    slot = tl.load(start_ptr + lane).to(tl.int64) + i
    alive = ((within < PAGE) & (i < n))[:, None]
    x = tl.load(k_ptr + slot[:, None] * D + d[None, :], mask=alive & (d < D)[None, :], other=0.0).to(tl.float32)
    out = (lane * pages + p) * D + d
    some = p * PAGE < n
    if MEAN:
        mean = tl.sum(x, 0) / tl.maximum(tl.minimum(n - p * PAGE, PAGE), 1)
        tl.store(low_ptr + out, mean.to(low_ptr.dtype.element_ty), mask=d < D)
    else:
        low = tl.where(some, tl.min(tl.where(alive, x, float("inf")), 0), 0.0)
        high = tl.where(some, tl.max(tl.where(alive, x, float("-inf")), 0), 0.0)
        tl.store(low_ptr + out, low.to(low_ptr.dtype.element_ty), mask=d < D)
        tl.store(high_ptr + out, high.to(high_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def score_kernel(
    q_ptr, low_ptr, high_ptr, len_ptr, score_ptr, pages,
    PAGE: tl.constexpr, G: tl.constexpr, NQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Scores of BP pages of one lane: sum_c max(q_c low_c, q_c high_c) is two products, q+ with high and q- with low."""
    lane = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    have = tl.cdiv(tl.load(len_ptr + lane).to(tl.int32), PAGE)
    if tl.program_id(0) * BP >= have:
        tl.store(score_ptr + lane * pages + p, tl.full([BP], float("-inf"), tl.float32), mask=p < pages)
        return
    g = tl.arange(0, NQ)
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + (lane * G + g)[None, :] * D + d[:, None], mask=(g < G)[None, :] & (d < D)[:, None], other=0.0)
    at = (lane * pages + p)[:, None] * D + d[None, :]
    ok = (p < have)[:, None] & (d < D)[None, :]
    low = tl.load(low_ptr + at, mask=ok, other=0.0)
    if MEAN:
        s = tl.dot(low, q.to(low.dtype), input_precision="ieee")
        score = tl.sum(tl.where((g < G)[None, :], s, 0.0), 1) / G
    else:
        high = tl.load(high_ptr + at, mask=ok, other=0.0)
        zero = tl.zeros_like(q)
        s = tl.dot(high, tl.maximum(q, zero).to(low.dtype), input_precision="ieee")
        s = tl.dot(low, tl.minimum(q, zero).to(low.dtype), s, input_precision="ieee")
        score = tl.max(tl.where((g < G)[None, :], s, float("-inf")), 1)
    tl.store(score_ptr + lane * pages + p, tl.where(p < have, score, float("-inf")), mask=p < pages)


@triton.jit
def top_kernel(
    score_ptr, len_ptr, list_ptr, out_ptr, want_ptr, pages, count, given, last,
    PAGE: tl.constexpr, PP: tl.constexpr, GIVEN: tl.constexpr,
    WANT: tl.constexpr,  # the number at want_ptr of them, at most count
):
    """The best `count` of PP candidates of one lane in ascending order, -1 where there are fewer; pages of the lane's `last`
    entries come first.

    Candidates are the pages PP*program .. of the lane, or with GIVEN the pages named in list_ptr [lanes, given]. The
    count-th largest score is found two bits at a time on an order-preserving integer image of the floats: 16 counting
    passes over registers, no sort. Each pass counts against three bounds at once, packed in one 64-bit sum. Ties go to
    the lower page.
    """
    lane = tl.program_id(0).to(tl.int64)
    n = tl.load(len_ptr + lane).to(tl.int32)
    have = tl.cdiv(n, PAGE)
    i = tl.arange(0, PP)
    if GIVEN:
        p = tl.load(list_ptr + lane * given + i, mask=i < given, other=-1)
    else:
        p = tl.program_id(1) * PP + i
    real = (p >= 0) & (p < have)
    s = tl.load(score_ptr + lane * pages + p, mask=real, other=float("-inf"))
    bits = (s + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(p >= tl.where(last > 0, tl.maximum(n - last, 0) // PAGE, have), 0x7FFFFFFF, key)
    key = tl.where(real, key, -0x80000000)
    want = tl.minimum(count, tl.sum(real.to(tl.int32), 0))
    if WANT:
        want = tl.minimum(want, tl.load(want_ptr))
    bound = tl.full([1], -0x80000000, tl.int32)
    for b in tl.static_range(16):
        step = tl.full([1], 1, tl.int32) << (30 - 2 * b)
        n1 = (key >= bound + step).to(tl.int64)
        n2 = (key >= bound + step * 2).to(tl.int64)
        n3 = (key >= bound + step * 3).to(tl.int64)
        packed = tl.sum(n1 + (n2 << 21) + (n3 << 42), 0)
        more = ((packed & 0x1FFFFF) >= want).to(tl.int32)
        more += (((packed >> 21) & 0x1FFFFF) >= want).to(tl.int32)
        more += ((packed >> 42) >= want).to(tl.int32)
        bound += step * more
    above = key > bound
    tie = (key == bound) & real
    rest = want - tl.sum(above.to(tl.int32), 0)
    keep = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= rest))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    out = out_ptr + (lane * tl.num_programs(1) + tl.program_id(1)) * count
    tl.store(out + place, p, mask=keep)
    tl.store(out + want + i, tl.full([PP], -1, tl.int32), mask=want + i < count)
