"""Per-token integer codes and KIVI: the Test lines of their sheets, in the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drive import Drive

from lab.engine.stack import Stack
from lab.engine.tiers import held_bits
from lab.errors import LabError
from lab.techniques.int_codes import TokenCodec
from lab.techniques.kivi import ChannelCodec


def decoded(codec, x: torch.Tensor) -> torch.Tensor:
    """x [B,Hk,n,d] through a codec, its blocks from the front."""
    rows, blocks = codec.encode(x, torch.arange(x.shape[2]).expand(x.shape[:3]))
    return codec.decode(rows, {name: b.repeat_interleave(codec.block, 2) for name, b in blocks.items()}, None)


def same_state(a: Drive, b: Drive) -> bool:
    a.layer.settle(), b.layer.settle()
    sides = [(s, t) for side in ("keys_side", "values_side") for s, t in zip(getattr(a.layer, side), getattr(b.layer, side))]
    return all(
        s.rows.lens == t.rows.lens and all(torch.equal(s.rows.padded(n), t.rows.padded(n)) for n in s.rows.fields)
        for s, t in sides
    )


# -- per token ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_int_codes_hold_every_token_at_its_width(bits):
    """Prompt and decoded tokens alike; the error is within half a step (I8) and bytes are b + 32/g bits per element (I10)."""
    drive = Drive(f"int_codes(bits={bits},group=16)", 40, prompt=30)
    for n in (30, *[1] * 10):
        drive.feed(n)
    assert drive.layer.bits_count() == {16: 0, bits: 80}
    _, keys, values = drive.stored(0)
    assert torch.equal(keys, decoded(TokenCodec(bits, 16), drive.k)[0, 0])
    assert torch.equal(values, decoded(TokenCodec(bits, 16), drive.v)[0, 0])
    spread = drive.k[0, 0].amax(-1, keepdim=True) - drive.k[0, 0].amin(-1, keepdim=True)
    assert ((keys - drive.k[0, 0]).abs() <= spread / (2**bits - 1) / 2 * 1.01 + 2e-3).all()
    assert drive.layer.live_bytes == 2 * 80 * (16 * bits + 32) // 8


def test_int_codes_do_not_depend_on_chunks():
    whole, parts = (Drive("int_codes(bits=4)", 40, prompt=n) for n in (40, 30))
    whole.feed(40)
    for n in (11, 19, *[1] * 10):
        parts.feed(n)
    assert same_state(whole, parts)


def test_int_codes_attend_the_prompt_exactly():
    coded, dense = Drive("int_codes(bits=2)", 30), Drive("dense", 30)
    assert torch.equal(coded.feed(30), dense.feed(30))


def test_int_codes_with_exact_sinks():
    drive = Drive("int_codes(bits=2,sinks=3)", 40, prompt=30)
    for n in (30, *[1] * 10):
        drive.feed(n)
        pos, keys, _ = drive.stored(1)
        assert sorted(pos) == list(range(drive.at))
        exact = {p: x for p, x in zip(pos, keys)}
        assert all(torch.equal(exact[p], drive.k[0, 1, p]) for p in range(3))
        assert not torch.equal(exact[5], drive.k[0, 1, 5])
        assert drive.layer.bits_count()[16] == 6


def test_an_outlier_channel_ruins_tokens_codes_and_not_kivis():
    """A single scaled channel raises the error of the other channels of keys per token, not per channel."""
    errors = {}
    for spec in ("int_codes(bits=4)", "kivi(bits=4,group=16,residual=16)"):
        for loud in (1, 30):
            drive = Drive(spec, 48)
            drive.k[..., 5] *= loud
            drive.feed(48)
            _, keys, _ = drive.stored(0)
            error = (keys - drive.k[0, 0]).pow(2)
            errors[spec, loud] = float(error[:, [c for c in range(16) if c != 5]].mean())
    assert errors["int_codes(bits=4)", 30] > 20 * errors["int_codes(bits=4)", 1]
    assert errors["kivi(bits=4,group=16,residual=16)", 30] == pytest.approx(errors["kivi(bits=4,group=16,residual=16)", 1])


# -- KIVI --------------------------------------------------------------------------------------------------------------
KIVI = "kivi(bits=4,group=16,residual=32)"


def test_kivi_is_exact_below_its_residual():
    """N < R is the dense cache, bit for bit, and costs the same."""
    drive, dense = Drive(KIVI, 31), Drive("dense", 31)
    for n in (20, *[1] * 11):
        assert torch.equal(drive.feed(n), dense.feed(n))
    assert drive.layer.live_bytes == dense.layer.live_bytes


@pytest.mark.parametrize("prompt", [40, 64, 71, 32])
def test_kivi_codes_what_its_sheet_says(prompt):
    """A prompt of T codes T - T mod R keys and T - R values; then keys leave R at a time and values one by one."""
    drive = Drive(KIVI, 110, prompt=prompt)
    drive.feed(prompt)
    for now in range(prompt, 110):
        keys, values = drive.layer.coded_k, drive.layer.coded_v
        assert (keys[0].rows.lens if keys else [0, 0]) == [now - now % 32] * 2
        assert (values[0].rows.lens if values else [0, 0]) == [max(0, now - 32)] * 2
        drive.feed(1)
    pos, keys, values = drive.stored(0)
    assert pos == list(range(110))
    assert torch.equal(keys[:96], decoded(ChannelCodec(4, 16), drive.k[:, :, :96])[0, 0])
    assert torch.equal(values[:78], decoded(TokenCodec(4, 16), drive.v[:, :, :78])[0, 0])
    assert torch.equal(keys[96:], drive.k[0, 0, 96:]) and torch.equal(values[78:], drive.v[0, 0, 78:])


def test_kivi_does_not_depend_on_chunks():
    whole, parts = (Drive(KIVI, 110, prompt=n) for n in (110, 70))
    whole.feed(110)
    for n in (33, 37, *[1] * 40):
        parts.feed(n)
    assert same_state(whole, parts)


def test_kivi_bytes():
    """I10 and the sheet's cost: b + 32/g bits per coded element, the residual exact."""
    drive = Drive("kivi(bits=2,group=32,residual=32)", 96, dim=64)
    drive.feed(96)
    keys = 96 * 64 * 2 // 8 + 3 * 64 * 4 + 96 * 4  # codes, scales and zeros of three groups, a group tag per row
    values = 64 * (64 * 2 // 8 + 2 * 4) + 32 * 64 * 4
    assert drive.layer.live_bytes == 2 * (keys + values)


def test_kivi_blocks_survive_eviction_of_single_rows():
    """Rows leave a coded block one at a time; the rest of the block decodes as before."""
    drive = Drive("h2o(budget=60)+kivi(bits=4,group=16,residual=16)", 90, prompt=70)
    drive.feed(70)
    for _ in range(20):
        pos, keys, _ = drive.stored(0)
        coded = {p: k for p, k, bits in zip(pos, keys, held_bits(drive.layer)[0, 0].tolist()) if bits == 4}
        drive.feed(1)
        pos, keys, _ = drive.stored(0)
        still = {p: k for p, k in zip(pos, keys) if p in coded}
        assert len(pos) == 60 and len(still) >= len(coded) - 1
        assert all(torch.equal(k, coded[p]) for p, k in still.items())
    assert len(coded) > 20


def test_kivi_refuses_a_residual_that_is_no_multiple_of_the_group():
    with pytest.raises(LabError, match="multiple of group") as error:
        Stack.parse("kivi(group=32,residual=100)")
    assert "residual=96" in str(error.value)
    assert Stack.parse("kivi(group=32,residual=96)").spec == "kivi(residual=96)"


def test_error_falls_as_bits_grow():
    outs = {}
    for spec in ("dense", *(f"{name}(bits={b}{more})" for b in (2, 4, 8) for name, more in
                            (("int_codes", ""), ("kivi", ",group=16,residual=16")))):
        drive = Drive(spec, 80, prompt=64)
        drive.feed(64)
        outs[spec] = torch.cat([drive.feed(1) for _ in range(16)], 2)
    for name, more in (("int_codes", ""), ("kivi", ",group=16,residual=16")):
        errors = [float((outs[f"{name}(bits={b}{more})"] - outs["dense"]).norm()) for b in (2, 4, 8)]
        assert errors[0] > errors[1] > errors[2] > 0
        assert np.isfinite(errors).all()
