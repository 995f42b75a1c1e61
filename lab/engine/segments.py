"""Segments: the rows of one side (keys or values) of a layer at one precision."""

from __future__ import annotations

from typing import Protocol

import torch

from lab.engine.ragged import Fields, Ragged

MOST_SPARE = 256
"""Rows of slack that coding a whole prompt leaves per lane: some to grow into, few beside a long prompt."""


class Codec(Protocol):
    """How b bits hold a vector. Implemented by `encode` techniques; all tensors carry lanes as [B, Hk, N, ...]."""

    bits: int
    block: int  # rows that must be encoded together: 1 for per-token codes, the group length for per-channel ones

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> tuple[Fields, Fields]:
        """x [B,Hk,T,d], pos [B,Hk,T] -> (fields per row, fields per block of `block` rows, or {})."""

    def decode(self, rows: Fields, blocks: Fields, pos: torch.Tensor | None) -> torch.Tensor:
        """Back to float [B,Hk,N,d]; blocks are already gathered per row."""


class Exact:
    """Rows as they came, in the cache's dtype."""

    bits = 16

    def __init__(self, batch: int, heads: int) -> None:
        self.rows = Ragged(batch, heads)

    @property
    def live_bytes(self) -> int:
        return self.rows.live_bytes

    @property
    def allocated_bytes(self) -> int:
        return self.rows.allocated_bytes

    def append(self, x: torch.Tensor, keep: torch.Tensor | None = None, spare: int = 0) -> None:
        self.rows.append({"x": x}, keep, spare)

    def decode(self, pos: torch.Tensor | None = None) -> torch.Tensor:
        return self.rows.padded("x")

    def logits(self, q: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        """q [B,Hk,R,d] -> raw dot products [B,Hk,R,longest]; columns past a lane's end are undefined."""
        if self.rows.dense:
            return q @ self.decode().mT
        out = q.new_zeros(*q.shape[:3], self.rows.longest)
        flat, qs = out.flatten(0, 1), q.flatten(0, 1)
        for lane, n in enumerate(self.rows.lens):
            flat[lane, :, :n] = qs[lane] @ self.rows.lane("x", lane).mT
        return out

    def mix(self, p: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        """p [B,Hk,R,longest] with zeros past a lane's end -> [B,Hk,R,d]."""
        if self.rows.dense:
            return p @ self.decode()
        ps = p.flatten(0, 1)
        lanes = [ps[lane, :, :n] @ self.rows.lane("x", lane) for lane, n in enumerate(self.rows.lens)]
        return torch.stack(lanes).view(*p.shape[:3], -1)

    def keep(self, mask: torch.Tensor, spare: int = 0) -> None:
        self.rows.keep(mask, spare)

    def drop(self, places: list[int | None]) -> None:
        self.rows.drop(places)

    def clone(self) -> "Exact":
        twin = Exact(self.rows.batch, self.rows.heads)
        twin.rows = self.rows.clone()
        return twin

    def empty(self, batch: int) -> "Exact":
        """Lanes of `batch` sequences for the same kind of rows, without one."""
        twin = Exact(batch, self.rows.heads)
        twin.rows = self.rows.empty(batch)
        return twin

    def repeat(self, times: int) -> None:
        self.rows.repeat(times)

    def select_sequences(self, index: list[int]) -> None:
        self.rows.select_sequences(index)


def drop(side: list, places: list[int | None]) -> None:
    """Remove entry places[lane] of every lane that names one, counted over the segments of one side in their order."""
    before = [0] * len(places)
    for segment in side:
        lens = segment.rows.lens
        inside = [p - b if p is not None and 0 <= p - b < n else None for p, b, n in zip(places, before, lens)]
        before = [b + n for b, n in zip(before, lens)]
        if any(place is not None for place in inside):
            segment.drop(inside)


class Coded:
    """Rows held by a codec. Fields shared by a block of rows live in a second ragged table, reached by `block` ids.

    Entries can leave one at a time: a block's shared scales are freed when its last row has gone.
    """

    def __init__(self, codec: Codec, batch: int, heads: int) -> None:
        self.codec, self.bits = codec, codec.bits
        self.rows = Ragged(batch, heads)
        self.blocks = Ragged(batch, heads)

    @property
    def live_bytes(self) -> int:
        return self.rows.live_bytes + self.blocks.live_bytes

    @property
    def allocated_bytes(self) -> int:
        return self.rows.allocated_bytes + self.blocks.allocated_bytes

    def append(self, x: torch.Tensor, pos: torch.Tensor, inside: torch.Tensor | None = None) -> None:
        """Encode x [B,Hk,T,d] at positions pos [B,Hk,T]; T is a multiple of the codec's block.

        inside bool [B,Hk,T] marks the rows that count where lanes differ: a prefix of each lane, whole blocks long.
        """
        rows, blocks = self.codec.encode(x, pos)
        if blocks:
            have = self.blocks.lens_tensor(x.device)[..., None]
            ids = torch.arange(x.shape[2], device=x.device) // self.codec.block
            rows["block"] = (ids + have).to(torch.int32)
            self.blocks.append(blocks, None if inside is None else inside[:, :, :: self.codec.block])
        self.rows.append(rows, inside, spare=max(self.codec.block, min(x.shape[2] // 8, MOST_SPARE), 16))

    def decode(self, pos: torch.Tensor | None = None) -> torch.Tensor:
        rows = {name: self.rows.padded(name) for name in self.rows.fields}
        ids = rows.pop("block", None)
        return self.codec.decode(rows, self._per_row(ids), pos)

    def newest(self, count: int) -> torch.Tensor:
        """The last `count` rows as numbers [B,Hk,count,d], or all where there are fewer, of lanes that hold equally many; for
        codes that need no positions."""
        rows = {name: self.rows.padded(name)[:, :, -count:] for name in self.rows.fields}
        ids = rows.pop("block", None)
        return self.codec.decode(rows, self._per_row(ids), None)

    def logits(self, q: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        fold = getattr(self.codec, "logits", None)
        if fold is not None:
            rows = {name: self.rows.padded(name) for name in self.rows.fields}
            folded = fold(q, rows, {n: self.blocks.padded(n) for n in self.blocks.fields}, self._whole())
            if folded is not None:
                return folded
        return q @ self.decode(pos).to(q.dtype).mT

    def mix(self, p: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        fold = getattr(self.codec, "mix", None)
        if fold is not None and not self.blocks.fields:
            return fold(p, {name: self.rows.padded(name) for name in self.rows.fields})
        return p @ self.decode(pos).to(p.dtype)

    def keep(self, mask: torch.Tensor, spare: int = 0) -> None:
        self.rows.keep(mask, spare)
        if self.blocks.fields:
            self._drop_empty_blocks()

    def drop(self, places: list[int | None]) -> None:
        """Remove row places[lane] of every lane that names one, and its block's scales where it was the last of its block."""
        empty = self._emptied(places) if self.blocks.fields else []
        self.rows.drop(places)
        if any(block is not None for block in empty):
            for lane, block in enumerate(empty):
                if block is not None:
                    ids = self.rows.lane("block", lane)
                    ids -= (ids > block).to(ids.dtype)
            self.blocks.drop(empty)

    def clone(self) -> "Coded":
        twin = Coded(self.codec, self.rows.batch, self.rows.heads)
        twin.rows, twin.blocks = self.rows.clone(), self.blocks.clone()
        return twin

    def empty(self, batch: int) -> "Coded":
        """Lanes of `batch` sequences for the same kind of codes, without one."""
        twin = Coded(self.codec, batch, self.rows.heads)
        twin.rows, twin.blocks = self.rows.empty(batch), self.blocks.empty(batch)
        return twin

    def repeat(self, times: int) -> None:
        self.rows.repeat(times)
        self.blocks.repeat(times)

    def select_sequences(self, index: list[int]) -> None:
        self.rows.select_sequences(index)
        self.blocks.select_sequences(index)

    def _whole(self) -> bool:
        """Every block still has all its rows, in order, so rows can be viewed as [blocks, block]."""
        size = self.codec.block
        return self.rows.level and self.rows.dense and all(
            n == b * size for n, b in zip(self.rows.lens, self.blocks.lens)
        )

    def _per_row(self, ids: torch.Tensor | None) -> Fields:
        if ids is None:
            return {}
        out = {}
        for name in self.blocks.fields:
            table = self.blocks.padded(name)
            index = ids.long().clamp_max(max(table.shape[2] - 1, 0)).unsqueeze(-1)
            out[name] = table.gather(2, index.expand(*ids.shape, table.shape[-1]))
        return out

    def _emptied(self, places: list[int | None]) -> list[int | None]:
        """For each lane the block that holds nothing but row places[lane]. One look at the device."""
        own = [None if place is None else self.rows.lane("block", lane) for lane, place in enumerate(places)]
        found = [torch.stack([ids[p], (ids == ids[p]).sum().to(ids.dtype)]) for ids, p in zip(own, places) if p is not None]
        told = iter(torch.stack(found).tolist())
        named = [None if place is None else next(told) for place in places]
        return [block[0] if block is not None and block[1] == 1 else None for block in named]

    def _drop_empty_blocks(self) -> None:
        ids = self.rows.padded("block").long()
        valid = self.rows.valid(ids.device)
        used = torch.zeros(*ids.shape[:2], self.blocks.longest, dtype=torch.bool, device=ids.device)
        if valid is None:
            used.scatter_(2, ids, True)
        else:  # slots past a lane's end carry stale ids
            b, h, slot = valid.nonzero(as_tuple=True)
            used[b, h, ids[b, h, slot]] = True
        fresh = used.cumsum(-1) - 1
        renumbered = fresh.gather(2, ids.clamp_max(used.shape[-1] - 1)).to(torch.int32)
        for lane, n in enumerate(self.rows.lens):
            b, h = divmod(lane, self.rows.heads)
            start = self.rows.starts[lane]
            self.rows.fields["block"][start : start + n] = renumbered[b, h, :n]
        self.blocks.keep(used)
