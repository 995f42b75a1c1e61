"""Page selection in two launches: a program scores a whole slice of a lane's pages and keeps that slice's best in registers;
one small program per lane then picks among the slices' best."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CEILING = tl.constexpr(0x7FFFFF00)  # above every float's key, and far enough below 2**31 for bounds to be added to


@triton.jit
def _keys(s):
    """An int32 image of floats that keeps their order; -0 equals +0, NaN lies at the ends."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -CEILING), CEILING)


@triton.jit
def _best(key, real, want, BOUNDS: tl.constexpr):
    """Mask of the `want` largest keys [PP] among the real ones; ties go to the lower place. want <= number of real ones.

    Searches the want-th largest between the least and the largest key. A pass counts against BOUNDS bounds at once, packed into
    one int32 sum (one reduction instruction of a warp), and ends as soon as exactly `want` lie above: about log(keys) passes,
    where a search over all bits needs 16.
    """
    BITS: tl.constexpr = 30 // BOUNDS
    n = tl.sum(real.to(tl.int32))
    lo = tl.min(tl.where(real, key, CEILING))
    hi = tl.max(tl.where(real, key, -CEILING)) + 1
    lo = tl.where(want > 0, lo, hi)
    n = tl.where(want > 0, n, 0)
    width = tl.maximum(hi.to(tl.int64) - lo.to(tl.int64), 0)
    key = tl.where(real, key, -0x80000000)
    while (n > want) & (width > 1):
        step = ((width + BOUNDS) // (BOUNDS + 1)).to(tl.int32)
        packed = tl.zeros_like(key)
        for b in tl.static_range(BOUNDS):
            packed += (key >= lo + step * (b + 1)).to(tl.int32) << (BITS * b)
        counts = tl.sum(packed)
        more = 0
        for b in tl.static_range(BOUNDS):
            c = (counts >> (BITS * b)) & ((1 << BITS) - 1)
            enough = c >= want
            more += enough.to(tl.int32)
            n = tl.where(enough, c, n)
        lo += step * more
        width = tl.minimum(step.to(tl.int64), hi.to(tl.int64) - lo.to(tl.int64))
    keep = key >= lo
    if n > want:  # equal keys at the bound
        tie = key == lo
        rest = want - (n - tl.sum(tie.to(tl.int32)))
        keep = (key > lo) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= rest))
    return keep & real


