"""Launch configurations of the step's products: written down, nothing tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """rows: matrix rows (or pairs of rows) per program; width: columns per tile; tiles: read before the first is used;
    warps: as many as give each thread 8 numbers (16 bytes of bfloat16) of a tile, so that a row stays inside a warp."""

    rows: int
    width: int
    tiles: int
    warps: int


def shape(rows: int, columns: int, pairs: bool) -> Shape:
    """The configuration for `rows` outputs (pairs of them where `pairs`) over `columns` inputs.

    Small matrices: four rows a program, so that they still give every multiprocessor something to read, and all of a
    program's weights on their way before the input is there. Long ones (a vocabulary): more rows per program.
    """
    width = min(256, max(32, 1 << (columns - 1).bit_length()))
    count, warps = (16, 8) if rows >= 16384 else (4, 4)
    return Shape(count, width, min(4 if pairs else 8, -(-columns // width)), warps)
