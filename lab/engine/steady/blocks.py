"""Steps in place for keys coded by blocks and values one by one behind a window of exact rows (KIVI's layout).

The window is a ring of residual + 1 rows. Each step writes the newest row over the one whose value was coded last; the oldest
value in the ring is then coded. Keys are coded `residual` at a time; until their value has left the ring too, the ring holds
them as decoded, so that a row is always on one side: key and value both coded, or both in the ring.
"""

from __future__ import annotations

import torch

from kernels import encode
from kernels.decode import TierView
from lab.engine.steady.exact import int32
from lab.engine.steady.plan import Unfit
from lab.engine.steady.rows import AFFINE
from lab.engine.steady.step import SPARE, Step


class Blocks(Step):
    orderly = False

    def __init__(self, policy, store, clock=None) -> None:
        super().__init__(policy, store, clock)
        self.residual = store.exact_v.rows.lens[0]
        self.size = self.residual + 1
        self.coded_k, self.coded_v = store.coded_k[0], store.coded_v[0]
        self.block = self.coded_k.codec.block
        if self.bias is not None and self.bias[0] >= self.ahead + self.n:
            raise Unfit("the stack edits an entry whose value is not coded yet")
        self._fill()
        self.turn = 0  # where the next row goes; the oldest row stands behind it
        room = SPARE if clock is None else clock.room
        self._room(room)
        if clock is not None:
            self._places(clock, room)

    @property
    def n(self) -> int:
        """Rows with both key and value coded."""
        return self.coded_v.rows.lens[0]

    def _fill(self) -> None:
        """Lay the last `residual` rows out as the ring, oldest first, behind the place of the next row."""
        store, lanes = self.store, self.lanes
        keys = self.coded_k.newest(self.residual).to(store.dtype)
        if store.exact_k.rows.lens[0]:
            keys = torch.cat([keys, store.exact_k.rows.padded("x")], 2)[:, :, -self.residual :]
        values = store.exact_v.rows.padded("x")
        for rows, x in ((store.exact_k.rows, keys), (store.exact_v.rows, values)):
            held, width = list(rows.lens), x.shape[-1]
            ring = x.new_zeros(lanes, self.size, width)
            ring[:, 1:] = x.reshape(lanes, self.residual, width)
            rows.fields["x"] = ring.view(lanes * self.size, width)
            rows.caps, rows.starts, rows.lens = [self.size] * lanes, [i * self.size for i in range(lanes)], held
        self.keys, self.values = (s.rows.fields["x"].view(lanes, self.size, -1) for s in (store.exact_k, store.exact_v))

    def _room(self, spare: int) -> None:
        """Room for `spare` more rows on both coded sides, alike."""
        capacity = -(-(max(self.coded_k.rows.lens[0], self.n) + spare + self.residual) // self.block) * self.block
        self.coded_k.rows.resize(capacity)
        self.coded_v.rows.resize(capacity)
        self.coded_k.blocks.resize(capacity // self.block)
        self.capacity = capacity
        self.fields_k, self.fields_b, self.fields_v = (
            {n: rows.whole(n) for n in rows.fields} for rows in (self.coded_k.rows, self.coded_k.blocks, self.coded_v.rows))
        self.arrays = None
        if self.clock is None and hasattr(self.coded_v.codec, "encode_few"):
            self.arrays = {n: x.numpy() for n, x in self.fields_v.items()}

    def _places(self, clock, room: int) -> None:
        store, device = self.store, self.store.device
        k, b, v = self.coded_k.rows.fields, self.coded_k.blocks.fields, self.coded_v.rows.fields
        affine = set(k) == {"codes", "block"} and set(b) == AFFINE - {"codes"} and set(v) == AFFINE
        if not affine or self.coded_k.bits != self.coded_v.bits or k["codes"].shape != v["codes"].shape:
            raise Unfit("the stack codes entries while decoding, in a code without a kernel")
        group = torch.arange(self.lanes * self.capacity, device=device, dtype=torch.int32) // self.block
        starts = int32(self.coded_v.rows.starts, device)
        coded = TierView(
            self.coded_v.bits, k["codes"], v["codes"], starts, int32([self.n] * self.lanes, device), self.capacity,
            k_scale=b["scale"], k_zero=b["zero"], v_scale=v["scale"], v_zero=v["zero"], k_group=group,
            k_block=self.block if self.block >= 32 else 0,
        )
        if self.common is None:
            coded.bias = self.bias_of(coded)
        ring = TierView(
            16, store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"], int32(store.exact_k.rows.starts, device),
            int32([self.size] * self.lanes, device), self.size,
        )
        self.tiers = [coded, ring] if self.common is None else [coded, ring, self.common_tier()]
        self.slot, self.oldest = clock.ring(self.size, self.lanes)
        clock.count(coded, "length")
        self.slot_coded = torch.tensor([s + self.n for s in self.coded_v.rows.starts], device=device)
        clock.count(self, "slot_coded")
        if store.meta is not None:
            store.meta.reserve(room)
            self.tag = torch.tensor([s + n for s, n in zip(store.meta.starts, store.meta.lens)], device=device)
            clock.count(self, "tag")

    def common_tier(self) -> TierView:
        key, value = self.common.views["key"][0], self.common.views["value"][0]
        k, b, v, device = key.rows, key.blocks.fields, value.rows.fields, self.store.device
        tier = TierView(
            key.bits, k.fields["codes"], v["codes"], int32(k.starts, device), int32(k.lens, device), max(k.lens),
            k_scale=b["scale"], k_zero=b["zero"], v_scale=v["scale"], v_zero=v["zero"],
            k_group=torch.arange(k.fields["codes"].shape[0], device=device, dtype=torch.int32) // self.block,
            k_block=self.block if self.block >= 32 else 0,
        )
        tier.bias = self.bias_of(tier)
        return tier

    def write(self, handle) -> None:
        store, meta = self.store, self.store.meta
        if self.clock is not None:
            self.write_at(handle)
            return
        at = self.turn
        self.keys[:, at : at + 1] = handle.k.reshape(self.lanes, 1, -1)
        self.values[:, at : at + 1] = handle.v.reshape(self.lanes, 1, -1)
        if meta is not None:
            held = meta.lens[0]
            if held >= meta.caps[0]:
                meta.reserve(SPARE)
            for name in meta.fields:
                meta.whole(name)[:, :, held] = store.seen if name == "pos" else 0

    def read(self, q, call):
        if self.clock is not None:
            return self.by_kernel(q, call, False)[0], None
        rows, n = self.packed(q), self.n
        shape = (self.batch, self.heads, self.size, -1)
        keys, values = self.keys.view(shape), self.values.view(shape)
        blocks = -(-n // self.block)
        codes = {name: x[:, :, : blocks * self.block] for name, x in self.fields_k.items()}
        parts = [] if self.common is None else [self.common.views["key"][0].logits(rows)]
        if n or self.common is None:
            own = self.coded_k.codec.logits(rows, codes, {name: x[:, :, :blocks] for name, x in self.fields_b.items()}, True)
            parts.append(own[..., :n])
        s = torch.cat([*parts, rows @ keys.mT], -1).float().mul_(call.scale)
        p = torch.softmax(self.add_bias(s), -1).to(self.store.dtype)
        first, last = self.ahead, self.ahead + n
        mixed = 0 if self.common is None else self.common.views["value"][0].mix(p[..., :first])
        if n or self.common is None:
            mixed = mixed + self.coded_v.codec.mix(p[..., first:last], {name: x[:, :, :n] for name, x in self.fields_v.items()})
        return self.flat(mixed.to(values.dtype) + p[..., last:] @ values), None

    def change(self, q, mass) -> None:
        coded = self.coded_v
        if self.clock is None:
            old = (self.turn + 1) % self.size
            if self.arrays is not None:
                leaving = self.values[:, old].float().numpy().reshape(self.batch, self.heads, -1)
                for name, x in coded.codec.encode_few(leaving).items():
                    self.arrays[name][:, :, self.n] = x
                return
            for name, x in coded.codec.encode(self.values[None, :, old : old + 1], None)[0].items():
                self.fields_v[name][:, :, self.n] = x.view(self.batch, self.heads, -1)
            return
        values, fields = self.store.exact_v.rows.fields["x"], coded.rows.fields
        if values.is_cuda:
            group = values.shape[-1] // fields["scale"].shape[-1]
            outs = [(fields["codes"], fields["scale"], fields["zero"])]
            encode.encode_sides([values], coded.bits, group, outs, self.slot_coded, source=self.oldest)
            return
        for name, x in coded.codec.encode(values.index_select(0, self.oldest)[None, :, None], None)[0].items():
            fields[name].index_copy_(0, self.slot_coded, x[0, :, 0])

    def count(self) -> None:
        store = self.store
        self.turn = (self.turn + 1) % self.size
        key = store.exact_k.rows
        key.lens = [key.lens[0] + 1] * self.lanes
        self.coded_v.rows.lens = [self.n + 1] * self.lanes
        if store.meta is not None:
            store.meta.lens = [n + 1 for n in store.meta.lens]
        store.seen += 1
        store.last_read, store.last_probe = (self.n + self.residual) * self.lanes + self.shared, 0
        if key.lens[0] == self.residual:
            self._code_keys()
        if self.clock is None and self.n >= self.capacity - 1:
            self._room(SPARE)

    def _order(self, count: int) -> list[int]:
        """Places of the newest `count` rows, oldest first."""
        return [(self.turn - count + i) % self.size for i in range(count)]

    def _code_keys(self) -> None:
        """Code the exact keys, all `residual` of them, and leave them in the ring as decoded."""
        store = self.store
        shape = (self.batch, self.heads, self.residual, -1)
        order = torch.tensor(self._order(self.residual), device=store.device)
        x = self.keys.index_select(1, order).view(shape)
        first = self.coded_k.rows.lens[0]
        pos = self._positions(first, self.residual)
        self.coded_k.append(x, pos)
        store.exact_k.rows.lens = [0] * self.lanes
        if store._history is not None:
            store._history.coded(pos, self.coded_k.bits, store.seen - 1)
        rows = {name: self.coded_k.rows.whole(name)[:, :, first : first + self.residual] for name in self.coded_k.rows.fields}
        decoded = self.coded_k.codec.decode(rows, self.coded_k._per_row(rows.pop("block")), pos)
        self.keys.index_copy_(1, order, decoded.to(self.keys.dtype).reshape(self.lanes, self.residual, -1))

    def _positions(self, first: int, count: int) -> torch.Tensor:
        """Positions int64 [B,Hk,count] of logical entries from `first` on, common ones not counted."""
        store, first = self.store, first + self.ahead
        if self.common is not None and store.meta is not None:
            return store.positions()[:, :, first : first + count]
        if store.meta is not None:
            return store.meta.whole("pos")[:, :, first : first + count].long()
        line = torch.arange(store.base + first, store.base + first + count, device=store.device)
        return line.expand(self.batch, self.heads, -1)

    def settle(self, target) -> None:
        for rows, count in ((target.exact_k.rows, target.exact_k.rows.lens[0]), (target.exact_v.rows, self.residual)):
            ring = rows.fields["x"].view(self.lanes, self.size, -1)
            order = torch.tensor(self._order(count), device=ring.device, dtype=torch.int64)
            ring[:, :count] = ring.index_select(1, order)

