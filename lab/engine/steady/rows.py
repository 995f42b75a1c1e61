"""Steps in place where every row is coded by itself as soon as it has attended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kernels import encode
from kernels.decode import TierView
from lab.engine.steady.exact import Evicting, int32
from lab.engine.steady.step import SPARE, Step

AFFINE = {"codes", "scale", "zero"}  # what the decode and encode kernels read


class _Coded:
    """What coding steps share: the coded tier of both sides, and the one exact row of this step."""

    def lay(self, capacity: int) -> None:
        """Room for one exact row per lane and `capacity` coded ones, alike on both sides."""
        store = self.store
        self.coded_k, self.coded_v = store.coded_k[0], store.coded_v[0]
        for rows in (store.exact_k.rows, store.exact_v.rows):
            rows.resize(1)
        for rows in (self.coded_k.rows, self.coded_v.rows):
            rows.resize(capacity)
        self.together = self.coded_k.codec == self.coded_v.codec and (
            store.exact_k.rows.fields["x"].shape == store.exact_v.rows.fields["x"].shape)
        self.wide()

    def views(self, held: int, capacity: int) -> None:
        """The tiers as the kernel reads them: `held` coded rows per lane, and the newest row.

        Where the kernel does not know the code, or vectors are turned, every step decodes all rows into a tier that lives as
        long as the layer attends (`by_kernel`).
        """
        store, device = self.store, self.store.device
        k, v = self.coded_k.rows.fields, self.coded_v.rows.fields
        known = set(k) == set(v) == AFFINE and self.coded_k.bits == self.coded_v.bits and k["codes"].shape == v["codes"].shape
        self.known = known and not any(hasattr(c.codec, "turn") for c in (self.coded_k, self.coded_v))
        starts, length = int32(self.coded_k.rows.starts, device), int32([held] * self.lanes, device)
        if self.known:
            coded = TierView(
                self.coded_k.bits, k["codes"], v["codes"], starts, length, capacity, k_scale=k["scale"], k_zero=k["zero"],
                v_scale=v["scale"], v_zero=v["zero"],
            )
        else:
            coded = TierView(16, k["codes"], v["codes"], starts, length, capacity)
        if self.common is None:
            coded.bias = self.bias_of(coded)
        one = int32([1] * self.lanes, device)
        lanes = torch.arange(self.lanes, device=device)
        self.tiers = [coded, TierView(16, store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"], lanes.int(), one, 1)]
        if self.common is not None:
            self.tiers.append(self.common_tier())
        self.slot = lanes

    def by_kernel(self, q, call, want_mass):
        if self.known:
            return super().by_kernel(q, call, want_mass)
        k, v = (
            self._decoded(c.codec, fields).flatten(0, 2)
            for c, fields in ((self.coded_k, self.fields_k), (self.coded_v, self.fields_v))
        )
        return super().by_kernel(q, call, want_mass, [replace(self.tiers[0], k=k, v=v), *self.tiers[1:]])

    def _decoded(self, codec, fields: dict) -> torch.Tensor:
        """All rows of one side in the cache's dtype, [B,Hk,capacity,d]."""
        quick = getattr(codec, "decode_as", None)
        return codec.decode(fields, {}, None).to(self.store.dtype) if quick is None else quick(self.store.dtype, fields)

    def write(self, handle) -> None:
        store = self.store
        store.exact_k.rows.fields["x"].copy_(handle.k.reshape(self.lanes, -1))
        store.exact_v.rows.fields["x"].copy_(handle.v.reshape(self.lanes, -1))

    def wide(self) -> None:
        """Look the storage up once; again after it has been given more room."""
        self.fields_k, self.fields_v = ({n: c.rows.whole(n) for n in c.rows.fields} for c in (self.coded_k, self.coded_v))
        self.arrays = None
        if self.clock is None and hasattr(self.coded_k.codec, "encode_few") and self.together:
            self.arrays = [{n: x.numpy() for n, x in fields.items()} for fields in (self.fields_k, self.fields_v)]

    def read_codes(self, q, call, n: int):
        """(out [B,Hk,G,d], weights [B,Hk,G,n+1] float32) over n coded rows and the newest, in torch."""
        store, rows = self.store, self.packed(q)
        shape = (self.batch, self.heads, 1, -1)
        key, value = store.exact_k.rows.fields["x"].view(shape), store.exact_v.rows.fields["x"].view(shape)
        codes_k, codes_v = ({name: x[:, :, :n] for name, x in fields.items()} for fields in (self.fields_k, self.fields_v))
        parts = [] if self.common is None else [self.common.views["key"][0].logits(rows)]
        if n or self.common is None:
            s = self.coded_k.codec.logits(rows, codes_k, {}, True)
            parts.append(rows @ self.coded_k.codec.decode(codes_k, {}, None).to(rows.dtype).mT if s is None else s)
        s = torch.cat([*parts, rows @ key.mT], -1).float().mul_(call.scale)
        p = torch.softmax(self.add_bias(s), -1)
        weights, first, last = p.to(store.dtype), self.ahead, self.ahead + n
        mixed = 0 if self.common is None else self.common.views["value"][0].mix(weights[..., :first])
        if n or self.common is None:
            mixed = mixed + self.coded_v.codec.mix(weights[..., first:last], codes_v)
        return torch.addcmul(mixed.to(value.dtype), weights[..., last:], value), p

    def encoded(self) -> tuple[dict, dict]:
        """The newest row's codes: fields [lanes, ...] of keys and of values."""
        key, value = self.store.exact_k.rows.fields["x"], self.store.exact_v.rows.fields["x"]
        if self.together:
            both, _ = self.coded_k.codec.encode(torch.stack([key, value]).unsqueeze(2), None)
            return {n: x[0, :, 0] for n, x in both.items()}, {n: x[1, :, 0] for n, x in both.items()}
        found = [c.codec.encode(x.unsqueeze(0).unsqueeze(2), None)[0] for c, x in ((self.coded_k, key), (self.coded_v, value))]
        return tuple({n: x[0, :, 0] for n, x in fields.items()} for fields in found)

    def note_codes(self, target) -> bool:
        """Tell the target's history that rows since the first step are coded; whether there was anything to tell."""
        history, seen = target._history, target.seen
        if history is None or seen <= self.first_row:
            return False
        bits, _, demoted = history.upto(seen)
        bits[..., self.first_row : seen] = self.coded_k.bits
        demoted[..., self.first_row : seen] = torch.arange(self.first_row, seen, dtype=torch.int32) + 1
        return True

    def encode_at(self, place: torch.Tensor, capacity: int = 0) -> None:
        """Code the newest row of each lane into rows place int64 [lanes] of its `capacity`, or flat rows without one."""
        exact = [self.store.exact_k.rows.fields["x"], self.store.exact_v.rows.fields["x"]]
        held = [self.coded_k.rows.fields, self.coded_v.rows.fields]
        if place.is_cuda and self.known:
            group = exact[0].shape[-1] // held[0]["scale"].shape[-1]
            outs = [(fields["codes"], fields["scale"], fields["zero"]) for fields in held]
            encode.encode_sides(exact, self.coded_k.bits, group, outs, place, stride=capacity)
            return
        flat = place + torch.arange(self.lanes, device=place.device) * capacity if capacity else place
        codecs = [self.coded_k.codec, self.coded_v.codec]
        if place.is_cuda and all(hasattr(codec, "encode_into") for codec in codecs):
            for codec, x, fields in zip(codecs, exact, held):
                codec.encode_into(x, fields, flat)
            return
        for fields, found in zip(held, self.encoded()):
            for name, x in found.items():
                fields[name].index_copy_(0, flat, x)


