"""Explicit launch configurations for decode: no tuning at run time, every choice written down.

Measured on an H100 and an H200 (benchmarks/NOTES.md holds the alternatives that lost).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _pow2(n: int, least: int = 1) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Split:
    """Tile of one program: keys per tile, warps, software pipeline depth, register cap, tokens per program, and whether
    scales are loaded one tile ahead."""

    tile: int
    warps: int
    stages: int
    registers: int | None
    chunk: int
    ahead: bool = False


def heads_padded(group: int) -> int:
    """Columns a tile keeps for the query heads of a lane: 8, the smallest matrix width, or the next power of two."""
    return _pow2(group, 8)


def words(bytes_per_token: int, group_bytes: int, widest: int) -> tuple[int, int, int]:
    """(bytes per column block, bytes per word, padded words per block) for reading codes.

    A block lies inside one scale group; a word is as wide as still leaves 16 words, the shortest contraction a
    matrix instruction takes, with a little padding allowed; with half of it padding before single bytes, which pass through
    shared memory one by one.
    """
    block = math.gcd(bytes_per_token, group_bytes)
    fits = [w for w in (4, 2) if w <= widest and block % w == 0]
    word = next((w for w in fits if block // w >= 10), 2 if 2 in fits and block // 2 >= 8 else 1)
    return block, word, _pow2(block // word, 16)


SMS = 132  # multiprocessors of an H100 or H200; other cards only lose a little balance


def split(bits: int, dim: int, group: int, lanes: int, capacity: int, slots: int, odd: bool, block: bool,
          exact: bool) -> Split:
    """The configuration for a tier.

    slots: allocated over all lanes, which tells how ragged they may be. odd: scales come as lone float16 numbers.
    block: keys are scaled per channel and block, whose scales are fetched through one more indirection.
    exact: float32 arithmetic on ordinary units, where speed is not the aim.
    """
    columns = heads_padded(group)
    if exact:
        return Split(32, 4, 1, None, _chunk(lanes, capacity, slots, 32, 4))
    if bits == 16:
        if dim <= 64:
            return Split(64, 2, 3, None, _chunk(lanes, capacity, slots, 64, 2))
        tile = 64 if dim <= 128 else 32
        chunk = _chunk(lanes, capacity, slots, tile, 1)
        if dim <= 128 and columns == 8 and chunk >= 4096:
            tile = 128  # long enough for tiles that keep more bytes under way
        return Split(tile, 4, 3, None, math.ceil(chunk / tile) * tile)
    # one warp per program: softmax, transposes and both products stay inside the warp, without a barrier
    registers = 168 if columns == 8 and dim <= 128 else None
    per_sm = 12 if dim <= 64 else 4 if bits == 8 and not odd else 8
    stages = 5 if block else 4 if dim <= 64 else 3
    return Split(32, 1, stages, registers, _chunk(lanes, capacity, slots, 32, per_sm), odd)


def _chunk(lanes: int, capacity: int, slots: int, tile: int, per_sm: int) -> int:
    """Tokens per program.

    Equal lanes: as many programs as fit the card at once, no more, since a second wave that is not full costs its
    whole time; with more lanes than that, several waves, so that a part-filled last one matters little. Ragged lanes:
    about four waves' worth, for balance. Never fewer than 4 tiles, where start-up costs dominate, unless there is
    little to read at all.
    """
    resident = SMS * per_sm
    if slots < 0.9 * lanes * capacity:
        want = math.ceil(slots / (4 * resident))
    elif per_sm <= 2 and 2 * lanes > resident:
        want = math.ceil(capacity * lanes / (12 * SMS))
    else:
        want = math.ceil(capacity / max(1, resident // lanes))
    least = 1 if capacity <= 2048 else 4
    return max(least * tile, math.ceil(want / tile) * tile)


@dataclass(frozen=True)
class Merge:
    """Tile of one program of the merge: channels, parts summed at once, warps."""

    channels: int
    parts: int
    warps: int


def merge(splits: int, rows: int, dim: int) -> Merge:
    """The configuration that joins `splits` parts of `rows` query heads."""
    # few rows: thinner slices of channels, so that the merge still fills the card
    channels = next((w for w in (64, 32) if rows * dim >= 264 * w), 16)
    if splits <= 16:
        return Merge(channels, 16, 1)
    if channels < 64:
        return Merge(channels, 64, 2)
    return Merge(channels, 16, 2) if splits <= 64 else Merge(channels, 64, 4)


MASS_ENTRIES, MASS_WARPS = 1024, 2  # of a lane, and of a program, in the launch that merges and turns weights into mass
