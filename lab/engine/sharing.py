"""What a layer does with entries that the samples of one prompt hold once: begin to share, look past them, and part."""

from __future__ import annotations

import torch

from lab.engine.common import Common, Segment, Stacked, aligned, joined, joined_coded
from lab.engine.ragged import Ragged
from lab.engine.segments import Coded, Exact


class Shares:
    """The part of `LabLayer` that knows of `common`: its entries lie in front of the layer's own, tier by tier."""

    @property
    def split(self) -> tuple[Exact, Exact] | None:
        """The common (keys, values) of one sequence where all rows are exact, and own ones equally many in every lane."""
        if self.common is None or self.coded_k or self.coded_v or not (self.exact_k.rows.level and self.exact_k.rows.dense):
            return None
        pair = self.common.pair
        return pair if pair is not None and isinstance(pair[0], Exact) else None

    def coded_rows(self, side: str) -> list[Segment]:
        """The coded segments of side "key" or "value", common ones included."""
        if self.common is None:
            return self.coded_k if side == "key" else self.coded_v
        return [s for s in (self.keys_side if side == "key" else self.values_side) if isinstance(s, Coded)]

    def exact_lens(self, side: str) -> list[int]:
        """Exact rows per lane of side "key" or "value", common ones included."""
        own = (self.exact_k if side == "key" else self.exact_v).rows.lens
        common = None if self.common is None else self.common.exact_of(side)
        return own if common is None else [a + b for a, b in zip(common.rows.lens, own)]

    def _share(self, times: int) -> None:
        """What is stored becomes common to `times` sequences, without slack; what comes is their own."""
        for part in self._parts():
            part.select_sequences([0])
        sides, meta = (self.keys_side, self.values_side), self.meta
        firsts, rests = aligned(*sides)
        self.coded_k, self.coded_v = ([], [])
        for rest, coded in zip(rests, (self.coded_k, self.coded_v)):
            coded += rest
            for segment in coded:
                segment.repeat(times)
        self.exact_k, self.exact_v = (side[-1].empty(times) for side in sides)
        self.meta = None if meta is None else meta.empty(times)
        self.shared_rows = self.seen
        self.common = Common(*([s for s in side if s.rows.longest] for side in firsts), meta, times)

    def part(self) -> None:
        """Give every sample its own copy of the common entries; nothing changes its place."""
        common = self.common
        if common is None:
            return
        self.part_meta()
        for side, coded in (("key", self.coded_k), ("value", self.coded_v)):
            self.part_exact(side)
            for segment in (s for s in common.views[side] if isinstance(s, Coded)):
                own = next((i for i, s in enumerate(coded) if s.bits == segment.bits), None)
                if own is None:
                    coded.append(joined_coded(segment, Coded(segment.codec, self.batch, self.heads)))
                else:
                    coded[own] = joined_coded(segment, coded[own])
            coded.sort(key=lambda s: s.bits)
        self.common, self.step_refused = None, False

    def part_meta(self) -> None:
        """Give every sample its own positions and statistics of the common entries."""
        if self.common is not None and self.common.meta is not None:
            self.meta = joined(self.common.meta_view, self.meta, _room(self.meta))
            self.common = self.common.without_meta()

    def part_exact(self, side: str) -> None:
        """Give every sample its own copy of the common exact rows of one side: they are about to be coded."""
        common = None if self.common is None else self.common.exact_of(side)
        if common is None:
            return
        own = self.exact_k if side == "key" else self.exact_v
        own.rows = joined(common.rows, own.rows, _room(own.rows))
        self.common = self.common.without_exact(side)
        if self.common.empty:
            self.part_meta()
            self.common = None

    def touches(self, flags: torch.Tensor) -> bool:
        """Whether flags bool [B, Hk, longest] mark an entry whose key or value is common."""
        valid = self.valid()
        flags = flags if valid is None else flags & valid
        for side in (self.keys_side, self.values_side):
            start = torch.zeros(self.batch, self.heads, 1, dtype=torch.long, device=self.device)
            for segment in side:
                if isinstance(segment, Stacked) and bool((flags & self._within(flags, segment.rows, start)).any()):
                    return True
                start = start + segment.rows.lens_tensor(self.device).unsqueeze(-1)
        return False

    def _part_for(self, gone: torch.Tensor) -> None:
        """Part as far as needed before entries flagged by gone bool [B, Hk, longest] leave."""
        if self.touches(gone):
            self.part()
        elif self.common.meta is not None and bool((gone & self._within(gone, self.common.meta_view)).any()):
            self.part_meta()

    def _within(self, flags: torch.Tensor, rows: Ragged, start: torch.Tensor | int = 0) -> torch.Tensor:
        line = torch.arange(flags.shape[-1], device=flags.device)
        return (line >= start) & (line < start + rows.lens_tensor(flags.device).unsqueeze(-1))

    def _behind_common(self, slot: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(among own exact rows, among own tags) of slot int64 [B, Hk], where none of the exact entries that leave (which bool
        [B, Hk, 1]) is common; else the layer parts and slots stay as they are."""
        common = self.common.exact_of("key").rows.lens_tensor(slot.device)
        if bool(((slot < common) & which[:, :, 0]).any()):
            self.part()
            return slot, slot
        own = (slot - common).clamp_min(0)
        return own, slot if self.common.meta is None else own


def _room(rows: Ragged) -> int:
    """Entries that every lane could still take."""
    return min(c - n for c, n in zip(rows.caps, rows.lens))
