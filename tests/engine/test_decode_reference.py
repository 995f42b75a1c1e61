"""Decode over whatever the cache holds, against float64 attention over the same entries, head by head.

Eviction, mixed precision, uneven lanes, soft caps, sink logits and sliding windows, alone and together.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drive import Drive
from reference import attention, heads, visibility

from lab.engine.tiers import narrow
from lab.techniques.int_codes import TokenCodec

SHAPES = {
    "plain": {}, "softcap": dict(softcap=3.0), "window": dict(window=20), "sink": dict(sink=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": dict(softcap=3.0, window=20, sink=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}
STACKS = [
    "dense", "h2o(budget=24)", "streaming_llm(budget=24,renumber=false)", "snapkv(budget=24,window=8)",
    "int_codes(bits=8)", "int_codes(bits=2,group=16,sinks=2)", "kivi(bits=4,group=16,residual=16)",
    "kivi(bits=2,group=16,residual=32)", "h2o(budget=40)+int_codes(bits=4,sinks=3)",
    "h2o(budget=40,recent=0.1)+kivi(group=16,residual=16)", "snapkv(budget=30,window=8)+kivi(group=16,residual=16)",
]


def reference(drive: Drive, held: list, row: int) -> np.ndarray:
    """float64 output [Hq,d] of query `row` over entries held (positions, keys, values) per KV head, and its own."""
    call, out = drive.call, []
    for h in range(drive.q.shape[1]):
        kv = h // (drive.q.shape[1] // drive.k.shape[1])
        pos, keys, values = held[kv]
        pos, keys = [*pos, row], torch.cat([keys, drive.k[0, kv, row : row + 1]])
        values = torch.cat([values, drive.v[0, kv, row : row + 1]])
        sink = call.get("sink")
        see = visibility([row], pos, call.get("window"))
        got, _, _ = attention(drive.q[0, h, row : row + 1], keys, values, drive.scale, see, softcap=call.get("softcap"),
                              sink=None if sink is None else float(sink[h]))
        out.append(got[0])
    return np.stack(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", STACKS)
def test_decode_after_anything_equals_float64(spec, shape):
    drive = Drive(spec, 70, **SHAPES[shape])
    drive.feed(60)
    for row in range(60, 70):
        held = [drive.stored(h) for h in range(2)]
        out = drive.feed(1)
        assert np.allclose(out[0, :, 0], reference(drive, held, row), atol=5e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", [[40], [13, 27], [39, 1], [1] * 5 + [35]])
def test_the_prompt_itself_is_exact(shape, chunks):
    """Every path of the prompt (whole, later chunks, one row) against the full matrix, before anything is compressed."""
    for spec in ("dense", "h2o(budget=10)", "kivi(group=16,residual=16)"):
        drive = Drive(spec, 40, prompt=40, **SHAPES[shape])
        out = torch.cat([drive.feed(n) for n in chunks], 2)[0]
        call = SHAPES[shape]
        want, _, _ = heads(drive.q[0], drive.k[0], drive.v[0], 0.25, visibility(range(40), range(40), call.get("window")),
                           softcap=call.get("softcap"), sinks=call.get("sink"))
        assert np.allclose(out, want, atol=5e-5)


@pytest.mark.parametrize("shape", ["plain", "all"])
def test_mixed_tiers_and_uneven_lanes(shape):
    """Three widths at once, heads of different length: one softmax over all of it."""
    drive = Drive("h2o(budget=1)", 60, seed=3, **SHAPES[shape])
    drive.feed(50)
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 2, 50, generator=g) < torch.tensor([0.9, 0.4]).view(1, 2, 1)
    mask[..., 0] = True
    drive.layer.keep(mask, 49)
    assert len(set(drive.layer.counts)) == 2
    for row in range(50, 60):
        wanted = torch.tensor([16, 8, 4, 2])[torch.randint(4, (1, 2, drive.layer.longest), generator=g)]
        narrow(drive.layer, wanted, lambda w: (TokenCodec(w, 8), TokenCodec(w, 8)), row)
        held = [drive.stored(h) for h in range(2)]
        out = drive.feed(1)
        assert np.allclose(out[0, :, 0], reference(drive, held, row), atol=5e-5)
    assert sorted(b for b, n in drive.layer.bits_count().items() if n) == [2, 4, 8, 16]


@pytest.mark.parametrize("shape", SHAPES)
def test_mass_is_the_sum_of_weights_while_prompting_and_decoding(shape):
    """What H2O adds up equals the columns of the full weight matrix, with soft caps, windows and sink logits."""
    drive = Drive("h2o(budget=1)", 40, prompt=30, **SHAPES[shape])
    for n in (17, 13, *[1] * 10):
        drive.feed(n)
    call = SHAPES[shape]
    _, _, p = heads(drive.q[0], drive.k[0], drive.v[0], 0.25, visibility(range(40), range(40), call.get("window")),
                    softcap=call.get("softcap"), sinks=call.get("sink"))
    assert np.allclose(drive.layer.attribute("mass")[0], p.reshape(2, 2, 40, 40).sum((1, 2)), atol=2e-4)


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=12)", "int_codes(bits=4)"])
def test_left_padding_is_as_if_it_were_not_there(spec):
    pads = 7
    padded, alone = Drive(spec, 40, batch=2, seed=4), Drive(spec, 40 - pads)
    for name in "qkv":
        setattr(alone, name, getattr(padded, name)[1:, :, pads:])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :pads] = False
    for start, end in ((0, 30), *((t, t + 1) for t in range(30, 40))):
        got = padded.feed(end - start, mask[:, :end])[1]
        want = alone.feed(end - max(start, pads) if start == 0 else 1)[0]
        assert torch.allclose(got[:, -want.shape[1] :], want, atol=2e-5)
        assert padded.layer.counts[2:] == alone.layer.counts
