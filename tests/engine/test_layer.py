"""One layer's cache against a model of it: per lane a list of entries (position, key, value, bits, statistic).

Random sequences of append, keep, drop_one, code, narrow, repeat, clone and reorder, in one or more sequences, with lanes
that differ in length. After every step everything readable agrees with the model, and bytes are those of the tensors (I10).
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lab.engine.common import joined
from lab.engine.history import NEVER, History
from lab.engine.layer import LabLayer
from lab.engine.tiers import held_bits, narrow, replace
from lab.errors import LabError
from lab.techniques.int_codes import TokenCodec
from lab.techniques.kivi import ChannelCodec

DIM, BLOCK, MOST = 8, 4, 28


def storage_bytes(layer: LabLayer) -> int:
    """Bytes of every tensor that holds entries, found by walking the object, not by asking it."""
    found: dict[int, int] = {}

    def walk(x, depth=0):
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            [walk(v, depth + 1) for v in x.values()]
        elif isinstance(x, (list, tuple)):
            [walk(v, depth + 1) for v in x]
        elif hasattr(x, "__dict__") and depth < 12 and not isinstance(x, History):
            walk(vars(x), depth + 1)

    walk({n: v for n, v in vars(layer).items() if n not in ("history", "policy", "queries", "budget")})
    return sum(size for pointer, size in found.items() if pointer)


class LayerMachine(RuleBasedStateMachine):
    """`mode` fixes how entries are narrowed: from the front on each side (encode), or one by one (tiers)."""

    @initialize(
        batch=st.integers(1, 2), heads=st.integers(1, 3), mode=st.sampled_from(["token", "channel", "sinks", "tiers"]),
        reserve=st.sampled_from([0, 40]), slack=st.integers(0, 3),
    )
    def start(self, batch, heads, mode, reserve, slack):
        self.layer = LabLayer(0, reserve, track=True, slack=slack)
        self.layer.history = History(batch, heads, 8)
        self.batch, self.heads, self.mode = batch, heads, mode
        self.lanes: list[list[dict]] = [[] for _ in range(batch * heads)]
        self.fate: list[dict] = [{} for _ in self.lanes]  # position -> (death, demoted, bits)
        self.seen, self.others = 0, []
        self.places = [0] * batch  # next position per sequence: padding is not counted
        block = 1 if mode != "channel" else BLOCK
        self.key_codec = ChannelCodec(4, BLOCK) if block > 1 else TokenCodec(4, DIM)
        self.value_codec = TokenCodec(4, DIM)

    @property
    def started(self) -> bool:
        return self.layer.is_initialized

    def split(self, x: torch.Tensor):
        """[B, Hk, ...] -> one per lane."""
        return list(x.flatten(0, 1))

    # -- growth ----------------------------------------------------------------------------------------------------
    @rule(count=st.integers(1, 7), seed=st.integers(0, 9999), padded=st.booleans())
    def append(self, count, seed, padded):
        if max(map(len, self.lanes)) + count > MOST:
            return
        g = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(self.batch, self.heads, count, DIM, generator=g) for _ in range(2))
        keep = torch.ones(self.batch, count, dtype=torch.bool)
        if padded and self.seen == 0:  # padding stands before a sequence's first token
            for b in range(self.batch):
                keep[b, : int(torch.randint(count, (1,), generator=g))] = False
        pos = torch.full((self.batch, count), -1)
        for b in range(self.batch):
            n = int(keep[b].sum())
            pos[b, count - n :] = torch.arange(self.places[b], self.places[b] + n)
            self.places[b] += n
        self.layer.update(k, v)
        self.layer.append(k, v, pos, None if bool(keep.all()) else keep)
        self.seen += count
        for lane, (ks, vs) in enumerate(zip(self.split(k), self.split(v))):
            for t in keep[lane // self.heads].nonzero().flatten().tolist():
                entry = dict(pos=int(pos[lane // self.heads, t]), k=ks[t], v=vs[t], kbits=16, vbits=16, mass=0.0)
                self.lanes[lane].append(entry)
                self.fate[lane][entry["pos"]] = (NEVER, NEVER, 16)

    @precondition(lambda self: self.started)
    @rule(seed=st.integers(0, 9999))
    def statistic(self, seed):
        """What H2O does: add this step's mass to every entry."""
        now = self.layer.attribute("mass")
        add = torch.rand(now.shape, generator=torch.Generator().manual_seed(seed))
        self.layer.set_attribute("mass", now + add)
        for lane, new in zip(self.lanes, self.split(add)):
            for entry, x in zip(lane, new.tolist()):
                entry["mass"] += x

    # -- losses ----------------------------------------------------------------------------------------------------
    def died(self, lane: int, entry: dict) -> None:
        demoted = self.fate[lane][entry["pos"]][1]
        self.fate[lane][entry["pos"]] = (self.seen, demoted, 0)

    @precondition(lambda self: self.started)
    @rule(seed=st.integers(0, 9999), share=st.floats(0.2, 1))
    def keep(self, seed, share):
        mask = torch.rand(self.batch, self.heads, self.layer.longest, generator=torch.Generator().manual_seed(seed)) < share
        mask[..., 0] = True  # a lane never loses its last entry: a policy keeps at least one
        self.layer.keep(mask, self.seen - 1)
        for lane, flags in enumerate(self.split(mask)):
            [self.died(lane, e) for e, f in zip(self.lanes[lane], flags.tolist()) if not f]
            self.lanes[lane] = [e for e, f in zip(self.lanes[lane], flags.tolist()) if f]

    @precondition(lambda self: self.started and min(map(len, self.lanes)) > 1)
    @rule(seed=st.integers(0, 9999))
    def drop_one(self, seed):
        g = torch.Generator().manual_seed(seed)
        slots = [int(torch.randint(len(lane), (1,), generator=g)) for lane in self.lanes]
        swaps = not self.layer.coded_rows("key") and not self.layer.coded_rows("value")
        self.layer.drop_one(torch.tensor(slots).view(self.batch, self.heads), self.seen - 1)
        for n, (lane, slot) in enumerate(zip(self.lanes, slots)):
            self.died(n, lane[slot])
            if swaps:
                lane[slot] = lane[-1]
                lane.pop()
            else:
                del lane[slot]

    # -- narrowing -------------------------------------------------------------------------------------------------
    def coded(self, codec, xs: list[torch.Tensor]) -> torch.Tensor:
        """Encode and decode a lane's vectors by themselves."""
        x = torch.stack(xs)[None, None]
        rows, blocks = codec.encode(x, torch.zeros(1, 1, len(xs), dtype=torch.long))
        every = {n: b.repeat_interleave(codec.block, 2) for n, b in blocks.items()}
        return codec.decode(rows, every, None)[0, 0]

    def exact_lens(self, side: str) -> list[int]:
        return [sum(e[side + "bits"] == 16 for e in lane) for lane in self.lanes]

    @precondition(lambda self: self.started and self.mode in ("token", "channel", "sinks"))
    @rule(data=st.data())
    def code(self, data):
        """The oldest exact rows of one side become codes; with `sinks`, of both sides, after skipping some."""
        first = data.draw(st.integers(1, 3)) if self.mode == "sinks" else 0
        sides = ["k", "v"] if first else [data.draw(st.sampled_from("kv"))]
        codecs = dict(k=self.key_codec, v=self.value_codec)
        block = max(codecs[s].block for s in sides)
        room = [max(0, min(lens) - first) for lens in zip(*(self.exact_lens(s) for s in sides))]
        if data.draw(st.booleans()):
            counts = [data.draw(st.integers(0, n)) // block * block for n in room]
        else:
            counts = [data.draw(st.integers(0, min(room))) // block * block] * len(room)
        if max(counts) == 0:
            return
        given = counts[0] if len(set(counts)) == 1 else counts
        for side in sides:
            codec = codecs[side]
            self.layer.code(dict(k="key", v="value")[side], codec, first, given, self.seen - 1)
            for n, (lane, count) in enumerate(zip(self.lanes, counts)):
                exact = [e for e in lane if e[side + "bits"] == 16][first : first + count]
                if exact:
                    for e, x in zip(exact, self.coded(codec, [e[side] for e in exact])):
                        e[side], e[side + "bits"] = x, codec.bits
                        if side == "k":
                            self.fate[n][e["pos"]] = (NEVER, self.seen, codec.bits)
        self.layer.reorder_after_code(first, given)
        if first:
            for lane in self.lanes:
                lane.sort(key=lambda e: e["kbits"])

    @precondition(lambda self: self.started and self.mode == "tiers")
    @rule(data=st.data(), seed=st.integers(0, 9999), widths=st.sampled_from([(16, 8), (16, 4, 2), (8, 2), (16, 8, 4, 2)]))
    def narrow(self, data, seed, widths):
        g = torch.Generator().manual_seed(seed)
        index = torch.randint(len(widths), (self.batch, self.heads, self.layer.longest), generator=g)
        wanted = torch.tensor(widths)[index]
        narrow(self.layer, wanted, lambda w: (TokenCodec(w, DIM), TokenCodec(w, DIM)), self.seen - 1)
        for n, (lane, bits) in enumerate(zip(self.lanes, self.split(wanted))):
            for e, b in zip(lane, bits.tolist()):
                if b < e["kbits"]:
                    for side in "kv":
                        e[side], e[side + "bits"] = self.coded(TokenCodec(b, DIM), [e[side]])[0], b
                    self.fate[n][e["pos"]] = (NEVER, self.seen, b)
            lane.sort(key=lambda e: e["kbits"])

    @precondition(lambda self: self.started and self.mode == "tiers")
    @rule(seed=st.integers(0, 9999), side=st.sampled_from(["key", "value"]))
    def replace(self, seed, side):
        """What merging does: some entries get other vectors where they lie."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.heads, self.layer.longest)
        changed, x = torch.rand(shape, generator=g) < 0.3, torch.randn(*shape, DIM, generator=g)
        replace(self.layer, side, changed, x)
        for lane, flags, new in zip(self.lanes, self.split(changed), self.split(x)):
            for e, f, y in zip(lane, flags.tolist(), new):
                if f:
                    bits = e[side[0] + "bits"]
                    e[side[0]] = y if bits == 16 else self.coded(TokenCodec(bits, DIM), [y])[0]

    # -- sequences -------------------------------------------------------------------------------------------------
    def choose(self, index: list[int]) -> None:
        lanes = [b * self.heads + h for b in index for h in range(self.heads)]
        self.lanes = [[dict(e) for e in self.lanes[i]] for i in lanes]
        self.fate, self.places = [dict(self.fate[i]) for i in lanes], [self.places[b] for b in index]
        self.batch = len(index)

    @precondition(lambda self: self.started and self.batch <= 2)
    @rule()
    def repeat(self):
        self.layer.state["seen"] = torch.arange(self.batch)
        self.layer.budget = torch.arange(self.batch * self.heads).view(self.batch, self.heads)
        index = list(range(self.batch)) * 2
        self.layer.repeat(2)
        self.choose(index)
        assert self.layer.state["seen"].tolist() == index
        assert self.layer.budget[:, 0].tolist() == [b * self.heads for b in index]

    @precondition(lambda self: self.started)
    @rule(data=st.data(), way=st.sampled_from(["reorder_cache", "batch_select_indices"]))
    def reorder(self, data, way):
        index = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.layer.state["seen"] = torch.arange(self.batch)
        self.layer.budget = torch.arange(self.batch * self.heads).view(self.batch, self.heads)
        getattr(self.layer, way)(torch.tensor(index))
        self.choose(index)
        assert self.layer.state["seen"].tolist() == index
        assert self.layer.budget[:, 0].tolist() == [b * self.heads for b in index]

    @precondition(lambda self: self.started and len(self.others) < 2)
    @rule()
    def fork(self):
        """Go on with a clone; the original must stay as it is."""
        self.others.append((self.layer, copy.deepcopy(self.lanes), copy.deepcopy(self.fate), self.batch))
        self.layer = self.layer.clone()

    # -- agreement -------------------------------------------------------------------------------------------------
    def check(self, layer: LabLayer, lanes: list[list[dict]], fate: list[dict], batch: int) -> None:
        assert (layer.batch, layer.heads) == (batch, self.heads) and layer.get_seq_length() == layer.seen
        assert layer.counts == [len(lane) for lane in lanes] and layer.longest == max(layer.counts)
        sides, counts = [e[side + "bits"] for lane in lanes for e in lane for side in "kv"], layer.bits_count()
        assert sum(counts.values()) == len(sides) // 2  # a key and a value of different widths count half at each
        assert all(abs(2 * counts.get(bits, 0) - sides.count(bits)) <= 1 for bits in {*counts, *sides})
        valid, keys, values, held = layer.valid(), layer.all_keys(), layer.all_values(), held_bits(layer)
        tags = (
            joined(layer.common.meta_view, layer.meta) if layer.common is not None and layer.common.meta is not None
            else layer.meta
        )
        pos, mass = layer.positions(), tags.padded("mass") if "mass" in tags.fields else None
        if layer.longest:
            for lane, entries in enumerate(lanes):
                b, h = divmod(lane, self.heads)
                n = len(entries)
                assert valid is None or valid[b, h].tolist() == [i < n for i in range(layer.longest)]
                assert pos[b, h, :n].tolist() == [e["pos"] for e in entries]
                assert held[b, h, :n].tolist() == [e["kbits"] for e in entries]
                if n:
                    assert torch.allclose(keys[b, h, :n], torch.stack([e["k"] for e in entries]), atol=1e-5)
                    assert torch.allclose(values[b, h, :n], torch.stack([e["v"] for e in entries]), atol=1e-5)
                if mass is not None:
                    assert torch.allclose(mass[b, h, :n], torch.tensor([e["mass"] for e in entries]), atol=1e-4)
        for lane, known in enumerate(fate):
            b, h = divmod(lane, self.heads)
            final, death, demoted = (x[b, h] for x in layer.history.upto(max(known, default=-1) + 1))
            for place, want in known.items():
                assert (int(death[place]), int(demoted[place]), int(final[place])) == want
        # I10: live and slack bytes are those of the tensors, found by walking the layer
        assert layer.live_bytes <= layer.allocated_bytes == storage_bytes(layer)

    @invariant()
    def agrees_with_the_model(self):
        if hasattr(self, "layer") and self.started:
            self.check(self.layer, self.lanes, self.fate, self.batch)
            for other in self.others:
                self.check(*other)


LayerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestLayer = LayerMachine.TestCase


def rows(count: int, seed: int = 0, heads: int = 2):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(1, heads, count, DIM, generator=g) for _ in range(2))


def test_lengths_are_tokens_seen_never_tokens_kept():
    layer = LabLayer(0, track=True)
    k, v = rows(10)
    layer.update(k, v)
    layer.append(k, v, torch.arange(10)[None], None)
    layer.keep(torch.arange(10).expand(1, 2, -1) < 3, 9)
    assert layer.get_seq_length() == 10 and layer.counts == [3, 3]
    assert layer.get_mask_sizes(1) == (11, 0) and layer.get_max_length() == -1


def test_the_cache_cannot_be_rolled_back_and_says_so():
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        LabLayer(0).crop(-1)
    assert not LabLayer(0).is_croppable


def test_a_window_drops_what_no_later_query_sees():
    layer = LabLayer(0, window=8)
    k, v = rows(100)
    layer.update(k, v)
    layer.append(k, v, None, None)
    layer.trim_window()
    assert layer.longest == 7 and layer.positions()[0, 0].tolist() == list(range(93, 100))
    assert torch.equal(layer.all_keys(), k[:, :, 93:])


def test_late_tracking_knows_the_positions_so_far():
    layer = LabLayer(0)
    k, v = rows(6)
    layer.update(k, v)
    layer.append(k, v, None, None)
    layer.start_tracking()
    assert layer.positions()[0, 1].tolist() == list(range(6))


@pytest.mark.parametrize("count", [3, 4, 9])
def test_a_blocks_scales_go_with_its_last_row(count):
    """Entries leave a coded block one at a time; its shared scales are freed with the last."""
    layer = LabLayer(0, track=True)
    k, v = rows(12)
    layer.update(k, v)
    layer.append(k, v, torch.arange(12)[None], None)
    layer.code("key", ChannelCodec(4, BLOCK), 0, 12, 11)
    layer.keep(torch.arange(12).expand(1, 2, -1) >= count, 11)
    assert layer.coded_k[0].blocks.lens == [3 - count // BLOCK] * 2


def test_a_model_that_touches_the_handle_is_told_so():
    """What `update` returns stands for keys and values; a model that computes with it cannot be served."""
    layer = LabLayer(0)
    handle, same = layer.update(*rows(3))
    assert handle is same and not hasattr(handle, "shape")
    assert handle.to("cpu") is handle  # layers that share a cache move what it returned to their device
    with pytest.raises(LabError, match="changes keys or values after the cache returned them"):
        handle.transpose(1, 2)
