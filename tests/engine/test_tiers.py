"""Several tiers at once: random appends, narrowings, evictions and merges against a list of vectors."""

import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.engine import tiers
from lab.engine.layer import LabLayer
from lab.techniques.int_codes import TokenCodec
from lab.techniques.kivi import ChannelCodec

D = 16


def codecs(width: int):
    return TokenCodec(width, 16), TokenCodec(width, 16)


def fresh(batch: int = 1) -> LabLayer:
    layer = LabLayer(0, track=True)
    layer.lazy_initialization(torch.zeros(batch, 2, 1, D), torch.zeros(batch, 2, 1, D))
    return layer


def coded(x: torch.Tensor, bits: int) -> torch.Tensor:
    codec = TokenCodec(bits, 16)
    return codec.decode(*codec.encode(x.view(1, 1, 1, D), torch.zeros(1, 1, 1)), None).view(D)


class Model:
    """What the layer should hold: per lane, position -> (key, value, bits)."""

    def __init__(self) -> None:
        self.lanes: list[dict] = [{}, {}]

    def narrow(self, wanted: list[dict]) -> None:
        for lane, want in zip(self.lanes, wanted):
            for p, b in want.items():
                k, v, have = lane[p]
                if b < have:
                    lane[p] = (coded(k, b), coded(v, b), b)


def check(layer: LabLayer, model: Model) -> None:
    keys, values, pos, bits = layer.all_keys(), layer.all_values(), layer.positions(), tiers.held_bits(layer)
    for h, lane in enumerate(model.lanes):
        n = layer.counts[h]
        held = pos[0, h, :n].tolist()
        assert sorted(held) == sorted(lane)
        for slot, p in enumerate(held):
            k, v, b = lane[p]
            assert int(bits[0, h, slot]) == b
            assert torch.allclose(keys[0, h, slot], k, atol=1e-5) and torch.allclose(values[0, h, slot], v, atol=1e-5)
            assert float(layer.attribute("tag")[0, h, slot]) == p
    widths = [s.bits for s in layer.keys_side]
    assert widths == sorted(widths) == [s.bits for s in layer.values_side]
    assert [s.rows.lens for s in layer.keys_side] == [s.rows.lens for s in layer.values_side]
    want = sum(2 * (D * 4 if b == 16 else D * b // 8 + 4) + 8 for lane in model.lanes for _, _, b in lane.values())
    assert layer.live_bytes == want


@given(st.lists(st.tuples(st.sampled_from(["append", "narrow", "evict", "one", "change"]), st.integers(0, 10_000)), max_size=14))
@settings(max_examples=60)
def test_against_a_model(actions):
    layer, model, row = fresh(), Model(), 0
    for action, seed in [("append", 0), *actions]:
        g = torch.Generator().manual_seed(seed)
        if action == "append" or layer.longest == 0:
            n = 1 + seed % 5
            k, v = torch.randn(1, 2, n, D, generator=g), torch.randn(1, 2, n, D, generator=g)
            place = torch.arange(row, row + n)[None]
            before = layer.longest
            layer.append(k, v, place, None)
            if before == 0 and "tag" not in layer.meta.fields:
                layer.attribute("tag")
            tag = layer.positions().float()
            layer.set_attribute("tag", tag)
            for h in range(2):
                model.lanes[h] |= {row + i: (k[0, h, i], v[0, h, i], 16) for i in range(n)}
            row += n
        elif action == "narrow":
            pos = layer.positions()
            wanted = torch.tensor([2, 4, 8, 16])[torch.randint(4, pos.shape, generator=g)]
            model.narrow([dict(zip(pos[0, h, :n].tolist(), wanted[0, h, :n].tolist())) for h, n in enumerate(layer.counts)])
            tiers.narrow(layer, wanted, codecs, row)
        elif action == "evict":
            keep = torch.rand(1, 2, layer.longest, generator=g) < 0.7
            keep[:, :, 0] = True
            valid = layer.valid()
            pos = layer.positions()
            for h, n in enumerate(layer.counts):
                stay = {p for p, k in zip(pos[0, h, :n].tolist(), keep[0, h, :n].tolist()) if k}
                model.lanes[h] = {p: e for p, e in model.lanes[h].items() if p in stay}
            layer.keep(keep if valid is None else keep & valid, row)
        elif action == "one" and min(layer.counts) > 1:
            slot = torch.tensor([[seed % n for n in layer.counts]])
            pos = layer.positions().gather(2, slot.unsqueeze(-1))
            for h in range(2):
                del model.lanes[h][int(pos[0, h, 0])]
            layer.drop_one(slot, row)
        elif action == "change":
            x = torch.randn(1, 2, layer.longest, D, generator=g)
            flags = torch.rand(1, 2, layer.longest, generator=g) < 0.4
            pos = layer.positions()
            for h, n in enumerate(layer.counts):
                for slot, p in enumerate(pos[0, h, :n].tolist()):
                    k, v, b = model.lanes[h][p]
                    if flags[0, h, slot]:
                        model.lanes[h][p] = (k, x[0, h, slot] if b == 16 else coded(x[0, h, slot], b), b)
            tiers.replace(layer, "value", flags, x)
        check(layer, model)


def test_blocks_move_whole_and_the_newest_rest_waits():
    layer = fresh()
    layer.append(torch.randn(1, 2, 21, D), torch.randn(1, 2, 21, D), torch.arange(21)[None], None)
    keys = layer.all_keys().clone()
    wanted = torch.full((1, 2, 21), 4)
    wanted[0, 1, 8:] = 16
    tiers.narrow(layer, wanted, lambda w: (ChannelCodec(w, 8), TokenCodec(w, 16)), 21)
    assert layer.coded_k[0].rows.lens == [16, 8] == layer.coded_v[0].rows.lens
    assert layer.positions()[0, 0].tolist() == list(range(21))
    assert float((layer.all_keys() - keys).abs().max()) < 0.5


def test_narrowing_is_recorded():
    from lab.engine.history import NEVER, History

    layer = fresh()
    layer.history = History(1, 2, 10)
    layer.append(torch.randn(1, 2, 6, D), torch.randn(1, 2, 6, D), torch.arange(6)[None], None)
    wanted = torch.full((1, 2, 6), 16)
    wanted[0, 0, 2], wanted[0, 1, 4] = 8, 2
    tiers.narrow(layer, wanted, codecs, 5)
    bits, _, demoted = layer.history.upto(6)
    assert bits[0].tolist() == [[16, 16, 8, 16, 16, 16], [16, 16, 16, 16, 2, 16]]
    assert int(demoted[0, 0, 2]) == int(demoted[0, 1, 4]) == 6 and int(demoted[0, 0, 0]) == NEVER


def test_uneven_lanes_are_coded_lane_by_lane():
    """Per-head budgets and codes: every lane codes what it is due, none waits for the shortest."""
    drive = Drive("adakv(alpha=0)+h2o(budget=24,recent=0)+int_codes(bits=4,sinks=2)", 50, prompt=40)
    drive.feed(40)
    assert len(set(drive.layer.counts)) > 1
    assert drive.layer.exact_k.rows.lens == [2, 2] and drive.layer.coded_k[0].rows.lens == [n - 2 for n in drive.layer.counts]
    for _ in range(10):
        drive.feed(1)
    for h in range(2):
        pos, keys, values = drive.stored(h)
        assert float((keys - drive.k[0, h, pos]).abs().max()) < 0.5 and float((values - drive.v[0, h, pos]).abs().max()) < 0.5
