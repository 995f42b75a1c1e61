"""8-bit floats (the quantiser of quantisation sheet 6)."""

import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.techniques.fp8 import FloatCodec, brain_above

POS = torch.zeros(1, 1, 1, dtype=torch.long)


@given(st.integers(0, 10_000), st.floats(-12, 4))
@settings(max_examples=100)
def test_coding_twice_changes_nothing(seed, size):
    x = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(seed)) * 10**size
    codec = FloatCodec()
    once = codec.decode(*codec.encode(x, POS), None)
    assert torch.isfinite(once).all()
    assert torch.equal(codec.decode(*codec.encode(once, POS), None), once)


def test_relative_error_is_that_of_three_bits_of_mantissa():
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    rows, _ = FloatCodec().encode(x, POS)
    back = FloatCodec().decode(rows, {}, None)
    step = rows["scale"].float()
    assert bool(((back - x).abs() <= x.abs() / 16 + step * 2**-10).all())


def test_brain_above_never_falls_below():
    x = torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 10 ** torch.linspace(-7, 3, 5000)
    up = brain_above(x)
    assert bool((up.float() >= x).all()) and torch.equal(brain_above(up.float()), up)


def test_zero_vectors_and_predicted_bytes():
    codec = FloatCodec()
    assert float(codec.decode(*codec.encode(torch.zeros(1, 1, 2, 16), POS), None).abs().max()) == 0
    drive = Drive("fp8", 30, prompt=30)
    drive.feed(30)
    assert drive.layer.live_bytes == 2 * sum(drive.policy.encoder.coded_bytes(s, 30, 16, 4) for s in ("key", "value"))