class CodedRows(_Coded, Step):
    """All rows are kept, coded."""

    def __init__(self, policy, store, clock=None) -> None:
        super().__init__(policy, store, clock)
        self.n = store.coded_k[0].rows.lens[0]
        room = SPARE if clock is None else clock.room
        self.lay(self.n + room)
        self.first_row = store.seen
        if clock is None:
            return
        self.views(self.n, self.n + room)
        clock.count(self.tiers[0], "length")
        self.slot_coded = torch.tensor([s + self.n for s in self.coded_k.rows.starts], device=store.device)
        clock.count(self, "slot_coded")
        if store.meta is not None:
            store.meta.reserve(room)
            self.tag = torch.tensor([s + n for s, n in zip(store.meta.starts, store.meta.lens)], device=store.device)
            clock.count(self, "tag")

    def write(self, handle) -> None:
        if self.clock is not None:
            self.write_at(handle)
            return
        super().write(handle)
        meta = self.store.meta
        if meta is None:
            return
        held = meta.lens[0]
        if held >= meta.caps[0]:
            meta.reserve(SPARE)
        for name in meta.fields:
            meta.whole(name)[:, :, held] = self.store.seen if name == "pos" else 0

    def read(self, q, call):
        if self.clock is not None:
            return self.by_kernel(q, call, False)[0], None
        return self.flat(self.read_codes(q, call, self.n)[0]), None

    def change(self, q, mass) -> None:
        if self.clock is not None:
            self.encode_at(self.slot_coded)
            return
        if self.n >= self.coded_k.rows.caps[0]:
            for coded in (self.coded_k, self.coded_v):
                coded.rows.resize(self.n + SPARE)
            self.wide()
        if self.arrays is not None:
            shape = (self.batch, self.heads, -1)
            both = [s.rows.fields["x"].float().view(shape).numpy() for s in (self.store.exact_k, self.store.exact_v)]
            for name, x in self.coded_k.codec.encode_few(np.stack(both)).items():
                self.arrays[0][name][:, :, self.n], self.arrays[1][name][:, :, self.n] = x
            return
        for held, fields in zip((self.fields_k, self.fields_v), self.encoded()):
            for name, x in fields.items():
                held[name][:, :, self.n] = x.view(self.batch, self.heads, -1)

    def count(self) -> None:
        store = self.store
        self.n += 1
        for rows in (self.coded_k.rows, self.coded_v.rows):
            rows.lens = [self.n] * self.lanes
        if store.meta is not None:
            store.meta.lens = [n + 1 for n in store.meta.lens]
        store.seen += 1
        store.last_read, store.last_probe = self.n * self.lanes + self.shared, 0

    def settle(self, target) -> None:
        self.note(target)

    def note(self, target) -> None:
        self.note_codes(target)


