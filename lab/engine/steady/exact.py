"""Steps in place over exact rows: lanes that grow, and lanes at their budget, where one entry leaves for each that comes."""

from __future__ import annotations

import torch

from kernels import encode
from kernels.decode import TierView
from lab.engine.steady.diary import Diary
from lab.engine.steady.plan import evicts
from lab.engine.steady.step import SPARE, Step, level_views


class Growing(Step):
    """Every row is kept: dense attention, prompts compressed once, sparse prefill, standing edits and gates."""

    changes = False

    def __init__(self, policy, store, clock=None) -> None:
        super().__init__(policy, store, clock)
        k, v, meta = self._parts()
        if clock is None:
            return
        for rows in filter(None, (k, v, meta)):
            rows.reserve(clock.room)
        device = store.device
        ends = lambda rows: torch.tensor([s + n for s, n in zip(rows.starts, rows.lens)], device=device)  # noqa: E731
        self.slot = ends(k)
        self.tiers = [TierView(
            16, k.fields["x"], v.fields["x"], int32(k.starts, device), int32([n + 1 for n in k.lens], device), max(k.caps))]
        clock.count(self, "slot")
        clock.count(self.tiers[0], "length")
        if self.common is None:
            self.tiers[0].bias = self.bias_of(self.tiers[0])
        else:
            self.tiers.append(self.common_tier())
        if meta is not None:
            self.tag = ends(meta)
            clock.count(self, "tag")

    def _parts(self):
        return self.store.exact_k.rows, self.store.exact_v.rows, self.store.meta

    def write(self, handle) -> None:
        k, v, meta = self._parts()
        if self.clock is not None:
            self.write_at(handle)
            return
        n = k.lens[0]
        for rows in filter(None, (k, v, meta)):
            if rows.lens[0] >= rows.caps[0]:
                rows.reserve(SPARE)
        k.whole("x")[:, :, n : n + 1] = handle.k
        v.whole("x")[:, :, n : n + 1] = handle.v
        if meta is not None:
            for name in meta.fields:
                meta.whole(name)[:, :, meta.lens[0]] = self.store.seen if name == "pos" else 0

    def read(self, q, call):
        if self.clock is not None:
            return self.by_kernel(q, call, False)[0], None
        k, v, _ = self._parts()
        n = k.lens[0] + 1
        return self.flat(self.attend_exact(q, k.whole("x")[:, :, :n], v.whole("x")[:, :, :n], call, False)[0]), None

    def count(self) -> None:
        for rows in filter(None, self._parts()):
            rows.lens = [n + 1 for n in rows.lens]
        self.store.seen += 1
        self.store.last_read = self.shared + sum(self.store.exact_k.rows.lens)
        self.store.last_probe = 0


