"""Ragged storage against a model of it: lists of rows per lane, under random sequences of every operation."""

from __future__ import annotations

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lab.engine.ragged import Ragged

MOST = 24  # rows per lane, to keep examples small


class RaggedMachine(RuleBasedStateMachine):
    """Two fields of different shape and type; every row carries a number of its own."""

    @initialize(batch=st.integers(1, 3), heads=st.integers(1, 3))
    def start(self, batch, heads):
        self.ragged, self.lanes = Ragged(batch, heads), [[] for _ in range(batch * heads)]
        self.next, self.other = 1, None

    def fresh(self, count: int) -> torch.Tensor:
        lanes = len(self.lanes)
        ids = torch.arange(self.next, self.next + lanes * count).view(self.ragged.batch, self.ragged.heads, count)
        self.next += lanes * count
        return ids

    @staticmethod
    def rows(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([ids * 1.0, ids * 0.5, -ids * 1.0], -1), "id": ids.to(torch.int32)}

    def room(self) -> int:
        return MOST - max(len(lane) for lane in self.lanes)

    @rule(count=st.integers(1, 6), spare=st.integers(0, 5))
    def append(self, count, spare):
        if count > self.room():
            return
        ids = self.fresh(count)
        self.ragged.append(self.rows(ids), spare=spare)
        for lane, new in zip(self.lanes, ids.flatten(0, 1).tolist()):
            lane += new

    @rule(count=st.integers(1, 6), spare=st.integers(0, 5), seed=st.integers(0, 999), per_head=st.booleans())
    def append_some(self, count, spare, seed, per_head):
        """Padding drops rows of a sequence; policies drop rows of a head."""
        if count > self.room():
            return
        ids = self.fresh(count)
        shape = (self.ragged.batch, self.ragged.heads, count) if per_head else (self.ragged.batch, count)
        flags = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4
        self.ragged.append(self.rows(ids), flags, spare)
        every = flags if per_head else flags[:, None].expand(-1, self.ragged.heads, -1)
        for lane, new, stay in zip(self.lanes, ids.flatten(0, 1).tolist(), every.flatten(0, 1).tolist()):
            lane += [n for n, s in zip(new, stay) if s]

    @rule(seed=st.integers(0, 999))
    def drop(self, seed):
        """One row of some lanes goes, those behind it move up."""
        draw = torch.Generator().manual_seed(seed)
        places = [int(torch.randint(-1, len(lane), (1,), generator=draw)) if lane else -1 for lane in self.lanes]
        if self.ragged.fields:
            self.ragged.drop([place if place >= 0 else None for place in places])
            for lane, place in zip(self.lanes, places):
                if place >= 0:
                    del lane[place]

    def mask(self, seed: int, share: float) -> torch.Tensor:
        shape = (self.ragged.batch, self.ragged.heads, self.ragged.longest)
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share

    @precondition(lambda self: self.ragged.fields)
    @rule(seed=st.integers(0, 999), share=st.floats(0, 1), spare=st.integers(0, 4))
    def keep(self, seed, share, spare):
        mask = self.mask(seed, share)
        self.ragged.keep(mask, spare)
        for lane, flags in zip(self.lanes, mask.flatten(0, 1).tolist()):
            lane[:] = [n for n, f in zip(lane, flags) if f]

    @precondition(lambda self: self.ragged.fields and min(len(lane) for lane in self.lanes) > 0)
    @rule(seed=st.integers(0, 999))
    def pop_swap(self, seed):
        g = torch.Generator().manual_seed(seed)
        slot = [int(torch.randint(len(lane), (1,), generator=g)) for lane in self.lanes]
        self.ragged.pop_swap(torch.tensor(slot).view(self.ragged.batch, self.ragged.heads))
        for lane, n in zip(self.lanes, slot):
            lane[n] = lane[-1]
            lane.pop()

    @precondition(lambda self: self.ragged.fields and min(len(lane) for lane in self.lanes) > 0)
    @rule(data=st.data())
    def take_front(self, data):
        shortest = min(len(lane) for lane in self.lanes)
        skip = data.draw(st.integers(0, shortest - 1))
        count = data.draw(st.integers(1, shortest - skip))
        taken = self.ragged.take_front(count, skip)
        assert taken["id"].flatten(0, 1).tolist() == [lane[skip : skip + count] for lane in self.lanes]
        for lane in self.lanes:
            del lane[skip : skip + count]

    @precondition(lambda self: self.ragged.fields and self.ragged.longest > 0)
    @rule(seed=st.integers(0, 999))
    def order(self, seed):
        g = torch.Generator().manual_seed(seed)
        index = torch.zeros(len(self.lanes), self.ragged.longest, dtype=torch.long)
        for row, lane in zip(index, self.lanes):
            row[: len(lane)] = torch.randperm(len(lane), generator=g)
        self.ragged.order(index.view(self.ragged.batch, self.ragged.heads, -1))
        for row, lane in zip(index.tolist(), self.lanes):
            lane[:] = [lane[i] for i in row[: len(lane)]]

    @precondition(lambda self: self.ragged.batch <= 2)
    @rule(times=st.integers(1, 2))
    def repeat(self, times):
        self.ragged.repeat(times)
        self.lanes = [list(lane) for _ in range(times) for lane in self.lanes]

    @rule(data=st.data())
    def select(self, data):
        index = data.draw(st.lists(st.integers(0, self.ragged.batch - 1), min_size=1, max_size=3))
        self.ragged.select_sequences(index)
        heads = self.ragged.heads
        self.lanes = [list(self.lanes[b * heads + h]) for b in index for h in range(heads)]

    @precondition(lambda self: self.ragged.fields)
    @rule(spare=st.integers(1, 9))
    def reserve(self, spare):
        self.ragged.reserve(spare)
        assert all(cap >= n + spare for cap, n in zip(self.ragged.caps, self.ragged.lens))

    @rule()
    def fork(self):
        """Go on with a clone; the original must not change any more."""
        self.other = (self.ragged, copy.deepcopy(self.lanes))
        self.ragged = self.ragged.clone()

    @precondition(lambda self: self.ragged.fields)
    @rule(seed=st.integers(0, 999))
    def add_field(self, seed):
        """A field added late is filled for the rows there are, then dropped again."""
        shape = (self.ragged.batch, self.ragged.heads, self.ragged.longest, 2)
        like = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
        self.ragged.add_field("late", like)
        for lane, n in enumerate(self.ragged.lens):
            assert torch.equal(self.ragged.lane("late", lane), like.flatten(0, 1)[lane, :n])
        del self.ragged.fields["late"]

    @staticmethod
    def check(ragged: Ragged, lanes: list[list[int]]) -> None:
        assert ragged.lens == [len(lane) for lane in lanes]
        assert ragged.longest == max(ragged.lens) and ragged.lanes == ragged.batch * ragged.heads == len(lanes)
        assert ragged.level == (len(set(ragged.lens)) == 1)
        assert all(cap >= n for cap, n in zip(ragged.caps, ragged.lens))
        ends = [s + c for s, c in zip(ragged.starts, ragged.caps)]
        assert all(end <= start for end, start in zip(ends, ragged.starts[1:])), "lanes overlap"
        if not ragged.fields:
            assert ragged.live_bytes == ragged.allocated_bytes == 0
            return
        want = [torch.tensor(lane, dtype=torch.int32) for lane in lanes]
        padded = ragged.padded("id").flatten(0, 1)
        for lane, ids in enumerate(want):
            assert torch.equal(ragged.lane("id", lane), ids)
            assert torch.equal(padded[lane, : len(ids)], ids)
            assert torch.equal(ragged.lane("x", lane)[:, 1], ids * 0.5)
        valid = ragged.valid(padded.device)
        if valid is not None:
            assert valid.flatten(0, 1).sum(-1).tolist() == ragged.lens
        # I10: what is reported is what the tensors hold
        assert not sum(ragged.caps) or ragged.row_bytes == 3 * 4 + 4
        assert ragged.live_bytes == sum(ragged.lens) * 16
        assert ragged.allocated_bytes == sum(f.untyped_storage().nbytes() for f in ragged.fields.values())
        assert ragged.allocated_bytes == sum(ragged.caps) * 16

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "ragged"):
            return
        self.check(self.ragged, self.lanes)
        if self.other is not None:
            self.check(*self.other)


RaggedMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
TestRagged = RaggedMachine.TestCase


def test_storage_shrinks_when_rows_leave():
    """I10: dropping rows gives their memory back at once."""
    ragged = Ragged(1, 2)
    ragged.append({"x": torch.zeros(1, 2, 1000, 16)})
    before = ragged.allocated_bytes
    old = ragged.fields["x"].untyped_storage().data_ptr()
    ragged.keep(torch.arange(1000).expand(1, 2, -1) < 100)
    assert ragged.allocated_bytes * 10 == before
    assert ragged.fields["x"].untyped_storage().data_ptr() != old


def test_uneven_lanes_spend_nothing_on_padding():
    ragged = Ragged(1, 2)
    ragged.append({"x": torch.zeros(1, 2, 100, 4)})
    ragged.keep(torch.stack([torch.arange(100) < 90, torch.arange(100) < 10])[None])
    assert ragged.allocated_bytes == (90 + 10) * 16 and not ragged.dense