class CodedEvicting(_Coded, Evicting):
    """Lanes at their budget, coded: the newest row's codes take the place of the entry that leaves."""

    def _hold(self, capacity: int) -> None:
        self.lay(capacity)
        self.first_row = self.store.seen
        self.ring = None
        if self.clock is not None:
            self.views(self.n, capacity)

    def write(self, handle) -> None:
        _Coded.write(self, handle)

    def read(self, q, call):
        n = self.n
        if self.clock is None:
            out, p = self.read_codes(q, call, n)
            return self.flat(out), p.sum(2) if self.want_mass else None
        out, mass = self.by_kernel(q, call, self.want_mass)
        if not self.want_mass:
            return out, None
        shape = (self.batch, self.heads)
        return out, torch.cat([mass[0].view(*shape, -1)[:, :, :n], mass[1].view(*shape, 1)], -1)

    def change(self, q, mass) -> None:
        # where the newest itself leaves its codes go to the spare row behind the held ones
        self.encode_at(self.drop(q, mass, ()), self.n + 1)

    def _visible(self, shown: bool) -> None:
        store = self.store
        store.exact_k.rows.lens = store.exact_v.rows.lens = [int(shown)] * self.lanes
        store.meta.lens = [self.n + shown] * self.lanes

    def note(self, target) -> None:
        if self.note_codes(target):
            super().note(target)

    def changed(self) -> list[torch.Tensor]:
        coded = [x for c in (self.coded_k, self.coded_v) for x in c.rows.fields.values()]
        return [x for x in (self.tags, self.stat, *coded) if x is not None]
