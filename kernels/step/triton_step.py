"""Triton kernels of one decode step: matrix times a few vectors, with the norm before and the consequence after inside.

A small model's step is a chain of launches that each read little. So each program asks for its weights, which nothing
before it writes, and only then waits for the launch before it (programmatic dependent launch): the weights are on their
way while the previous kernel ends. Sums are float32 throughout.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tiles(w_ptr, row, base, K: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr):
    """TILES tiles [rows, BK] of a matrix from column `base` on; zeros past column K."""
    k = tl.arange(0, BK)
    out = ()
    for u in tl.static_range(TILES):
        at = base + u * BK + k
        where = w_ptr + row.to(tl.int64)[:, None] * K + at[None, :]
        if MASKED:
            out = out + (tl.load(where, mask=(at < K)[None, :], other=0.0),)
        else:
            out = out + (tl.load(where),)
    return out


@triton.jit
def _add(state, wa, wb, gain, x_ptr, row, base, B: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
         PAIRS: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr):
    """state + the tiles' share of every product, kept per element until the end: per sequence the sums of the first
    rows, of the second rows (PAIRS), and of the squared input (NORM)."""
    PER: tl.constexpr = 1 + PAIRS + NORM
    k = tl.arange(0, BK)
    # the input is loaded as a tile of the weights' own shape: a row of threads needs just these numbers, and a vector
    # would have to be carried through shared memory
    here = (row * 0)[:, None]
    for u in tl.static_range(TILES):
        at = base + u * BK + k
        a = wa[u].to(tl.float32)
        if PAIRS:
            b = wb[u].to(tl.float32)
        new = ()
        for s in tl.static_range(B):
            where = x_ptr + s * K + at[None, :] + here
            if MASKED:
                x = tl.load(where, mask=(at < K)[None, :] & (here == 0), other=0.0).to(tl.float32)
            else:
                x = tl.load(where).to(tl.float32)
            y = x
            if NORM:
                y = x * gain[u].to(tl.float32)
            new = new + (state[s * PER] + a * y,)
            if PAIRS:
                new = new + (state[s * PER + 1] + b * y,)
            if NORM:
                new = new + (state[s * PER + 1 + PAIRS] + x * x,)
        state = new
    return state


# one compilation for all positions and all places in a buffer
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["place_ptr", "slot_ptr", "tag_slot_ptr"])
def product_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, y_ptr, cos_ptr, sin_ptr, place_ptr, k_ptr, v_ptr, slot_ptr, tag_ptr, tag_slot_ptr,
    rows, eps, first,
    B: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    END: tl.constexpr,  # "plain" y = p; "add" y += p; "gated" y = silu(p_a) * p_b; "rotate" queries, keys and values
    NORM: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, TAGS: tl.constexpr, PDL: tl.constexpr,
):
    """p = (RMS norm of x [B,K], times its weight) @ w[.,K].T + bias, and END of it.

    "gated": w [2*rows, K], row j gates row rows + j. "rotate": w holds HQ query, HK key and HK value heads of D rows;
    a program takes channels c and c + D/2 of a head together, turns those of queries and keys by row place - first of
    cos and sin [., D], and writes queries to y [B,HQ,D], keys and values to row slot[b*HK + h] of k and v [., D]; with
    TAGS also the position itself to tag[tag_slot[b*HK + h]].
    """
    PAIRS: tl.constexpr = 1 if END == "gated" or END == "rotate" else 0
    PER: tl.constexpr = 1 + PAIRS + NORM
    SPAN: tl.constexpr = BK * TILES
    MASKED: tl.constexpr = K % SPAN != 0
    if PDL:
        gdc_launch_dependents()
    p = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = p < rows
    p = tl.minimum(p, rows - 1)
    row = p
    partner = p
    if END == "gated":
        partner = p + rows
    if END == "rotate":
        row = (p // (D // 2)) * D + p % (D // 2)
        partner = row + D // 2
    # everything that no launch of this step writes is asked for before the wait
    wa = _tiles(w_ptr, row, 0, K, BK, TILES, MASKED)
    wb = wa
    gain = wa
    if PAIRS:
        wb = _tiles(w_ptr, partner, 0, K, BK, TILES, MASKED)
    if NORM:
        gain = _tiles(norm_ptr, row * 0, 0, K, BK, TILES, MASKED)
    if BIAS:
        bias_a = tl.load(bias_ptr + row).to(tl.float32)
        bias_b = tl.load(bias_ptr + partner).to(tl.float32)
    if END == "rotate":
        head = p // (D // 2)
        c = p % (D // 2)
        turns = head < HQ + HK
        angle = (tl.load(place_ptr) - first) * D + c
        cos_a = tl.where(turns, tl.load(cos_ptr + angle).to(tl.float32), 1.0)
        sin_a = tl.where(turns, tl.load(sin_ptr + angle).to(tl.float32), 0.0)
        cos_b = tl.where(turns, tl.load(cos_ptr + angle + D // 2).to(tl.float32), 1.0)
        sin_b = tl.where(turns, tl.load(sin_ptr + angle + D // 2).to(tl.float32), 0.0)
        # KV heads of keys, then of values; a program may hold the end of one kind and the start of the next
        keeps = ok & (head >= HQ)
        kv = tl.where(head < HQ + HK, head - HQ, head - HQ - HK)
        slots = ()
        for s in tl.static_range(B):
            slots = slots + (tl.load(slot_ptr + s * HK + kv, mask=keeps, other=0).to(tl.int64),)
    if PDL:
        gdc_wait()
    before = ()
    if END == "add":
        for s in tl.static_range(B):
            before = before + (tl.load(y_ptr + s * rows + p),)
    state = ()
    for _ in tl.static_range(B * PER):
        state = state + (tl.zeros([BN, BK], tl.float32),)
    state = _add(state, wa, wb, gain, x_ptr, row, 0, B, K, BK, TILES, PAIRS, NORM, MASKED)
    for base in range(SPAN, K, SPAN):
        wa = _tiles(w_ptr, row, base, K, BK, TILES, MASKED)
        wb = wa
        gain = wa
        if PAIRS:
            wb = _tiles(w_ptr, partner, base, K, BK, TILES, MASKED)
        if NORM:
            gain = _tiles(norm_ptr, row * 0, base, K, BK, TILES, MASKED)
        state = _add(state, wa, wb, gain, x_ptr, row, base, B, K, BK, TILES, PAIRS, NORM, MASKED)

    for s in tl.static_range(B):
        a = tl.sum(state[s * PER], 1)
        b = a
        if PAIRS:
            b = tl.sum(state[s * PER + 1], 1)
        if NORM:
            inverse = tl.rsqrt(tl.sum(state[s * PER + 1 + PAIRS], 1) * (1.0 / K) + eps)
            a = a * inverse
            b = b * inverse
        if BIAS:
            a += bias_a
            b += bias_b
        y_at = y_ptr + s * rows + p
        if END == "plain":
            tl.store(y_at, a.to(y_ptr.dtype.element_ty), mask=ok)
        if END == "add":
            tl.store(y_at, before[s] + a, mask=ok)
        if END == "gated":
            tl.store(y_at, (a / (1.0 + tl.exp(-a)) * b).to(y_ptr.dtype.element_ty), mask=ok)
        if END == "rotate":
            ta = (a * cos_a - b * sin_a).to(y_ptr.dtype.element_ty)
            tb = (b * cos_b + a * sin_b).to(y_ptr.dtype.element_ty)
            q_at = y_ptr + (s * HQ + head) * D + c
            k_at = k_ptr + slots[s] * D + c
            v_at = v_ptr + slots[s] * D + c
            query = ok & (head < HQ)
            key = keeps & turns
            value = keeps & (head >= HQ + HK)
            tl.store(q_at, ta, mask=query)
            tl.store(q_at + D // 2, tb, mask=query)
            tl.store(k_at, ta.to(k_ptr.dtype.element_ty), mask=key)
            tl.store(k_at + D // 2, tb.to(k_ptr.dtype.element_ty), mask=key)
            tl.store(v_at, ta.to(v_ptr.dtype.element_ty), mask=value)
            tl.store(v_at + D // 2, tb.to(v_ptr.dtype.element_ty), mask=value)
    if TAGS:
        if tl.program_id(0) == 0:
            place = tl.load(place_ptr).to(tl.int32)
            for lane in tl.static_range(B * HK):
                tl.store(tag_ptr + tl.load(tag_slot_ptr + lane), place)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["place_ptr", "slot_ptr", "tag_slot_ptr"])
def turn_kernel(
    x_ptr, qn_ptr, kn_ptr, cos_ptr, sin_ptr, place_ptr, y_ptr, k_ptr, v_ptr, slot_ptr, tag_ptr, tag_slot_ptr,
    eps, first,
    D: tl.constexpr, DP: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, TAGS: tl.constexpr, PDL: tl.constexpr,
):
    """One head of one sequence of x [B, HQ + 2*HK, D] float32: RMS norm of queries and keys with weights [D], rotation,
    and the same destinations as `product_kernel`'s "rotate"."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    s = tl.program_id(1)
    d = tl.arange(0, DP)
    inside = d < D
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    base = x_ptr + (s * (HQ + 2 * HK) + head) * D
    x = tl.load(base + d, mask=inside, other=0.0)
    y = tl.load(base + other, mask=inside, other=0.0)
    if head < HQ + HK:
        inverse = tl.rsqrt(tl.sum(x * x, 0) * (1.0 / D) + eps)
        query = inside & (head + 0 * d < HQ)
        key = inside & (head + 0 * d >= HQ)
        gx = tl.load(qn_ptr + d, mask=query, other=0.0).to(tl.float32) + tl.load(kn_ptr + d, mask=key, other=0.0).to(tl.float32)
        gy = (tl.load(qn_ptr + other, mask=query, other=0.0).to(tl.float32)
              + tl.load(kn_ptr + other, mask=key, other=0.0).to(tl.float32))
        x = x * inverse * gx
        y = y * inverse * gy
        angle = (tl.load(place_ptr) - first) * D
        cos = tl.load(cos_ptr + angle + d, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle + d, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + tl.where(d < D // 2, -y, y) * sin
    if head < HQ:
        tl.store(y_ptr + (s * HQ + head) * D + d, x.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        h = (head - HQ) % HK
        slot = tl.load(slot_ptr + s * HK + h).to(tl.int64)
        if head < HQ + HK:
            tl.store(k_ptr + slot * D + d, x.to(k_ptr.dtype.element_ty), mask=inside)
            if TAGS:
                tl.store(tag_ptr + tl.load(tag_slot_ptr + s * HK + h), tl.load(place_ptr).to(tl.int32))
        else:
            tl.store(v_ptr + slot * D + d, x.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embed_kernel(id_ptr, table_ptr, y_ptr, K: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """y [B,K] float32 = rows ids of table [., K]."""
    if PDL:
        gdc_launch_dependents()
    s = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    row = tl.load(id_ptr + s).to(tl.int64)
    x = tl.load(table_ptr + row * K + k, mask=k < K, other=0.0)
    tl.store(y_ptr + s * K + k, x.to(tl.float32), mask=k < K)
