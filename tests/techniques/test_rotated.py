"""Rotated codes (quantisation sheet 4)."""

import math

import pytest
import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import levels
from lab.errors import LabError
from lab.techniques.rotated import AffineRotated, NormalRotated, Rotated, turned

POS = torch.zeros(1, 1, 1, dtype=torch.long)


@pytest.mark.parametrize("d", [16, 64, 80, 96, 128])
def test_rotations_are_orthogonal_and_keep_dot_products(d):
    r = levels.rotation(d, 3).double()
    assert torch.allclose(r @ r.T, torch.eye(d, dtype=r.dtype), atol=1e-6)
    q, k = torch.randn(5, d), torch.randn(7, d)
    assert torch.allclose(turned(q, 3) @ turned(k, 3).T, q @ k.T, atol=1e-3)


@given(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([8, 16, 64]), st.integers(0, 999))
@settings(max_examples=40)
def test_packing_round_trip(bits, d, seed):
    x = torch.randint(2**bits, (3, d), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = levels.pack(x, bits)
    assert packed.shape[-1] == d * bits // 8 and torch.equal(levels.unpack(packed, bits), x)


@pytest.mark.parametrize("bits,want", [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_error_of_gaussian_vectors(bits, want):
    """Mean squared error over |x|^2 within 10% of the Lloyd-Max values."""
    x = torch.randn(1, 1, 4000, 128, generator=torch.Generator().manual_seed(bits))
    codec = NormalRotated(bits, 0)
    back = codec.decode(*codec.encode(x, POS), None)
    error = float(((back - x).square().sum(-1) / x.square().sum(-1)).mean())
    assert error == pytest.approx(want, rel=0.1)


def test_fitted_levels_of_a_gaussian_are_the_table():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3):
        assert torch.allclose(levels.fit_levels(x, bits, rounds=100), levels.normal_levels(bits), atol=0.04)


def test_inner_product_mode_is_unbiased_over_seeds():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 1, 64, generator=g), torch.randn(1, 1, 1, 64, generator=g)
    k = k + q  # a product away from zero
    plain, signs = [], []
    for seed in range(400):
        for found, codec in ((plain, NormalRotated(2, seed)), (signs, NormalRotated(3, seed, signs=True))):
            rows, _ = codec.encode(k, POS)
            found.append(float(codec.logits(q, rows, {}, True)))
    true = float((q * k).sum())
    spread = float(torch.tensor(signs).std()) / math.sqrt(len(signs))
    assert abs(sum(signs) / len(signs) - true) < 4 * spread + 0.002 * abs(true)
    assert abs(sum(plain) / len(plain) - true) > 0.05 * abs(true)  # the table alone shrinks products


@pytest.mark.parametrize("codec", [
    NormalRotated(3, 1), NormalRotated(4, 1, True), AffineRotated(4, 64, 1), AffineRotated(2, 16, 1),
])
def test_reading_codes_equals_decoding_them(codec):
    g = torch.Generator().manual_seed(2)
    x, q, p = (torch.randn(1, 2, n, 64, generator=g) for n in (9, 3, 3))
    p = torch.randn(1, 2, 3, 9, generator=g).softmax(-1)
    rows, blocks = codec.encode(x, POS)
    back = codec.decode(rows, blocks, None)
    direct = codec.logits(q, rows, blocks, True)
    assert direct is None or torch.allclose(direct, q @ back.mT, atol=1e-3)
    assert torch.allclose(codec.mix(p, rows), p @ back, atol=1e-4)


def test_more_bits_lose_less_and_rotation_tames_outliers():
    x = torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(3))
    x[..., 5] *= 30
    errors = []
    for bits in (2, 3, 4):
        codec = NormalRotated(bits, 0)
        errors.append(float((codec.decode(*codec.encode(x, POS), None) - x).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    from lab.techniques.int_codes import TokenCodec

    plain, turned_codec = TokenCodec(2, 64), AffineRotated(2, 64, 0)
    loss = [float((c.decode(*c.encode(x, POS), None) - x)[..., :5].square().mean()) for c in (plain, turned_codec)]
    assert loss[1] < loss[0]


@pytest.mark.parametrize("spec", [
    "rotated", "rotated(bits=2)", "rotated(mode=inner,bits=3)", "rotated(mode=quarot)", "rotated(bits=8)",
])
def test_predicted_bytes(spec):
    drive = Drive(spec, 33, dim=64, prompt=30)
    drive.feed(30), drive.feed(1)
    technique = drive.policy.encoder
    for side, part in (("key", drive.layer.coded_k[0]), ("value", drive.layer.coded_v[0])):
        assert part.live_bytes == 2 * technique.coded_bytes(side, 31, 64, 4)
    assert drive.layer.exact_k.live_bytes == 0


def test_widths():
    assert Rotated()._value_bits == 3 and Rotated(mode="quarot")._value_bits == 4 and Rotated(bits=2)._value_bits == 2
    with pytest.raises(LabError, match="3-bit"):
        Rotated(mode="quarot", bits=3)
    assert Rotated().at(2).bits == Rotated().at(2)._value_bits == 2
