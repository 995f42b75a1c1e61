"""Launching page selection in two rounds, with or without the reading, and the choice of its slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from kernels.backend import home, interpreting, overlaps
from kernels.decode.api import Decoded
from kernels.decode.tier import TierView
from kernels.decode.triton_merge import merge_kernel
from kernels.select.triton_best import last_kernel, read_kernel, slice_kernel

SMS = 132  # multiprocessors of an H100 or H200
MOST = 8192  # candidates that one program of the last round holds
REPEATED = 1024  # candidates of a last round that every reading program may repeat: 64 pages of 16 slices, as measured at 131k


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


def fits(c: Slices, pages: int, count: int, most: int = MOST) -> bool:
    """True where one program can hold every slice's best, `most` of them."""
    parts, keep = candidates(c, pages, count)
    return triton.next_power_of_2(max(parts * keep, count)) <= most


def _slices(q, low, high, length, count, page, last, c, scores=None) -> tuple[torch.Tensor, dict, int]:
    """Launch the first round: the slices' best (keys, pages) [2, lanes, parts, keep], the second's constants, and the overlap."""
    lanes, pages, dim = low.shape
    group = q.shape[1]
    parts, keep = candidates(c, pages, count)
    found = torch.empty(2, lanes, parts, keep, dtype=torch.int32, device=q.device)
    overlap = c.overlap if overlaps(q) else 0
    padded = max(16, triton.next_power_of_2(max(parts * keep, count)))
    home(slice_kernel)[(parts, lanes)](
        q.contiguous(), low, low if high is None else high, length, found[0], found[1], length if scores is None else scores,
        pages, parts, keep, last, PAGE=page, G=group, NQ=max(8, triton.next_power_of_2(group)), D=dim,
        DP=max(16, triton.next_power_of_2(dim)), BP=c.tile, TILES=c.tiles, BOUNDS=3 if c.pages <= 512 else 2,
        STAGES=1 if interpreting() else c.stages, MEAN=high is None, SCORES=scores is not None, PDL=overlap,
        num_warps=c.warps, num_stages=c.stages,
    )
    second = dict(PAGE=page, SLICE=c.pages, PP=padded, BOUNDS=3 if padded <= 512 else 2, PDL=overlap > 0,
                  num_warps=c.last_warps * max(1, padded // 2048))
    if overlap:
        second["launch_pdl"] = True
    return found, second, overlap


def best_pages(
    q: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, length: torch.Tensor, count: int, page: int,
    last: int, c: Slices, scores: torch.Tensor | None = None, want: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton path of `kernels.select.best_pages`; rows q [lanes,G,d]. scores float32 [lanes,P] is filled when given."""
    found, second, _ = _slices(q, low, high, length, count, page, last, c, scores)
    lanes, parts, keep = found.shape[1:]
    out = torch.empty(lanes, count, dtype=torch.int32, device=q.device)
    home(last_kernel)[(lanes,)](
        length, found[0], found[1], length if want is None else want, out, parts, keep, count, last, WANT=want is not None,
        **second,
    )
    return out


def attend(
    q: torch.Tensor, tier: TierView, low: torch.Tensor, high: torch.Tensor | None, count: int, scale: float, page: int,
    last: int, c: Slices, share: int = 64, want: torch.Tensor | None = None, sink: torch.Tensor | None = None,
    gate: torch.Tensor | None = None, front: TierView | None = None,
) -> Decoded:
    """The Triton path of `kernels.select.attend_best`, q [B,Hq,d]; share: entries that one program reads."""
    batch, heads, dim = q.shape
    lanes = tier.lanes
    rows = batch * heads
    group = rows // lanes
    q = q.contiguous()
    found, second, overlap = _slices(q.view(lanes, group, dim), low, high, tier.length, count, page, last, c)
    parts, keep = found.shape[2:]
    pages = max(1, share // page)
    ahead = 0 if front is None else triton.cdiv(front.capacity, pages * page)
    splits = ahead + triton.cdiv(count, pages)
    before = tier if front is None else front
    part = torch.empty(splits, rows, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    home(read_kernel)[(splits, lanes)](
        q, tier.k, tier.v, tier.start, tier.length, found[0], found[1], tier.length if want is None else want, before.start,
        before.length, part, part_lse, scale, parts, keep, count, last, WANT=want is not None, FRONT=ahead,
        G=group, NQ=max(8, triton.next_power_of_2(group)), D=dim, DP=max(16, triton.next_power_of_2(dim)), PAGES=pages,
        **second,
    )
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    wide = next((w for w in (64, 32) if rows * dim >= 264 * w), 16)
    home(merge_kernel)[(rows, triton.cdiv(dim, wide))](
        part, part_lse, part_lse, part_lse if sink is None else sink, part_lse if gate is None else gate, out, lse, lse, splits,
        rows, heads, D=dim, BD=wide, BS=16 if splits <= 64 else 64, SINK=sink is not None, GATE=gate is not None,
        ENTROPY=False, PDL=overlap > 0, num_warps=2 if splits <= 64 else 4,
        **({"launch_pdl": True} if overlap else {}),
    )
    return Decoded(out, lse)


def variants(lanes: int, pages: int) -> list[Slices]:
    """What `benchmarks/select_variants.py` times beside the choice of `slices` for 16-bit summaries of 128 channels."""
    c = slices(lanes, pages, 128, 2)
    half = replace(c, tiles=max(1, c.tiles // 2))
    some = [c, replace(c, overlap=0), replace(c, overlap=2), replace(c, stages=4), replace(c, warps=8), replace(half, warps=2)]
    return list(dict.fromkeys(some))