class Evicting(Step):
    """Lanes at their budget of n entries: the new row is entry n, the one with the lowest score leaves, and the new row takes its
    place, as ordinary steps have it. Where the oldest always leaves, a CPU only turns a ring."""

    def __init__(self, policy, store, clock=None) -> None:
        super().__init__(policy, store, clock)
        assert evicts(policy)
        self.n = n = store.counts[0]
        self.first, self.last = policy.scorer.protected(store.budget, self.ctx.prompt)
        self.want_mass = policy.want_mass or policy.want_now
        meta = store.meta
        if policy.want_mass:
            store.attribute("mass")
        self.stat_name = next((name for name in meta.fields if name != "pos"), None)
        capacity = n + 1
        (self.tags,) = level_views(meta, capacity, "pos")
        self.stat = level_views(meta, capacity, self.stat_name)[0] if self.stat_name else None
        self.tags[:, n] = store.seen
        if self.stat is not None:
            self.stat[:, n] = 0
        self.ring = self._ring() if policy.scorer.oldest_leaves and clock is None else None
        self.turn = 0
        self.turning: encode.Front | None = None
        self.diary = Diary(self.lanes, store, clock) if store._history is not None else None
        self._hold(capacity)

    @property
    def orderly(self) -> bool:
        return not self.front

    def _hold(self, capacity: int) -> None:
        """Where the rows lie."""
        store, n = self.store, self.n
        (self.keys,) = level_views(store.exact_k.rows, capacity, "x")
        (self.values,) = level_views(store.exact_v.rows, capacity, "x")
        if self.front:
            self.base = self.keys[:, : self.front].to(torch.float32, copy=True)
            self.quarter = self.ctx.rope.quarter(self.base)
            if self.clock is not None:  # a table of all steps to come; the kernel that drops an entry turns the rows for the next
                ahead = torch.arange(self.clock.room + 2, device=store.device).float()[:, None]
                waves = self.ctx.rope.wave(ahead + (store.seen - n), self.base.shape[-1])
                self.turning = encode.Front(self.base, self.quarter, *waves)
                self.turn_front()
        if self.clock is not None:
            k, device = store.exact_k.rows, store.device
            self.slot = torch.arange(self.lanes, device=device) * capacity + n
            self.tiers = [TierView(
                16, k.fields["x"], store.exact_v.rows.fields["x"], int32(k.starts, device), int32([n + 1] * self.lanes, device),
                capacity)]
            self.tiers[0].bias = self.bias_of(self.tiers[0])

    def _ring(self) -> list[int] | None:
        """Places of the entries that may leave, oldest first, where they are the same in every lane."""
        pos = self.tags[:, : self.n]
        if not bool((pos == pos[:1]).all()):
            return None
        line = pos[0].tolist()
        ring = sorted((i for i, p in enumerate(line) if p >= self.first), key=line.__getitem__)
        return ring if len(ring) >= max(1, self.last) else None

    def write(self, handle) -> None:
        n = self.n
        self.keys[:, n : n + 1] = handle.k.reshape(self.lanes, 1, -1)
        self.values[:, n : n + 1] = handle.v.reshape(self.lanes, 1, -1)

    def turn_front(self) -> None:
        """Turn the entries in front to right before the rest: their keys as they came, rotated by what lies between."""
        cos, sin = self.ctx.rope.gap(self.store.seen - self.n, self.base.shape[-1])
        self.keys[:, : self.front] = torch.addcmul(self.base * cos, self.quarter, sin)

    def read(self, q, call):
        n = self.n + 1
        if self.front and self.clock is None:
            self.turn_front()
        if self.clock is not None:
            out, mass = self.by_kernel(q, call, self.want_mass)
            return out, mass[0].view(self.batch, self.heads, -1)[:, :, :n] if self.want_mass else None
        shape = (self.batch, self.heads, n)
        keys, values = self.keys[:, :n].view(*shape, -1), self.values[:, :n].view(*shape, -1)
        out, mass = self.attend_exact(q, keys, values, call, self.want_mass)
        return self.flat(out), mass

    def change(self, q, mass) -> None:
        if self.ring is not None:
            place = self.ring[self.turn]
            self.turn = (self.turn + 1) % len(self.ring)
            if self.diary is not None:
                self.diary.left(self.tags[:, place])
            self.keys[:, place] = self.keys[:, self.n]
            self.values[:, place] = self.values[:, self.n]
            self.tags[:, place] = self.store.seen
            return
        self.drop(q, mass, (self.keys, self.values))

    def drop(self, q, mass, rows) -> torch.Tensor:
        """Add up the row's attention, score, and let one entry of each lane go: int64 [lanes], the place it had."""
        ctx, n = self.ctx, self.n + 1
        scorer, score, add = self.policy.scorer, None, None
        if self.policy.want_mass:
            add = mass.reshape(self.lanes, n)
            if not scorer.lightest_leaves:
                self.stat[:, :n] += add
                add = None
        if add is None and not scorer.oldest_leaves:
            ctx.q, ctx.now, ctx.first = q, mass, self.store.seen
            self._visible(True)
            score = scorer.score(ctx).reshape(self.lanes, n)
            self._visible(False)
            score = score if score.stride(-1) == 1 else score.contiguous()
        diary = self.diary
        return encode.evict(
            self.tags, n, self.first, self.last, score=score, stat=self.stat, rows=rows, log=diary.log if diary else None,
            step=self.clock.step if self.clock is not None else diary.step if diary else None, front=self.turning, add=add,
        )

    def _visible(self, shown: bool) -> None:
        """Whether techniques see the new row among the stored entries."""
        for rows in (self.store.exact_k.rows, self.store.exact_v.rows, self.store.meta):
            rows.lens = [self.n + shown] * self.lanes

    def count(self) -> None:
        store = self.store
        if self.diary is not None:
            self.diary.turned(store)
        store.seen += 1
        store.last_read, store.last_probe = (self.n + 1) * self.lanes, 0

    def settle(self, target) -> None:
        self.note(target)
        if self.front:
            target.exact_k.rows.whole("x")[:, :, : self.front] = self.base.view(self.batch, self.heads, self.front, -1)

    def note(self, target) -> None:
        if self.diary is not None:
            self.diary.write(target)

    def changed(self) -> list[torch.Tensor]:
        return [x for x in (self.tags, self.stat, self.keys, self.values) if x is not None]


def int32(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
