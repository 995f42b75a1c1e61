"""Explicit launch configurations for decode: no tuning at run time, every choice written down.

Measured on one H100 (benchmarks/NOTES.md holds the alternatives that lost).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _pow2(n: int, least: int = 1) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Split:
    """Tile of one program: keys per tile, warps, software pipeline depth, register cap, and tokens per program."""

    tile: int
    warps: int
    stages: int
    registers: int | None
    chunk: int


def heads_padded(group: int) -> int:
    """Columns a tile keeps for the query heads of a lane: 8, the smallest matrix width, or the next power of two."""
    return _pow2(group, 8)


def words(bytes_per_token: int, group_bytes: int, widest: int) -> tuple[int, int, int]:
    """(bytes per column block, bytes per word, padded words per block) for reading codes.

    A block lies inside one scale group; a word is as wide as still leaves 16 words, the shortest contraction a
    matrix instruction takes, with a little padding allowed.
    """
    block = math.gcd(bytes_per_token, group_bytes)
    word = next(w for w in (4, 2, 1) if w <= widest and block % w == 0 and (block // w >= 10 or w == 1))
    return block, word, _pow2(block // word, 16)


def split(bits: int, dim: int, group: int, lanes: int, capacity: int, exact: bool) -> Split:
    """The configuration for a tier. exact: float32 arithmetic on ordinary units, where speed is not the aim."""
    columns = heads_padded(group)
    if exact:
        return Split(32, 4, 1, None, _chunk(lanes, capacity, 32, 132 * 8))
    if bits == 16:
        if dim <= 64:
            return Split(64, 2, 3, None, _chunk(lanes, capacity, 64, 132 * 6))
        if dim <= 128:
            return Split(64, 4, 3, None, _chunk(lanes, capacity, 64, 132 * 3))
        return Split(32, 4, 3, None, _chunk(lanes, capacity, 32, 132 * 3))
    # one warp per program: softmax, transposes and both products stay inside the warp, without a barrier
    registers = 168 if columns == 8 and dim <= 128 else None
    return Split(32, 1, 3, registers, _chunk(lanes, capacity, 32, 132 * 12))


def _chunk(lanes: int, capacity: int, tile: int, programs: int) -> int:
    """Tokens per program: enough programs for about two waves, but no fewer than 4 tiles and no more than 1024."""
    want = math.ceil(lanes * capacity / (2 * programs))
    return max(4 * tile, min(1024, math.ceil(want / tile) * tile))