@triton.jit
def _pages(n, last, PAGE: tl.constexpr):
    """(pages that n entries fill, the first of those that hold the newest `last`: from there on all are read)."""
    have = tl.cdiv(n, PAGE)
    return have, tl.where(last > 0, tl.maximum(n - last, 0) // PAGE, have)


@triton.jit
def slice_kernel(
    q_ptr, low_ptr, high_ptr, len_ptr, key_ptr, page_ptr, score_ptr, pages, parts, keep_count, last,
    PAGE: tl.constexpr, G: tl.constexpr, NQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr,  # pages of one tile
    TILES: tl.constexpr,  # tiles of a slice
    BOUNDS: tl.constexpr, STAGES: tl.constexpr, MEAN: tl.constexpr,
    SCORES: tl.constexpr,  # also write the scores
    PDL: tl.constexpr,  # let the next launch start: 1 at once, 2 after the last tile
):
    """Slice program_id(0) of lane program_id(1): the keys and pages of its best keep_count, ascending by page, into
    key_ptr, page_ptr [lanes, parts, keep_count]. A slice with fewer pages leaves the rest of its row unwritten."""
    if PDL == 1:
        gdc_launch_dependents()
    part = tl.program_id(0)
    lane = tl.program_id(1).to(tl.int64)
    have, newest = _pages(tl.load(len_ptr + lane).to(tl.int32), last, PAGE)
    first = part * (BP * TILES)
    count = tl.minimum(have - first, BP * TILES)
    g = tl.arange(0, NQ)
    d = tl.arange(0, DP)
    i = tl.arange(0, BP)
    q = tl.load(q_ptr + (lane * G + g)[None, :] * D + d[:, None], mask=(g < G)[None, :] & (d < D)[:, None], other=0.0)
    zero = tl.zeros_like(q)
    up = tl.maximum(q, zero).to(low_ptr.dtype.element_ty)
    down = tl.minimum(q, zero).to(low_ptr.dtype.element_ty)
    q = q.to(low_ptr.dtype.element_ty)
    low_ptr += (lane * pages + first) * D
    high_ptr += (lane * pages + first) * D
    found = tl.full([TILES, BP], float("-inf"), tl.float32)
    row = tl.arange(0, TILES)[:, None]
    for t in tl.range(0, tl.cdiv(tl.maximum(count, 0), BP), num_stages=STAGES):
        # rows past the end repeat the last one, so that loads need no mask
        at = tl.minimum(t * BP + i, count - 1)[:, None] * D + d[None, :]
        if D == DP:
            low = tl.load(low_ptr + at)
        else:
            low = tl.load(low_ptr + at, mask=(d < D)[None, :], other=0.0)
        if MEAN:
            s = tl.dot(low, q, input_precision="ieee")
            score = tl.sum(tl.where((g < G)[None, :], s, 0.0), 1) / G
        else:
            if D == DP:
                high = tl.load(high_ptr + at)
            else:
                high = tl.load(high_ptr + at, mask=(d < D)[None, :], other=0.0)
            s = tl.dot(high, up, input_precision="ieee")
            s = tl.dot(low, down, s, input_precision="ieee")
            score = tl.max(tl.where((g < G)[None, :], s, float("-inf")), 1)
        found = tl.where(row == t, score[None, :], found)
    if PDL == 2:
        gdc_launch_dependents()
    place = tl.arange(0, BP * TILES)
    s = tl.reshape(found, [BP * TILES])
    p = first + place
    if SCORES:
        tl.store(score_ptr + lane * pages + p, tl.where(p < have, s, float("-inf")), mask=p < pages)
    if count <= 0:
        return
    real = p < have
    key = _keys(s)
    always = real & (p >= newest)
    want = tl.minimum(keep_count, count) - tl.maximum(first + count - tl.maximum(newest, first), 0)
    keep = always | _best(key, real & (p < newest), tl.maximum(want, 0), BOUNDS)
    at = (lane * parts + part) * keep_count + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(key_ptr + at, key, mask=keep)
    tl.store(page_ptr + at, p, mask=keep)


@triton.jit
def _finalists(len_ptr, key_ptr, page_ptr, want_ptr, lane, parts, keep_count, count, last, PAGE: tl.constexpr,
               SLICE: tl.constexpr, PP: tl.constexpr, BOUNDS: tl.constexpr, WANT: tl.constexpr):
    """The slices' best pages [PP] of a lane, which of them are among its best `count` (with WANT: or the number at want_ptr,
    where that is less), and how many those are."""
    have, newest = _pages(tl.load(len_ptr + lane).to(tl.int32), last, PAGE)
    i = tl.arange(0, PP)
    part = i // keep_count
    real = (part < parts) & (i - part * keep_count < tl.minimum(keep_count, have - part * SLICE))
    key = tl.load(key_ptr + lane * parts * keep_count + i, mask=real, other=0)
    p = tl.load(page_ptr + lane * parts * keep_count + i, mask=real, other=-1)
    total = tl.minimum(count, have)
    if WANT:
        total = tl.minimum(total, tl.load(want_ptr))
    keep = (real & (p >= newest)) | _best(key, real & (p < newest), tl.maximum(total - (have - newest), 0), BOUNDS)
    return p, keep, total


@triton.jit
def last_kernel(
    len_ptr, key_ptr, page_ptr, want_ptr, out_ptr, parts, keep_count, count, last,
    PAGE: tl.constexpr, SLICE: tl.constexpr, PP: tl.constexpr, BOUNDS: tl.constexpr, WANT: tl.constexpr, PDL: tl.constexpr,
):
    """The best `count` among the slices' best of one lane, ascending, -1 where there are fewer: out [lanes, count]."""
    if PDL:
        gdc_launch_dependents()
    lane = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PP)
    if PDL:
        gdc_wait()
    p, keep, total = _finalists(
        len_ptr, key_ptr, page_ptr, want_ptr, lane, parts, keep_count, count, last, PAGE, SLICE, PP, BOUNDS, WANT)
    out = out_ptr + lane * count
    tl.store(out + tl.cumsum(keep.to(tl.int32), 0) - 1, p, mask=keep)
    tl.store(out + total + i, tl.full([PP], -1, tl.int32), mask=total + i < count)


