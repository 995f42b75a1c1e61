"""Joining the parts that the split kernel wrote, and turning local weights into attention mass."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_PERMUTE = tl.constexpr(tuple(f"prmt.b32 $0, $1, 0x3f800000, {0x7604 | byte << 4:#x};" for byte in range(4)))


@triton.jit
def merge_kernel(
    part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SINK: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (row, slice of channels) a program: see `_merge`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # launched while the last split programs still run; their results are complete from here on
    _merge(part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads, tl.program_id(0),
           tl.program_id(1), D, BD, BS, SINK, GATE, ENTROPY)


@triton.jit
def _parts(part_o, part_lse, part_ent, splits, rows, d, i, D: tl.constexpr, ENTROPY: tl.constexpr):
    """Parts i of a row: their log-sum-exp, 1 (0 where a part is empty), entropy [BS], and outputs [BS, BD].

    Outputs do not wait for the sums that weigh them: all loads are under way at once."""
    inside = i < splits
    top = tl.load(part_lse + i * rows, mask=inside, other=float("-inf"))
    each = tl.load(part_o + (i * rows * D)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :])
    seen = top > float("-inf")
    each = tl.where(seen[:, None], each, 0.0)
    total = tl.where(seen, 1.0, 0.0)
    ent = total
    if ENTROPY:
        ent = tl.where(seen, tl.load(part_ent + i * rows, mask=inside), 0.0)
    return top, total, ent, each


@triton.jit
def _merge(
    part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads, row, piece,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SINK: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
):
    """One row, one slice of channels: exact log-sum-exp merge over all parts (invariant I5).

    part_o [splits, rows, D] float32, part_lse [splits, rows] base 2 (-inf where a part is empty: its output was never
    written and does not count). lse_ptr gets natural logarithms. A sink logit joins the sum without a value. gate float32
    [heads] multiplies the output.
    """
    d = piece * BD + tl.arange(0, BD)
    i = tl.arange(0, BS)
    part_o += row.to(tl.int64) * D
    part_lse += row
    part_ent += row
    top, total, ent, each = _parts(part_o, part_lse, part_ent, splits, rows, d, i, D, ENTROPY)
    for first in range(BS, splits, BS):
        at = (first + i).to(tl.int64)
        new, sums, ents, outs = _parts(part_o, part_lse, part_ent, splits, rows, d, at, D, ENTROPY)
        both = tl.maximum(top, new)
        safe = tl.where(both == float("-inf"), 0.0, both)
        old, fresh = tl.exp2(top - safe), tl.exp2(new - safe)
        each = each * old[:, None] + outs * fresh[:, None]
        total = total * old + sums * fresh
        ent = ent * old + ents * fresh
        top = both
    m = tl.max(top, 0)
    sink = 0.0
    if SINK:
        sink = tl.load(sink_ptr + row % heads).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
    m = tl.where(m == float("-inf"), 0.0, m)
    share = tl.exp2(top - m)
    acc = tl.sum(each * share[:, None], 0)
    total *= share
    ent *= share
    keys = tl.sum(total, 0)
    z = keys
    if SINK:
        z += tl.exp2(sink - m)
    inv = tl.where(z > 0.0, 1.0 / tl.maximum(z, 1e-37), 0.0)
    out = acc * inv
    if GATE:
        out = out * tl.load(gate_ptr + row % heads)
    tl.store(o_ptr + row * D + d, out.to(o_ptr.dtype.element_ty), mask=d < D)
    if piece == 0:
        lse = tl.where(z > 0.0, m + tl.log2(tl.maximum(z, 1e-37)), float("-inf"))
        tl.store(lse_ptr + row, lse * LN2)
        if ENTROPY:
            # -sum p ln p = lse * sum p - sum p*s, in base 2 until the end
            h = tl.where(keys > 0.0, tl.maximum(lse, -1e30) * keys * inv - tl.sum(ent, 0) * inv, 0.0)
            tl.store(ent_ptr + row, tl.maximum(h, 0.0) * LN2)


@triton.jit
def mass_kernel(
    p_ptr, m_ptr, lse_ptr, start_ptr, len_ptr, mass_ptr, tiles,
    G: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):
    """mass[slot] = sum over the group of exp(s - lse), from weights relative to each tile's running maximum.

    p [slots, G] float16, m [lanes, tiles, G] float32 base 2, lse [lanes, G] natural.
    """
    lane = tl.program_id(1).to(tl.int64)
    n = tl.load(len_ptr + lane).to(tl.int32)
    t = tl.program_id(0) * BN
    if t >= n:
        if PDL:
            gdc_wait()
        return
    i = t + tl.arange(0, BN)
    g = tl.arange(0, GP)
    slot = tl.load(start_ptr + lane).to(tl.int64) + i
    if PDL:
        gdc_wait()
    ok = (i < n)[:, None] & (g < G)[None, :]
    p = tl.load(p_ptr + slot[:, None] * G + g[None, :], mask=ok, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + ((lane * tiles + i // TILE) * G)[:, None] + g[None, :], mask=ok, other=0.0)
    lse = tl.load(lse_ptr + lane * G + g, mask=g < G, other=0.0) * LOG2E
    w = tl.where(p > 0.0, p * tl.exp2(m - lse[None, :]), 0.0)
    tl.store(mass_ptr + slot, tl.sum(w, 1), mask=i < n)


@triton.jit
def _above_one(word, BYTE: tl.constexpr, ASM: tl.constexpr):
    """1 + b * 2^-15 for one byte b of every word: one permute puts the byte below the highest bits of a float32's fraction."""
    if ASM:
        return tl.inline_asm_elementwise(_PERMUTE.value[BYTE], "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return ((((word >> (8 * BYTE)) & 0xFF) << 8) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _weight(word, BYTE: tl.constexpr, factor, ones, ASM: tl.constexpr):
    """One byte of every word times its head's factor (for steps of 2^-15), summed over heads; ones are the factors' sums."""
    # a product for each byte and one difference for all: what it rounds is below a sixtieth of the byte's last bit
    return tl.sum(_above_one(word, BYTE, ASM) * factor, 1) - ones


@triton.jit
def finish_kernel(
    part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, p_ptr, m_ptr, start_ptr, len_ptr, mass_ptr,
    splits, rows, heads, tiles, merges, blocks,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SINK: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """The merge and the mass in one launch: neither waits for the other.

    The first `merges` programs are `_merge`'s. The others take BN entries of one lane (`blocks` a lane):
    mass[slot] = sum over the group of p/255 * exp2(m - lse), bytes p relative to their tile's largest logit m
    [lanes, tiles, G] (base 2), PACK of them to a word as `triton_split` wrote them, and lse from the parts themselves.
    """
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < merges:
        if PDL:
            gdc_wait()
        pieces: tl.constexpr = (D + BD - 1) // BD
        _merge(part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads, pid // pieces,
               pid % pieces, D, BD, BS, SINK, GATE, ENTROPY)
    else:
        lane = (pid - merges) // blocks
        n = tl.load(len_ptr + lane).to(tl.int32)
        start = tl.load(start_ptr + lane).to(tl.int64)
        t = ((pid - merges) % blocks) * BN
        if PDL:
            gdc_wait()  # lengths and starts were there before the launch that wrote the parts
        if t < n:
            g = tl.arange(0, GP)
            live = g < G
            WORDS: tl.constexpr = TILE // PACK  # of one head in one tile
            tile = tl.arange(0, BN // TILE)
            i = tl.arange(0, BN // PACK)  # the words of a head in this block follow each other
            head = (lane.to(tl.int64) * tiles + t // TILE) * G
            # weights and their maxima first: they are under way while the parts are summed. Nobody reads them again. There is
            # room for whole blocks, and what lies past the end is not stored: no masks but for heads that do not exist
            if G == GP:
                word = tl.load(p_ptr + head * WORDS + i[:, None] * G + g[None, :], eviction_policy="evict_first").to(tl.int32)
                largest = tl.load(m_ptr + head + tile[:, None] * G + g[None, :], eviction_policy="evict_first")
            else:
                word = tl.load(p_ptr + head * WORDS + i[:, None] * G + g[None, :], mask=live[None, :], other=0,
                               eviction_policy="evict_first").to(tl.int32)
                largest = tl.load(m_ptr + head + tile[:, None] * G + g[None, :], mask=live[None, :], other=float("-inf"),
                                  eviction_policy="evict_first")
            s = tl.arange(0, BS)
            part_lse += lane * G
            inside = (s < splits)[:, None] & live[None, :]
            top = tl.load(part_lse + s[:, None] * rows + g[None, :], mask=inside, other=float("-inf"))
            total = tl.where(top > float("-inf"), 1.0, 0.0)
            for first in range(BS, splits, BS):
                inside = (first + s < splits)[:, None] & live[None, :]
                part = tl.load(part_lse + (first + s)[:, None] * rows + g[None, :], mask=inside, other=float("-inf"))
                new = tl.maximum(top, part)
                safe = tl.where(new == float("-inf"), 0.0, new)
                total = total * tl.exp2(top - safe) + tl.exp2(part - safe)
                top = new
            m = tl.max(top, 0)
            if SINK:
                sink = tl.load(sink_ptr + (lane * G + g) % heads, mask=live, other=0.0).to(tl.float32) * LOG2E
                m = tl.maximum(m, sink)
            m = tl.where(m == float("-inf"), 0.0, m)
            z = tl.sum(total * tl.exp2(top - m[None, :]), 0)
            if SINK:
                z += tl.exp2(sink - m)
            lse = m + tl.log2(tl.maximum(z, 1e-37)) - 15  # bytes come as steps of 2^-15
            factor = tl.exp2(largest - lse[None, :])
            factor = tl.reshape(tl.broadcast_to(factor[:, None, :], [BN // TILE, WORDS, GP]), [BN // PACK, GP])
            ones = tl.sum(factor, 1)
            mass = _weight(word, 0, factor, ones, ASM)
            if PACK == 2:
                mass = tl.join(mass, _weight(word, 1, factor, ones, ASM))
            else:
                mass = tl.join(tl.join(mass, _weight(word, 2, factor, ones, ASM)),
                               tl.join(_weight(word, 1, factor, ones, ASM), _weight(word, 3, factor, ones, ASM)))
            # into the order of rows, so that a store fills whole lines
            mass = tl.reshape(tl.permute(tl.reshape(mass, [BN // (8 * PACK), 8, PACK]), (0, 2, 1)), [BN])
            mass = mass.to(mass_ptr.dtype.element_ty)
            i = tl.arange(0, BN)
            if (t + BN <= n) & (start % 8 == 0):
                tl.store(mass_ptr + (start // 8 * 8 + t) + i, mass)  # 16 bytes a thread
            else:
                tl.store(mass_ptr + (start + t) + i, mass, mask=i < n - t)
