"""Integer codes: packing, the half-step bound (I8), and reading without decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import codes

BITS = st.sampled_from(codes.WIDTHS)
SEEDS = st.integers(0, 10**6)


def rows(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@given(SEEDS, BITS, st.sampled_from([8, 16, 64, 128]))
@settings(max_examples=40)
def test_unpack_inverts_pack(seed, bits, d):
    x = torch.randint(0, 2**bits, (3, 5, d), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = codes.pack(x, bits)
    assert packed.shape[-1] == d * bits // 8 and packed.dtype == torch.uint8
    assert torch.equal(codes.unpack(packed, bits), x)


@given(SEEDS, BITS, st.sampled_from([8, 16, 32]), st.floats(-6, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60)
def test_a_few_rows_are_coded_as_many_are(seed, bits, group, magnitude, dtype):
    """The short way that a decode step takes on a CPU gives the same bytes."""
    x = rows(seed, codes.FEW // 32 + 1, 32, spread=10.0**magnitude).to(dtype)
    x[3], x[5] = 1.25, 0
    for few, many in zip(codes.encode_tokens(x[:9].unsqueeze(1), bits, group), codes.encode_tokens(x, bits, group)):
        assert few.dtype == many.dtype and torch.equal(few[:, 0], many[:9])


def test_the_layout_of_bytes_is_the_documented_one():
    """CONTRACT: byte j of int4 holds channels j (low) and j+d/2; of int2 channels j, j+d/4, j+d/2, j+3d/4."""
    x = torch.arange(8, dtype=torch.uint8)
    assert codes.pack(x, 4).tolist() == [j | (j + 4) << 4 for j in range(4)]
    x = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert codes.pack(x, 2).tolist() == [
        int(x[j]) | int(x[j + 2]) << 2 | int(x[j + 4]) << 4 | int(x[j + 6]) << 6 for j in range(2)
    ]


@given(SEEDS, BITS, st.sampled_from([8, 16, 32]), st.floats(-6, 3), st.floats(-300, 300))
@settings(max_examples=150)
def test_i8_error_is_at_most_half_a_step(seed, bits, group, magnitude, offset):
    """I8 for per-token and per-channel codes, from tiny to large ranges and far from zero."""
    x = rows(seed, 4, 32, 32, spread=10.0**magnitude) + offset
    packed, scale, zero = codes.encode_tokens(x, bits, group)
    back = codes.decode_tokens(packed, scale, zero, bits)
    step = scale.float().repeat_interleave(group, -1)
    rounding = 2e-6 * (x.abs() + step * 2**bits)  # the decode itself is float32
    assert ((x - back).abs() <= step / 2 + rounding).all()
    packed, scale, zero = codes.encode_channels(x, bits)
    back = codes.unpack(packed, bits).float() * scale.float().unsqueeze(-2) + zero.float().unsqueeze(-2)
    assert ((x - back).abs() <= scale.float().unsqueeze(-2) / 2 + rounding.amax(-1, keepdim=True)).all()


@given(SEEDS, BITS)
@settings(max_examples=30)
def test_i8_logit_error(seed, bits):
    """I8: |q.k - q.k_hat| * scale <= scale/2 * sum_c |q_c| * step_c."""
    k, q = rows(seed, 1, 20, 16), rows(seed + 1, 1, 6, 16)
    packed, scale, zero = codes.encode_tokens(k, bits, 16)
    error = (q @ (k - codes.decode_tokens(packed, scale, zero, bits)).mT).abs() * 0.25
    assert (error <= 0.25 * 0.5 * q.abs().sum(-1, keepdim=True) * scale.float().mT + 1e-5).all()


@given(SEEDS)
@settings(max_examples=20)
def test_error_does_not_grow_with_bits(seed):
    x = rows(seed, 50, 32)
    errors = []
    for bits in (2, 4, 8):
        packed, scale, zero = codes.encode_tokens(x, bits, 32)
        errors.append(float((x - codes.decode_tokens(packed, scale, zero, bits)).pow(2).mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1000.0])
@pytest.mark.parametrize("bits", codes.WIDTHS)
def test_a_constant_is_stored_as_itself(value, bits):
    """Delta = 0 stores the constant (to float16's precision)."""
    x = torch.full((3, 16), value)
    for packed, scale, zero in (codes.encode_tokens(x, bits, 16), codes.encode_channels(x, bits)):
        back = codes.unpack(packed, bits).float() * scale.float() + zero.float()
        assert torch.allclose(back, x, rtol=1e-3, atol=1e-6)
        assert torch.isfinite(back).all()


@given(SEEDS, BITS, st.integers(1, 30), st.sampled_from([16, 32]))
@settings(max_examples=40)
def test_chunks_get_the_same_codes(seed, bits, cut, group):
    """Per-token codes do not depend on what is encoded together."""
    x = rows(seed, 31, 32)
    whole = codes.encode_tokens(x, bits, group)
    parts = zip(codes.encode_tokens(x[:cut], bits, group), codes.encode_tokens(x[cut:], bits, group))
    for a, (b, c) in zip(whole, parts):
        assert torch.equal(a, torch.cat([b, c]))


@given(SEEDS, BITS, st.integers(1, 20), st.integers(1, 9), st.sampled_from([8, 16, 24, 48]))
@settings(max_examples=60)
def test_folded_reads_equal_reads_of_the_decoded_rows(seed, bits, n, r, group):
    """Groups that are whole slices of the bytes, parts of one, and groups that straddle two."""
    x, q = rows(seed, 2, 3, n, 48), rows(seed + 1, 2, 3, r, 48)
    p = torch.softmax(rows(seed + 2, 2, 3, r, n), -1)
    packed, scale, zero = codes.encode_tokens(x, bits, group)
    back = codes.decode_tokens(packed, scale, zero, bits)
    assert torch.allclose(codes.token_logits(q, packed, scale, zero, bits), q @ back.mT, atol=5e-5)
    assert torch.allclose(codes.token_mix(p, packed, scale, zero, bits), p @ back, atol=2e-5)


def test_one_scaled_channel_hurts_tokens_not_channels():
    """The reason for KIVI: an outlier channel raises per-token error everywhere, per-channel error nowhere else."""
    x = rows(5, 32, 32)
    loud = x.clone()
    loud[:, 7] *= 50

    def other_error(y, encode):
        packed, scale, zero = encode(y)
        if scale.shape[-1] == 32:
            back = codes.unpack(packed, 4).float() * scale.float().unsqueeze(-2) + zero.float().unsqueeze(-2)
        else:
            back = codes.decode_tokens(packed, scale, zero, 4)
        error = (y - back).pow(2)
        return float(torch.cat([error[:, :7], error[:, 8:]], 1).mean())

    token, channel = (lambda y: codes.encode_tokens(y, 4, 32)), (lambda y: codes.encode_channels(y, 4))
    assert other_error(loud, token) > 20 * other_error(x, token)
    assert other_error(loud, channel) == pytest.approx(other_error(x, channel))