@triton.jit
def read_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, len_ptr, key_ptr, page_ptr, want_ptr, front_ptr, front_len_ptr, o_ptr, lse_ptr, scale,
    parts, keep_count, count, last,
    PAGE: tl.constexpr, SLICE: tl.constexpr, PP: tl.constexpr, BOUNDS: tl.constexpr, WANT: tl.constexpr,
    FRONT: tl.constexpr,  # programs that read what lies in front of the pages, the first of each lane
    G: tl.constexpr, NQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGES: tl.constexpr,  # pages of a program
    PDL: tl.constexpr,
):
    """The last round and the reading in one: every program of a lane finds the lane's best pages and attends to PAGES of them,
    or to as many entries of those in front (front_len of them from front on), which are always read.

    o_ptr [programs, lanes*G, D] float32 and lse_ptr base 2, as `kernels.decode.triton_merge` joins them. The slice kernel is
    launched in full order behind whatever wrote q, k and v, so only its own results have to be waited for.
    """
    if PDL:
        gdc_launch_dependents()
    lane = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    g = tl.arange(0, NQ)
    d = tl.arange(0, DP)
    live = g < G
    q = tl.load(q_ptr + (lane * G + g)[None, :] * D + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
    first = tl.load(start_ptr + lane).to(tl.int64)
    n = tl.load(len_ptr + lane).to(tl.int32)
    if PDL:
        gdc_wait()
    row = (c * tl.num_programs(1) + lane) * G + g
    p, keep, total = _finalists(
        len_ptr, key_ptr, page_ptr, want_ptr, lane, parts, keep_count, count, last, PAGE, SLICE, PP, BOUNDS, WANT)
    share = c - FRONT  # below 0 for those in front, whose pages are then none
    nothing = share * PAGES >= total
    if FRONT:
        many = tl.load(front_len_ptr + lane).to(tl.int32)
        nothing = tl.where(c < FRONT, c * (PAGES * PAGE) >= many, nothing)  # a lane may hold fewer in front than another
    if nothing:
        tl.store(lse_ptr + row, tl.full([NQ], float("-inf"), tl.float32), mask=live)
        return
    # the pages at places c*PAGES .. of the ascending list, without writing the list
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    s = tl.arange(0, PAGES)
    mine = keep[:, None] & (place[:, None] == share * PAGES + s[None, :])
    chosen = tl.sum(tl.where(mine, p[:, None] + 1, 0), 0) - 1
    i = tl.arange(0, PAGES * PAGE)
    page = tl.sum(tl.where((i // PAGE)[:, None] == s[None, :], chosen[None, :], 0), 1)
    at = page * PAGE + i % PAGE
    ok = (page >= 0) & (at < n)
    at = first + tl.minimum(tl.maximum(at, 0), n - 1)
    if FRONT:
        ahead = c * (PAGES * PAGE) + i
        ok = tl.where(c < FRONT, ahead < many, ok)
        at = tl.where(c < FRONT, tl.load(front_ptr + lane).to(tl.int64) + tl.minimum(ahead, many - 1), at)
    at *= D
    k = tl.load(k_ptr + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    v = tl.load(v_ptr + at[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
    x = tl.dot(k, q.to(k.dtype), input_precision="ieee") * (scale * 1.4426950408889634)
    x = tl.where(ok[:, None], x, float("-inf"))
    m = tl.max(x, 0)  # a program has at least one entry: the first of its share
    w = tl.exp2(x - m[None, :])
    z = tl.sum(w, 0)
    o = tl.dot(v, w.to(v.dtype), input_precision="ieee") * (1.0 / z)[None, :]
    tl.store(o_ptr + row[None, :] * D + d[:, None], o, mask=live[None, :] & (d < D)[:, None])
    tl.store(lse_ptr + row, m + tl.log2(z), mask=live)
