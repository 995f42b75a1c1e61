"""The newest entry of every lane enters its page's bounds."""

import triton
import triton.language as tl


@triton.jit
def grow_kernel(
    k_ptr, start_ptr, len_ptr, low_ptr, high_ptr, pages, lanes,
    PAGE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LANES: tl.constexpr,
):
    """LANES lanes a program: k [slots,D] -> low, high [lanes,pages,D], the newest page's rows."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    d = tl.arange(0, DP)
    n = tl.load(len_ptr + lane, mask=lane < lanes, other=0).to(tl.int64)
    last = n - 1
    slot = tl.load(start_ptr + lane, mask=lane < lanes, other=0).to(tl.int64) + last
    ok = ((lane < lanes) & (n > 0))[:, None] & (d < D)[None, :]
    x = tl.load(k_ptr + slot[:, None] * D + d[None, :], mask=ok, other=0.0)
    at = (lane.to(tl.int64) * pages + last // PAGE)[:, None] * D + d[None, :]
    old = ok & (last % PAGE != 0)[:, None]
    low = tl.load(low_ptr + at, mask=old, other=float("inf"))
    high = tl.load(high_ptr + at, mask=old, other=float("-inf"))
    tl.store(low_ptr + at, tl.minimum(low, x), mask=ok)
    tl.store(high_ptr + at, tl.maximum(high, x), mask=ok)
