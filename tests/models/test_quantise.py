"""Codes and scales of weight matrices."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from lab.models import quantise

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 6))


def random(seed: int, rows: int, columns: int, spread: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=40)
@given(seed=st.integers(0, 999), rows=st.integers(1, 40), columns=st.integers(1, 90), power=st.integers(-6, 4))
def test_i8_int8_is_within_half_a_step(seed: int, rows: int, columns: int, power: int) -> None:
    weight = random(seed, rows, columns, 10.0 ** power)
    codes, scales = quantise.quantise_int8(weight)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16 and int(codes.min()) >= -127
    error = (codes.float() * scales.float()[:, None] - weight).abs()
    # A scale rounded down to bfloat16 leaves the largest entry up to 127 * 2^-9 steps outside.
    assert bool((error <= scales.float()[:, None] * 0.7501).all())
    inside = weight.abs() <= 127 * scales.float()[:, None]
    assert bool((error <= scales.float()[:, None] * 0.5001)[inside].all())


def test_int8_of_zeros_is_zero() -> None:
    codes, scales = quantise.quantise_int8(torch.zeros(3, 5))
    assert int(codes.abs().sum()) == 0 and bool(scales.isfinite().all())


@settings(max_examples=40)
@given(seed=st.integers(0, 999), shape=SHAPES)
def test_nibbles_round_trip(seed: int, shape: tuple[int, int]) -> None:
    rows, groups = shape
    codes = torch.randint(0, 16, (rows, groups * 32), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    affine = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(rows, groups, 2)
    packed = quantise.pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, groups * 16)
    assert torch.equal(quantise.unpack_int4(packed, affine, torch.float32), codes.float())


@settings(max_examples=40)
@given(seed=st.integers(0, 999), shape=SHAPES)
def test_weights_on_a_sixteen_step_grid_come_back(seed: int, shape: tuple[int, int]) -> None:
    """What a 4-bit GGUF file decodes to costs nothing more: only the grid's own rounding to bfloat16."""
    rows, groups = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows * groups, 32), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, 15
    step = torch.rand(rows * groups, 1, generator=generator) + 0.1
    weight = ((codes - 8) * step + 0.2 * step).view(rows, groups * 32)
    found, nibbles, affine = quantise.quantise_int4(weight)
    back = quantise.unpack_int4(nibbles, affine, torch.float32)
    assert torch.equal(found.view(-1, 32).float(), codes)
    assert float((back - weight).norm() / weight.norm()) < 0.005


@settings(max_examples=25)
@given(seed=st.integers(0, 999))
def test_the_search_beats_the_plain_grid(seed: int) -> None:
    weight = random(seed, 64, 128)
    _, nibbles, affine = quantise.quantise_int4(weight)
    searched = (quantise.unpack_int4(nibbles, affine, torch.float32) - weight).square().sum()
    groups = weight.view(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().sum()
    assert float(searched) < 0.93 * float(plain)


def test_int4_codes_are_in_range_and_finite_for_odd_groups() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 3.0
    weight[2, 5] = 1e4
    weight[3] = torch.linspace(-1e-6, 1e-6, 64)
    codes, nibbles, affine = quantise.quantise_int4(weight)
    assert int(codes.min()) >= 0 and int(codes.max()) <= 15 and bool(affine.isfinite().all())
    back = quantise.unpack_int4(nibbles, affine, torch.float32)
    assert torch.allclose(back[0], weight[0], atol=1e-25) and torch.allclose(back[1], weight[1], rtol=5e-3)
