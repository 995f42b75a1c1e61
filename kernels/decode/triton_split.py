"""The split kernel of flash-decoding: one program attends the query heads of one lane to one chunk of one tier.

Tiles are transposed: keys are the rows of every product and the (padded) query heads its 8 or 16 columns, so a group
of 4 heads wastes half a tile instead of three quarters, and all softmax arithmetic is on half as many numbers.
"""

import triton
import triton.language as tl

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.pieces import LOG2_255, RAISE, fp8_piece, piece

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # stands for "nothing seen yet": finite, so that differences stay numbers
HIDDEN = tl.constexpr(-2e30)  # added to logits that are not read: far below FLOOR, and finite, so that 0 * logit is 0


@triton.jit
def _power_of_two(x):
    """The power of two at or below x (float32, > 0) and its inverse; exact."""
    e = tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 32), 222)
    return (e << 23).to(tl.float32, bitcast=True), ((254 - e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode_piece(x, levels_ptr, WORD: tl.constexpr, BYTE: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
                  CENTRE: tl.constexpr, CODE: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """A piece under a code: affine integers, a table of levels, or float8 e4m3 (times 2^-8)."""
    if CODE == "levels":
        index = ((x.to(tl.int32) >> (8 * BYTE + BITS * PART)) & ((1 << BITS) - 1))
        y = tl.load(levels_ptr + index).to(DT)
    elif CODE == "fp8" and ASM and DT == tl.float16 and WORD > 1:
        y = fp8_piece(x, WORD, BYTE)
    elif CODE == "fp8":
        b = (x.to(tl.int32) >> (8 * BYTE)) & 0xFF
        # moving exponent and mantissa into a half leaves the value divided by 2^8, subnormals included
        y = (((b & 0x80) << 8) | ((b & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(DT)
    else:
        y = piece(x, WORD, BYTE, BITS, PART, CENTRE, DT, ASM)
    return y


@triton.jit
def _rows(ptr, at, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tile [BN, PADDED] of rows `at`; columns past WIDTH are zero."""
    where = ptr + at[:, None] * STRIDE + column[None, :]
    if WIDTH == PADDED:
        return tl.load(where)
    else:
        return tl.load(where, mask=(column < WIDTH)[None, :], other=0)


@triton.jit
def _columns(ptr, at, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The transpose of `_rows`, [PADDED, BN]; loaded so, because a transposed tile would be copied word by word."""
    where = ptr + at[None, :] * STRIDE + column[:, None]
    if WIDTH == PADDED:
        return tl.load(where)
    else:
        return tl.load(where, mask=(column < WIDTH)[:, None], other=0)


@triton.jit
def _raw_scales(ptr, at, GROUPS: tl.constexpr):
    """The scales of BN tokens as loaded: int32 pairs of groups when their number is even, else one float16 each."""
    out = ()
    if GROUPS % 2 == 0:
        for h in tl.static_range(GROUPS // 2):
            out = out + (tl.load(ptr + at * (GROUPS // 2) + h),)
    else:
        for h in tl.static_range(GROUPS):
            out = out + (tl.load(ptr + at * GROUPS + h),)
    return out


@triton.jit
def _scale(raw, FIRST: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [BN] scale of one group out of raw[FIRST:]."""
    if GROUPS % 2 == 0:
        x = _half(raw[FIRST + GROUP // 2], GROUP % 2)
    else:
        x = raw[FIRST + GROUP]
    return x.to(tl.float32)


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Sums of FOLD rows that one thread holds of a matrix instruction's result: [BN, NQ] to [BN / FOLD, NQ]."""
    if FOLD == 1:
        return x
    BN: tl.constexpr = x.shape[0]
    NQ: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, [BN // (8 * FOLD), FOLD, 8, NQ]), 1), [BN // FOLD, NQ])


@triton.jit
def _bytes(x, PACK: tl.constexpr):
    """x [BN, NQ] in [0, 255], rounded, as words of PACK bytes: [BN / (8 PACK), 8, NQ], row i in byte i // 8 % PACK of word
    (i // (8 PACK), i % 8). A thread of a matrix instruction holds rows 8 apart, so nothing moves between threads."""
    BN: tl.constexpr = x.shape[0]
    NQ: tl.constexpr = x.shape[1]
    byte = tl.arange(0, PACK)[None, :, None, None]
    # whatever lies above a byte is shifted out, but for the first one's 0x4B, which the last byte brings to 0x100
    raised = tl.reshape(x, [BN // (8 * PACK), PACK, 8, NQ]) + tl.where(byte == 3, RAISE + (0x100 - 0x4B), RAISE)
    word = tl.sum(raised.to(tl.int32, bitcast=True) * (1 << (8 * byte)), 1)
    return word if PACK == 4 else word.to(tl.int16)


@triton.jit
def _half(pair, UPPER: tl.constexpr):
    """One float16 of an int32 pair."""
    bits = pair >> 16 if UPPER else pair
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _token_scales(ks_ptr, kz_ptr, vs_ptr, vz_ptr, at, NK: tl.constexpr, NV: tl.constexpr, ZERO: tl.constexpr):
    """Everything scale-like one tile needs, in one tuple: k scales, k zeros, v scales, v zeros."""
    out = ()
    if NK:
        out = out + _raw_scales(ks_ptr, at, NK)
        if ZERO:
            out = out + _raw_scales(kz_ptr, at, NK)
    if NV:
        out = out + _raw_scales(vs_ptr, at, NV)
        if ZERO:
            out = out + _raw_scales(vz_ptr, at, NV)
    return out


@triton.jit
def _end_after_the_launch_before(c, lane):
    """This launch overlapped the previous tier's. It ends when its last program ends, so one that waits makes the merge,
    which waits for the last launch alone, safe; the others leave their places to later tiers as soon as they are done."""
    if (c == 0) & (lane == 0):
        gdc_wait()


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, kg_ptr, levels_ptr, start_ptr, len_ptr, bias_ptr, theta_ptr, pages_ptr,
    o_ptr, lse_ptr, ent_ptr, p_ptr, m_ptr,
    scale, softcap, chunk, split0, tiles, bias_stride, n_pages,
    G: tl.constexpr, NQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr,
    K_MODE: tl.constexpr,  # "token": scales per token and group; "block": per channel, tiles are groups; "gather"
    GK: tl.constexpr, GV: tl.constexpr,  # channels per scale group of keys and values
    CK: tl.constexpr, CV: tl.constexpr,  # bytes per column block, so that a block lies inside one group
    WK: tl.constexpr, WV: tl.constexpr,  # bytes per word
    PK: tl.constexpr, PV: tl.constexpr,  # words per block, padded to a legal tile
    BN: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # load scales one tile ahead into registers (2-byte loads cannot be asynchronous)
    PDL: tl.constexpr,  # let the next launch start early
    CHAIN: tl.constexpr,  # this launch started early itself, beside one that it does not depend on
    EARLY: tl.constexpr,  # this launch started early itself, and the query may not be there yet
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, THETA: tl.constexpr, PAGE: tl.constexpr,
    MASS: tl.constexpr,  # keep the weights for `kernels.decode.triton_merge`: 1 as float16, 2 as bytes
    PACK: tl.constexpr,  # bytes to a word of those
    FOLD: tl.constexpr,  # rows of a tile that running sums add up at once, because one thread holds them
    ENTROPY: tl.constexpr,
):
    PARTS: tl.constexpr = 1 if BITS == 16 else 8 // BITS
    ZERO: tl.constexpr = CODE == "affine"
    NK: tl.constexpr = D // GK if BITS < 16 and K_MODE == "token" else 0  # scale groups per token
    NV: tl.constexpr = D // GV if BITS < 16 else 0
    RK: tl.constexpr = NK // (2 - NK % 2)  # loads per token for them
    RV: tl.constexpr = NV // (2 - NV % 2)
    V_AT: tl.constexpr = RK * (2 if ZERO else 1)
    W: tl.constexpr = D // PARTS  # bytes per token (channels per token for BITS == 16)
    MID: tl.constexpr = (1 << (BITS - 1)) if CODE == "affine" else 0
    # keys with per-token scales may come as 1024 + unit*code: both constants leave through the query
    UNSHIFT: tl.constexpr = CODE == "affine" and K_MODE == "token" and DT == tl.float16
    KMID: tl.constexpr = 0 if UNSHIFT else MID
    lane = tl.program_id(1).to(tl.int64)
    lanes = tl.num_programs(1)
    c = tl.program_id(0)
    n = tl.load(len_ptr + lane).to(tl.int32)
    lo = c * chunk
    extent = n_pages * PAGE if PAGE else n  # entries to visit
    if EARLY:
        gdc_wait()  # before letting others start: later tiers read the same query and do not wait for it
    if PDL:
        gdc_launch_dependents()
    g = tl.arange(0, NQ)
    live = g < G
    row = ((split0 + c) * lanes + lane) * G
    if (lo >= extent) | (n == 0):
        tl.store(lse_ptr + row + g, tl.full([NQ], float("-inf"), tl.float32), mask=live)
        if CHAIN:
            _end_after_the_launch_before(c, lane)
        return
    count = tl.minimum(extent, lo + chunk) - lo
    first = tl.load(start_ptr + lane).to(tl.int64)  # 64-bit once; offsets inside a lane's part fit 32 bits
    if not PAGE:
        first += lo
    i = tl.arange(0, BN)

    # queries, brought to [1, 32) by an exact power of two, so that float16 holds every 16-bit input exactly
    d = tl.arange(0, DP)
    q_head = q_ptr + (lane * G + g) * D
    q_all = tl.load(q_head[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
    unit, inverse = _power_of_two(tl.max(tl.abs(q_all), 0))
    if DT != tl.float16:
        unit = tl.full([NQ], 1.0, tl.float32)
        inverse = unit
    else:
        unit = unit * 0.0625
        inverse = inverse * 16.0
    r = unit * scale
    if CODE == "fp8":
        r = r * 256.0
    if not SOFTCAP:
        r = r * LOG2E

    acc = ()
    qs = ()
    offset = ()
    qsum = ()
    if BITS == 16:
        qs = (q_all * inverse[None, :]).to(DT)
        acc = tl.zeros([DP, NQ], tl.float32)
        kin = d < D
        vin = d < D
    else:
        wk = tl.arange(0, PK)
        wv = tl.arange(0, PV)
        kin = wk < CK // WK
        vin = wv < CV // WV
        for cp in tl.static_range((W // CK) * PARTS):
            for j in tl.static_range(WK):
                ch = (cp % PARTS) * W + (cp // PARTS) * CK + wk * WK + j
                x = tl.load(q_head[None, :] + ch[:, None], mask=live[None, :] & kin[:, None], other=0.0)
                x = x.to(tl.float32) * inverse[None, :]
                if UNSHIFT:
                    x = x * (1.0 / (1 << BITS * (cp % PARTS)))
                qs = qs + (x.to(DT),)
        if K_MODE == "token":
            for gi in tl.static_range(D // GK):
                off = tl.zeros([NQ], tl.float32)
                tot = tl.zeros([NQ], tl.float32)
                for cp in tl.static_range((W // CK) * PARTS):
                    if ((cp % PARTS) * W + (cp // PARTS) * CK) // GK == gi:
                        for j in tl.static_range(WK):
                            part = tl.sum(qs[cp * WK + j].to(tl.float32), 0)
                            off += part * 1024.0
                            if UNSHIFT:
                                part = part * (1 << BITS * (cp % PARTS))
                            tot += part
                offset = offset + (off,)
                qsum = qsum + (tot,)
        for a in tl.static_range((W // CV) * WV * PARTS):
            acc = acc + (tl.zeros([PV, NQ], tl.float32),)
    mids = ()
    for gi in tl.static_range(D // GV):
        mids = mids + (tl.zeros([BN // FOLD, NQ], tl.float32),)
    m = tl.full([NQ], FLOOR, tl.float32)
    l = tl.zeros([BN // FOLD, NQ], tl.float32)
    ent = tl.zeros([BN // FOLD, NQ], tl.float32)
    if THETA:
        theta = tl.load(theta_ptr + lane * G + g, mask=live, other=0.0) * LOG2E

    if BITS == 16:
        k_ptr += first * D
        v_ptr += first * D
    else:
        k_ptr += first * (W // WK)
        v_ptr += first * (W // WV)
        vs_ptr += first * RV
        vz_ptr += first * RV
        if K_MODE == "token":
            ks_ptr += first * RK
            kz_ptr += first * RK
        else:
            kg_ptr += first
    if BIAS:
        bias_ptr += first
    if MASS == 1:
        p_ptr += first * G
    if MASS == 2:
        p_ptr += (lane * tiles * BN + lo) // PACK * G
        m_ptr += (lane * tiles + lo // BN) * G
        r8 = tl.arange(0, 8)[None, :, None]
        word_at = (tl.arange(0, BN // (8 * PACK))[:, None, None] * 8 + r8) * G + g[None, None, :]
        top_at = tl.broadcast_to(g[None, None, :], [1, 8, NQ])
        top_live = live[None, None, :] & (r8 == 0)
    ahead = ()
    if AHEAD:
        ahead = _token_scales(ks_ptr, kz_ptr, vs_ptr, vz_ptr, tl.minimum(i, count - 1), NK, NV, ZERO)
    for t in tl.range(0, count, BN, num_stages=STAGES):
        ok = t + i < count
        # rows past the end repeat the last one: their weight is zero, and loads need no mask
        at = tl.minimum(t + i, count - 1)
        if PAGE:
            chosen = tl.load(pages_ptr + lane * n_pages + (lo + at) // PAGE)
            at = chosen * PAGE + (lo + at) % PAGE
            ok = ok & (chosen >= 0) & (at < n)
            at = tl.minimum(tl.maximum(at, 0), n - 1)
        if AHEAD:
            raw = ahead
            ahead = _token_scales(ks_ptr, kz_ptr, vs_ptr, vz_ptr, tl.minimum(t + BN + i, count - 1), NK, NV, ZERO)
        else:
            raw = _token_scales(ks_ptr, kz_ptr, vs_ptr, vz_ptr, at, NK, NV, ZERO)
        # scores, [BN, NQ]
        if BITS == 16:
            kt = _rows(k_ptr, at, d, D, D, DP)
            s = tl.dot(kt.to(DT), qs, input_precision="ieee") * r[None, :]
        else:
            s = tl.zeros([BN, NQ], tl.float32)
            if K_MODE == "block":
                kgroup = tl.load(kg_ptr + t).to(tl.int64) * D
                if WK % 2 == 0:
                    kgroup = kgroup // 2
            if K_MODE == "gather":
                kgroup = tl.load(kg_ptr + at).to(tl.int64) * D
            kt = ()
            for cb in tl.static_range(W // CK):
                kt = kt + (_rows(k_ptr + cb * (CK // WK), at, wk, W // WK, CK // WK, PK),)
            for gi in tl.static_range(D // GK):
                if UNSHIFT:
                    sg = tl.zeros([BN, NQ], tl.float32) - offset[gi][None, :]
                else:
                    sg = tl.zeros([BN, NQ], tl.float32)
                zero_sum = tl.zeros([PK, NQ], tl.float32)
                for cp in tl.static_range((W // CK) * PARTS):
                    if ((cp % PARTS) * W + (cp // PARTS) * CK) // GK == gi:
                        for j in tl.static_range(WK):
                            y = _decode_piece(kt[cp // PARTS], levels_ptr, WK, j, BITS, cp % PARTS, KMID, CODE, DT, ASM)
                            xq = qs[cp * WK + j]
                            if K_MODE == "token":
                                sg = tl.dot(y, xq, sg, input_precision="ieee")
                            else:
                                ch2 = (cp % PARTS) * W + (cp // PARTS) * CK + wk * WK + j
                                if K_MODE == "block":
                                    if WK % 2 == 0:
                                        sc = _half(tl.load(ks_ptr + kgroup + ch2 // 2, mask=kin, other=0), j % 2)
                                        zc = _half(tl.load(kz_ptr + kgroup + ch2 // 2, mask=kin, other=0), j % 2)
                                    else:
                                        sc = tl.load(ks_ptr + kgroup + ch2, mask=kin, other=0.0)
                                        zc = tl.load(kz_ptr + kgroup + ch2, mask=kin, other=0.0)
                                    sc = sc.to(tl.float32)
                                    zc = zc.to(tl.float32)
                                    xf = xq.to(tl.float32)
                                    zero_sum += xf * (zc + KMID * sc)[:, None]
                                    sg = tl.dot(y, (xf * sc[:, None]).to(DT), sg, input_precision="ieee")
                                else:
                                    from_k = kgroup[:, None] + ch2[None, :]
                                    sc = tl.load(ks_ptr + from_k, mask=kin[None, :], other=0.0).to(tl.float32)
                                    zc = tl.load(kz_ptr + from_k, mask=kin[None, :], other=0.0).to(tl.float32)
                                    y = ((y.to(tl.float32) + KMID) * sc + zc).to(DT)
                                    sg = tl.dot(y, xq, sg, input_precision="ieee")
                if K_MODE == "token":
                    ks = _scale(raw, 0, gi, NK)
                    s += sg * ks[:, None]
                    if ZERO:
                        kz = _scale(raw, RK, gi, NK) + KMID * ks
                        s += kz[:, None] * qsum[gi][None, :]
                elif K_MODE == "block":
                    s += sg + tl.sum(zero_sum, 0)[None, :]
                else:
                    s += sg
            s = s * r[None, :]
        if SOFTCAP:
            e = tl.exp2(s * (2.0 * LOG2E / softcap))
            s = softcap * LOG2E * (1.0 - 2.0 / (e + 1.0))
        if BIAS:
            b = tl.load(bias_ptr + at[:, None] + g[None, :] * bias_stride, mask=live[None, :], other=0.0)
            s += b.to(tl.float32) * LOG2E
        if THETA:
            s = tl.where(s > theta[None, :], s, HIDDEN)
        s += tl.where(ok, 0.0, HIDDEN)[:, None]

        largest = tl.max(s, 0)
        m_new = tl.maximum(m, largest)
        alpha = tl.exp2(m - m_new)
        m = m_new
        p = tl.exp2(s - m[None, :])
        l = l * alpha[None, :] + _fold(p, FOLD)
        if ENTROPY:
            # a weight of zero may belong to a logit of -inf, which only a bias can be
            ent = ent * alpha[None, :] + _fold(p * (tl.maximum(s, HIDDEN) if BIAS else s), FOLD)
        if MASS == 2:
            # bytes relative to the tile's own largest logit: half the traffic, an error of at most 1/510 of its largest weight.
            # They stay in L2 against the stream of codes: writing costs the memory far more time than reading as much
            largest -= LOG2_255
            lift = tl.exp2(m - largest)  # may be infinite where the factor that undoes it is 0
            tl.store(p_ptr + (t // PACK) * G + word_at, _bytes(p * lift[None, :], PACK), mask=live[None, None, :],
                     eviction_policy="evict_last")
            tl.store(m_ptr + (t // BN) * G + top_at, tl.broadcast_to(largest[None, None, :], [1, 8, NQ]), mask=top_live,
                     eviction_policy="evict_last")
        if MASS == 1:
            tl.store(p_ptr + at[:, None] * G + g[None, :], p.to(tl.float16), mask=ok[:, None] & live[None, :])
            tl.store(m_ptr + (lane * tiles + (lo + t) // BN) * G + g, m, mask=live)

        # values, transposed: [channels, BN] x [BN, NQ]
        if BITS == 16:
            vt = _columns(v_ptr, at, d, D, D, DP)
            acc = tl.dot(vt.to(DT), p.to(DT), acc * alpha[None, :], input_precision="ieee")
        else:
            vt = ()
            for cb in tl.static_range(W // CV):
                vt = vt + (_columns(v_ptr + cb * (CV // WV), at, wv, W // WV, CV // WV, PV),)
            new_mids = ()
            ps = ()
            for gi in tl.static_range(D // GV):
                vs = _scale(raw, V_AT, gi, NV)
                # 64 keeps small scales of small weights among float16's normal numbers; undone at the end
                if DT == tl.float16:
                    ps = ps + ((p * (vs * 64.0)[:, None]).to(DT),)
                else:
                    ps = ps + ((p * vs[:, None]).to(DT),)
                if ZERO:
                    vz = _scale(raw, V_AT + RV, gi, NV)
                    new_mids = new_mids + (mids[gi] * alpha[None, :] + _fold(p * (vz + MID * vs)[:, None], FOLD),)
                else:
                    new_mids = new_mids + (mids[gi],)
            mids = new_mids
            new_acc = ()
            for cp in tl.static_range((W // CV) * PARTS):
                for j in tl.static_range(WV):
                    y = _decode_piece(vt[cp // PARTS], levels_ptr, WV, j, BITS, cp % PARTS, MID, CODE, DT, ASM)
                    scaled = acc[cp * WV + j] * alpha[None, :]
                    weights = ps[((cp % PARTS) * W + (cp // PARTS) * CV) // GV]
                    new_acc = new_acc + (tl.dot(y, weights, scaled, input_precision="ieee"),)
            acc = new_acc

    total = tl.sum(l, 0)
    inv = tl.where(total > 0.0, 1.0 / tl.maximum(total, 1e-37), 0.0)
    out = o_ptr + (row + g) * D
    if BITS == 16:
        tl.store(out[None, :] + d[:, None], acc * inv[None, :], mask=live[None, :] & kin[:, None])
    else:
        unscale = 1.0
        if DT == tl.float16:
            unscale = unscale / 64.0
        if CODE == "fp8":
            unscale = unscale * 256.0
        for cp in tl.static_range((W // CV) * PARTS):
            mid = tl.sum(mids[((cp % PARTS) * W + (cp // PARTS) * CV) // GV], 0)
            for j in tl.static_range(WV):
                ch = (cp % PARTS) * W + (cp // PARTS) * CV + wv * WV + j
                tl.store(out[None, :] + ch[:, None], (acc[cp * WV + j] * unscale + mid[None, :]) * inv[None, :],
                         mask=live[None, :] & vin[:, None])
    tl.store(lse_ptr + row + g, tl.where(total > 0.0, m + tl.log2(tl.maximum(total, 1e-37)), float("-inf")), mask=live)
    if ENTROPY:
        tl.store(ent_ptr + row + g, tl.sum(ent, 0) * inv, mask=live)
    if CHAIN:
        _end_after_the_launch_before(c, lane)
