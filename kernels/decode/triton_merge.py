"""Joining the parts that the split kernel wrote, and turning local weights into attention mass."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def _merge(
    part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads, row, piece,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SINK: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
):
    """One row, one slice of channels: exact log-sum-exp merge over all parts (invariant I5).

    part_o [splits, rows, D] float32, part_lse [splits, rows] base 2 (-inf where a part is empty: its output was never
    written and is never read). lse_ptr gets natural logarithms. A sink logit joins the sum without a value. gate float32 [heads]
    multiplies the output.
    """
    row = row.to(tl.int64)
    d = piece * BD + tl.arange(0, BD)
    i = tl.arange(0, BS)
    top = tl.full([BS], float("-inf"), tl.float32)
    for s in range(0, splits, BS):
        top = tl.maximum(top, tl.load(part_lse + (s + i) * rows + row, mask=s + i < splits, other=float("-inf")))
    m = tl.max(top, 0)
    sink = 0.0
    if SINK:
        sink = tl.load(sink_ptr + row % heads).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
    m = tl.where(m == float("-inf"), 0.0, m)
    acc = tl.zeros([BD], tl.float32)
    total = tl.zeros([BS], tl.float32)
    ent = tl.zeros([BS], tl.float32)
    for s in range(0, splits, BS):
        inside = s + i < splits
        w = tl.exp2(tl.load(part_lse + (s + i) * rows + row, mask=inside, other=float("-inf")) - m)
        seen = inside & (w > 0.0)
        o = tl.load(part_o + ((s + i).to(tl.int64) * rows + row)[:, None] * D + d[None, :],
                    mask=seen[:, None] & (d < D)[None, :], other=0.0)
        acc += tl.sum(o * w[:, None], 0)
        total += w
        if ENTROPY:
            ent += w * tl.load(part_ent + (s + i) * rows + row, mask=seen, other=0.0)
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
def finish_kernel(
    part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, p_ptr, m_ptr, start_ptr, len_ptr, mass_ptr,
    splits, rows, heads, tiles, merges, blocks,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SINK: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):
    """The merge and the mass in one launch: neither waits for the other.

    The first `merges` programs are `_merge`'s. The others take BN entries of one lane (`blocks` a lane):
    mass[slot] = sum over the group of p/255 * exp2(m - lse), bytes p relative to their tile's largest logit m
    [lanes, tiles, G] (base 2), PACK of them to a word as `triton_split` wrote them, and lse from the parts themselves.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    if pid < merges:
        pieces: tl.constexpr = (D + BD - 1) // BD
        _merge(part_o, part_lse, part_ent, sink_ptr, gate_ptr, o_ptr, lse_ptr, ent_ptr, splits, rows, heads, pid // pieces,
               pid % pieces, D, BD, BS, SINK, GATE, ENTROPY)
    else:
        lane = ((pid - merges) // blocks).to(tl.int64)
        n = tl.load(len_ptr + lane).to(tl.int32)
        t = ((pid - merges) % blocks) * BN
        if t < n:
            g = tl.arange(0, GP)
            live = g < G
            s = tl.arange(0, BS)
            top = tl.full([BS, GP], float("-inf"), tl.float32)
            total = tl.zeros([BS, GP], tl.float32)
            for first in range(0, splits, BS):
                inside = (first + s < splits)[:, None] & live[None, :]
                part = tl.load(part_lse + (first + s)[:, None] * rows + lane * G + g[None, :], mask=inside, other=float("-inf"))
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
            lse = m + tl.log2(tl.maximum(z, 1e-37))
            WORDS: tl.constexpr = TILE // PACK  # of one head in one tile
            tile = t // TILE + tl.arange(0, BN // TILE)
            there = tile * TILE < n
            head = (lane * tiles + tile)[:, None]
            largest = tl.load(m_ptr + head * G + g[None, :], mask=there[:, None] & live[None, :], other=float("-inf"))
            factor = tl.exp2(largest - lse[None, :]) * (1.0 / 255.0)
            w = tl.arange(0, WORDS)
            word = tl.load(p_ptr + (head * WORDS + w[None, :])[:, :, None] * G + g[None, None, :],
                           mask=there[:, None, None] & live[None, None, :], other=0).to(tl.int32)
            first_row = tile[:, None] * TILE + (w // 8 * (8 * PACK) + w % 8)[None, :]
            mass_ptr += tl.load(start_ptr + lane).to(tl.int64)
            for b in tl.static_range(PACK):
                i = first_row + 8 * b
                p = ((word >> (8 * b)) & 0xFF).to(tl.float32)
                tl.store(mass_ptr + i, tl.sum(p * factor[:, None, :], 2), mask=i < n)
