"""Launching page selection in two rounds, and the choice of its slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from kernels.backend import home, interpreting, overlaps
from kernels.select.triton_best import last_kernel, slice_kernel

SMS = 132  # multiprocessors of an H100 or H200
MOST = 8192  # candidates that one program of the last round holds


@dataclass(frozen=True)
class Slices:
    """How pages are cut: pages of a tile, tiles of a slice (powers of two), warps and software pipeline depth of a slice program,
    warps of the last round, and whether launches overlap (0 no, 1 from the start, 2 after a slice's last tile)."""

    tile: int
    tiles: int
    warps: int = 4
    stages: int = 3
    last_warps: int = 4
    overlap: int = 1

    @property
    def pages(self) -> int:
        """Pages of a slice."""
        return self.tile * self.tiles


def slices(lanes: int, pages: int, dim: int, size: int) -> Slices:
    """One wave of programs where slices of up to 1024 pages allow it. size: bytes of a number in the summaries."""
    tile = 64 if dim * size <= 256 else 32
    want = max(tile, min(1024, triton.next_power_of_2(triton.cdiv(pages * lanes, SMS))))
    return Slices(tile, want // tile, stages=3 if dim * size <= 512 else 2)


def candidates(c: Slices, pages: int, count: int) -> tuple[int, int]:
    """(slices of a lane, pages each keeps)."""
    return triton.cdiv(pages, c.pages), min(count, c.pages)


def fits(c: Slices, pages: int, count: int) -> bool:
    """True where one program can hold every slice's best."""
    parts, keep = candidates(c, pages, count)
    return triton.next_power_of_2(max(parts * keep, count)) <= MOST


def best_pages(
    q: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, length: torch.Tensor, count: int, page: int,
    always_last: bool, c: Slices, scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton path of `kernels.select.best_pages`; rows q [lanes,G,d]. scores float32 [lanes,P] is filled when given."""
    lanes, pages, dim = low.shape
    group = q.shape[1]
    parts, keep = candidates(c, pages, count)
    found = torch.empty(2, lanes, parts, keep, dtype=torch.int32, device=q.device)
    out = torch.empty(lanes, count, dtype=torch.int32, device=q.device)
    overlap = c.overlap if overlaps(q) else 0
    padded = max(16, triton.next_power_of_2(max(parts * keep, count)))
    home(slice_kernel)[(parts, lanes)](
        q.contiguous(), low, low if high is None else high, length, found[0], found[1], length if scores is None else scores,
        pages, parts, keep, PAGE=page, G=group, NQ=max(8, triton.next_power_of_2(group)), D=dim,
        DP=max(16, triton.next_power_of_2(dim)), BP=c.tile, TILES=c.tiles, BOUNDS=3 if c.pages <= 512 else 2,
        STAGES=1 if interpreting() else c.stages, MEAN=high is None, LAST=always_last, SCORES=scores is not None, PDL=overlap,
        num_warps=c.warps, num_stages=c.stages,
    )
    home(last_kernel)[(lanes,)](
        length, found[0], found[1], out, parts, keep, count, PAGE=page, SLICE=c.pages, PP=padded,
        BOUNDS=3 if padded <= 512 else 2, LAST=always_last, PDL=overlap > 0, num_warps=c.last_warps * max(1, padded // 2048),
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


def variants(lanes: int, pages: int) -> list[Slices]:
    """What `benchmarks/select_variants.py` times beside the choice of `slices` for 16-bit summaries of 128 channels."""
    c = slices(lanes, pages, 128, 2)
    half = replace(c, tiles=max(1, c.tiles // 2))
    some = [
        c, replace(c, overlap=0), replace(c, overlap=2), replace(c, stages=4), replace(c, stages=5), replace(c, warps=2, stages=4),
        replace(c, warps=1, stages=4), replace(c, tile=32, tiles=c.tiles * 2, stages=5),
        replace(c, last_warps=8), half, replace(half, warps=2),
    ]
    return list(dict.fromkeys(some))
