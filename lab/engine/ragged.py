"""Ragged storage: one flat tensor per field, each lane owning a slice of it.

A lane is one KV head of one sequence (lane = b*Hk + h). Lane l owns slots starts[l] .. starts[l] + lens[l] of every
field and may grow to caps[l]. When all lanes have one capacity the flat tensor is also a dense [B, Hk, cap, ...] view,
which is what the fast paths use; when they do not, no memory is spent on padding.
"""

from __future__ import annotations

import torch

Fields = dict[str, torch.Tensor]


class Ragged:
    """Named fields over ragged lanes. Fields are declared by the first rows appended: {name: [B, Hk, T, ...]}."""

    def __init__(self, batch: int, heads: int) -> None:
        self.batch, self.heads = batch, heads
        self.lanes = batch * heads
        self.fields: Fields = {}
        self.lens = [0] * self.lanes
        self.caps = [0] * self.lanes
        self.starts = [0] * self.lanes

    # -- shape ---------------------------------------------------------------------------------------------------
    @property
    def longest(self) -> int:
        """Entries in the fullest lane."""
        return max(self.lens)

    @property
    def level(self) -> bool:
        """Every lane holds the same number of entries."""
        return self.lens.count(self.lens[0]) == self.lanes

    @property
    def dense(self) -> bool:
        """Every lane has the same capacity, so fields can be viewed as [B, Hk, cap, ...]."""
        return self.caps.count(self.caps[0]) == self.lanes

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of one lane, all fields together."""
        return sum(f[:1].numel() * f.element_size() for f in self.fields.values())

    @property
    def live_bytes(self) -> int:
        """Bytes of the entries held."""
        return sum(self.lens) * self.row_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the tensors behind them, slack capacity included."""
        return sum(f.untyped_storage().nbytes() for f in self.fields.values())

    def lens_tensor(self, device: torch.device) -> torch.Tensor:
        """int64 [B, Hk] entries per lane."""
        return torch.tensor(self.lens, device=device).view(self.batch, self.heads)

    def valid(self, device: torch.device) -> torch.Tensor | None:
        """bool [B, Hk, longest] of the slots in use, or None when every lane is equally full."""
        if self.level:
            return None
        slots = torch.arange(self.longest, device=device)
        return slots < self.lens_tensor(device).unsqueeze(-1)

    # -- reading -------------------------------------------------------------------------------------------------
    def lane(self, name: str, lane: int) -> torch.Tensor:
        """The live rows of one lane, [len, ...] (a view)."""
        start = self.starts[lane]
        return self.fields[name][start : start + self.lens[lane]]

    def padded(self, name: str) -> torch.Tensor:
        """[B, Hk, longest, ...]: a view when capacities agree, else a padded copy (zeros past a lane's end)."""
        field = self.fields[name]
        if self.dense:
            shaped = field.view(self.batch, self.heads, self.caps[0], *field.shape[1:])
            return shaped[:, :, : self.longest]
        out = field.new_zeros(self.lanes, self.longest, *field.shape[1:])
        for lane, n in enumerate(self.lens):
            out[lane, :n] = self.lane(name, lane)
        return out.view(self.batch, self.heads, *out.shape[1:])

    def whole(self, name: str) -> torch.Tensor:
        """[B, Hk, cap, ...], slack included: a view, only where capacities agree."""
        field = self.fields[name]
        return field.view(self.batch, self.heads, self.caps[0], *field.shape[1:])

    # -- writing -------------------------------------------------------------------------------------------------
    def append(self, rows: Fields, keep: torch.Tensor | None = None, spare: int = 0) -> None:
        """Append rows {name: [B, Hk, T, ...]} to every lane; keep bool [B, T] or [B, Hk, T] drops some of them.

        spare is the slack, in entries per lane, to allocate when storage has to grow.
        """
        first = next(iter(rows.values()))
        count = first.shape[2]
        if keep is None:
            if not self._fits([count] * self.lanes):
                self._grow([n + count for n in self.lens], spare, rows)
            if self.dense and self.level:
                n = self.lens[0]
                for name, new in rows.items():
                    self.whole(name)[:, :, n : n + count] = new
                self.lens = [n + count] * self.lanes
                return
            ends = torch.tensor([s + n for s, n in zip(self.starts, self.lens)], device=first.device)
            target = (ends[:, None] + torch.arange(count, device=first.device)).flatten()
            for name, new in rows.items():
                self.fields[name][target] = new.reshape(self.lanes * count, *new.shape[3:])
            self.lens = [n + count for n in self.lens]
            return
        if keep.dim() == 2:
            keep = keep.unsqueeze(1).expand(-1, self.heads, -1)
        flags = keep.reshape(self.lanes, count)
        counts = flags.sum(-1).tolist()
        if not self._fits(counts):
            self._grow([n + c for n, c in zip(self.lens, counts)], spare, rows)
        for lane, added in enumerate(counts):
            end = self.starts[lane] + self.lens[lane]
            for name, new in rows.items():
                self.fields[name][end : end + added] = new.reshape(self.lanes, *new.shape[2:])[lane, flags[lane]]
            self.lens[lane] += added

    def add_field(self, name: str, like: torch.Tensor) -> None:
        """Add a field after the fact, filled from like [B, Hk, longest, ...]."""
        flat = like.new_zeros(sum(self.caps), *like.shape[3:])
        for lane, n in enumerate(self.lens):
            flat[self.starts[lane] : self.starts[lane] + n] = like.reshape(self.lanes, *like.shape[2:])[lane, :n]
        self.fields[name] = flat

    def keep(self, mask: torch.Tensor, spare: int = 0) -> None:
        """Keep the entries where mask bool [B, Hk, longest] is set, in their order; storage shrinks to fit."""
        if not self.fields:
            return
        valid = self.valid(mask.device)
        flags = (mask if valid is None else mask & valid).reshape(self.lanes, -1)
        lane, slot = flags.nonzero(as_tuple=True)
        counts = flags.sum(-1).tolist()
        source = torch.tensor(self.starts, device=mask.device)[lane] + slot
        self._rebuild(source, lane, counts, spare)

    def order(self, index: torch.Tensor) -> None:
        """Reorder each lane by index int64 [B, Hk, longest] (positions past a lane's end are ignored)."""
        flat = index.reshape(self.lanes, -1)
        source = [self.starts[lane] + flat[lane, :n] for lane, n in enumerate(self.lens)]
        lane = torch.repeat_interleave(torch.tensor(self.lens, device=index.device))
        self._rebuild(torch.cat(source), lane, list(self.lens), 0)

    def pop_swap(self, slot: torch.Tensor, lanes: list[int] | None = None) -> None:
        """Remove one entry of every lane (or of `lanes` only), slot int64 [B, Hk], by moving the lane's last entry into its
        place: O(row)."""
        if lanes is not None:
            last = [self.starts[i] + self.lens[i] - 1 for i in lanes]
            target = [self.starts[i] + s for i, s in zip(lanes, slot.flatten()[lanes].tolist())]
            for field in self.fields.values():
                field[target] = field[last]
            for i in lanes:
                self.lens[i] -= 1
            return
        if self.level and self.dense:
            n = self.lens[0]
            for name in self.fields:
                shaped = self.whole(name)
                at = slot.view(*slot.shape, 1, *[1] * (shaped.dim() - 3)).expand(*slot.shape, 1, *shaped.shape[3:])
                shaped.scatter_(2, at, shaped[:, :, n - 1 : n].clone())
            self.lens = [n - 1] * self.lanes
            return
        starts = torch.tensor(self.starts, device=slot.device)
        last = torch.tensor([s + n - 1 for s, n in zip(self.starts, self.lens)], device=slot.device)
        target = starts + slot.reshape(-1)
        for field in self.fields.values():
            field[target] = field[last]
        self.lens = [n - 1 for n in self.lens]

    def drop(self, places: list[int | None]) -> None:
        """Remove entry places[lane] of every lane that names one; those behind it move up, and the room stays."""
        source = torch.arange(sum(self.caps))
        for start, held, place in zip(self.starts, self.lens, places):
            if place is not None:
                source[start + place : start + held - 1] += 1
        self.lens = [held - (place is not None) for held, place in zip(self.lens, places)]
        source = source.to(next(iter(self.fields.values())).device)
        self.fields = {name: field.index_select(0, source) for name, field in self.fields.items()}

    def packed(self, flags: torch.Tensor) -> tuple[Fields, torch.Tensor, torch.Tensor]:
        """Copies of the rows where flags bool [B, Hk, longest] is set, moved to the front of each lane.

        Returns ({name: [B, Hk, m, ...]}, slots int64 [B, Hk, m], inside bool [B, Hk, m]); m is the fullest lane's count
        and rows where `inside` is False are filler.
        """
        counts = flags.sum(-1)
        m = int(counts.max()) if flags.numel() else 0
        slots = (~flags).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, :m]
        inside = torch.arange(m, device=flags.device) < counts.unsqueeze(-1)
        taken = {}
        for name in self.fields:
            table = self.padded(name)
            index = slots.view(*slots.shape, *[1] * (table.dim() - 3)).expand(*slots.shape, *table.shape[3:])
            taken[name] = table.gather(2, index)
        return taken, slots, inside

    def overwrite(self, rows: Fields, slots: torch.Tensor, inside: torch.Tensor) -> None:
        """Replace rows at slots int64 [B, Hk, m] by rows {name: [B, Hk, m, ...]} where inside bool [B, Hk, m] is set."""
        starts = torch.tensor(self.starts, device=slots.device).view(self.batch, self.heads, 1)
        target = (starts + slots)[inside]
        for name, new in rows.items():
            self.fields[name][target] = new[inside].to(self.fields[name].dtype)

    def take_front(self, count: int, skip: int = 0) -> Fields:
        """Remove rows skip .. skip+count of every lane and return them as {name: [B, Hk, count, ...]}."""
        taken = {name: self.padded(name)[:, :, skip : skip + count].clone() for name in self.fields}
        if self.level and self.dense and count <= 64:  # a decode step: close the gap in place, keep the room
            n = self.lens[0]
            for name in self.fields:
                if skip + count < n:
                    shaped = self.whole(name)
                    shaped[:, :, skip : n - count] = shaped[:, :, skip + count : n].clone()
            self.lens = [n - count] * self.lanes
            return taken
        index = torch.arange(self.longest, device=next(iter(taken.values())).device)
        stay = (index < skip) | (index >= skip + count)
        self.keep(stay.expand(self.batch, self.heads, -1), spare=self.caps[0] - self.lens[0])
        return taken

    def repeat(self, times: int) -> None:
        """Repeat every sequence `times` times along the batch (samples of one prompt)."""
        if times == 1:
            return
        counts = self.lens * times
        source = torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, self.lens)] * times)
        lane = torch.repeat_interleave(torch.tensor(counts))
        self.batch, self.lanes = self.batch * times, self.lanes * times
        self.starts, self.lens = self.starts * times, counts
        device = next(iter(self.fields.values())).device if self.fields else torch.device("cpu")
        self._rebuild(source.to(device), lane.to(device), counts, 0)

    def select_sequences(self, index: list[int]) -> None:
        """Keep the sequences of the batch in `index`, in that order (beam search, batch selection)."""
        lanes = [b * self.heads + h for b in index for h in range(self.heads)]
        self.starts, self.caps = [self.starts[i] for i in lanes], [self.caps[i] for i in lanes]
        self.lens = [self.lens[i] for i in lanes]
        self.batch, self.lanes = len(index), len(lanes)
        if self.fields:
            device = next(iter(self.fields.values())).device
            source = torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, self.lens)]).to(device)
            lane = torch.repeat_interleave(torch.tensor(self.lens)).to(device)
            self._rebuild(source, lane, list(self.lens), 0)

    def empty(self, batch: int) -> "Ragged":
        """Lanes of `batch` sequences with the same fields and no entry."""
        twin = Ragged(batch, self.heads)
        twin.fields = {name: field.new_zeros(0, *field.shape[1:]) for name, field in self.fields.items()}
        return twin

    def clone(self) -> "Ragged":
        """An independent copy."""
        twin = Ragged(self.batch, self.heads)
        twin.lens, twin.caps, twin.starts = list(self.lens), list(self.caps), list(self.starts)
        twin.fields = {name: field.clone() for name, field in self.fields.items()}
        return twin

    def reserve(self, spare: int) -> None:
        """Make room for `spare` more entries per lane."""
        if self.fields and not self._fits([spare] * self.lanes):
            self._grow(self.lens, spare, {})

    def resize(self, capacity: int) -> None:
        """Give every lane exactly `capacity` slots; no lane may hold more."""
        if self.caps != [capacity] * self.lanes:
            self._lay([capacity] * self.lanes, {})

    # -- inside --------------------------------------------------------------------------------------------------
    def _fits(self, added: list[int]) -> bool:
        return bool(self.fields) and all(n + a <= c for n, a, c in zip(self.lens, added, self.caps))

    def _grow(self, needed: list[int], spare: int, rows: Fields) -> None:
        self._lay([max(need + spare, cap) for need, cap in zip(needed, self.caps)], rows)

    def _lay(self, caps: list[int], rows: Fields) -> None:
        """New tensors for lanes of these capacities, entries carried over; fields not known yet are like `rows`."""
        starts = _starts(caps)
        names = rows if not self.fields else self.fields
        old, self_starts = self.fields, self.starts
        self.fields = {}
        for name in names:
            like = old[name] if name in old else rows[name]
            tail = like.shape[1:] if name in old else like.shape[3:]
            flat = torch.zeros(sum(caps), *tail, dtype=like.dtype, device=like.device)
            for lane, n in enumerate(self.lens):
                if n:
                    flat[starts[lane] : starts[lane] + n] = old[name][self_starts[lane] : self_starts[lane] + n]
            self.fields[name] = flat
        self.caps, self.starts = caps, starts

    def _rebuild(self, source: torch.Tensor, lane: torch.Tensor, counts: list[int], spare: int) -> None:
        caps = [c + spare for c in counts]
        starts = _starts(caps)
        offsets = torch.tensor([s - b for s, b in zip(starts, _starts(counts))], device=source.device)
        target = torch.arange(source.numel(), device=source.device) + offsets[lane] if spare else None
        for name, field in self.fields.items():
            if target is None:
                self.fields[name] = field[source]
            else:
                fresh = field.new_zeros(sum(caps), *field.shape[1:])
                fresh[target] = field[source]
                self.fields[name] = fresh
        self.caps, self.starts, self.lens = caps, starts, counts


def _starts(caps: list[int]) -> list[int]:
    starts, total = [], 0
    for cap in caps:
        starts.append(total)
        total += cap
    return starts
