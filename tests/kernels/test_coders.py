"""Codes per channel and by table: the same as the torch path, and as float64 wherever the nearest level is not a tie."""

import pytest
import torch
from kernel_caches import DEVICE, error, make_tier

from kernels import codes, decode, encode, levels
from kernels.decode.reference import dequantise
from kernels.encode import coders
from lab.techniques.int_codes import TokenCodec
from lab.techniques.kivi import ChannelCodec
from lab.techniques.kvquant import LevelCodec
from lab.techniques.rotated import AffineRotated, NormalRotated


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("shape,dtype", [
    ((3, 32, 64), torch.float32), ((1, 2, 2, 16, 80), torch.float16), ((2, 24, 96), torch.float32)])
def test_channels_equal_torch(bits, shape, dtype):
    x = numbers(*shape, dtype=dtype) * 3
    x[..., 5] = 1.25  # a constant channel
    x[..., 7] = 0
    x[..., 9] *= 1000
    got, want = encode.channels(x, bits, impl="triton"), codes.encode_channels(x.cpu(), bits)
    for a, b in zip(got, want):
        assert a.shape == b.shape and torch.equal(a.cpu(), b)
    back = codes.unpack(got[0], bits).double() * got[1].double().unsqueeze(-2) + got[2].double().unsqueeze(-2)
    assert ((back - x.double()).abs() <= got[1].double().unsqueeze(-2) / 2 * 1.001 + 1e-5).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_blocks_land_in_their_slots_and_are_read_back(impl):
    """Into the middle of a KIVI tier: the named slots and rows alone change, and decode attends to what was written."""
    tier, old = (make_tier(4, [64, 96], 64, channels=32, kind="block", device=DEVICE, generator=torch.Generator().manual_seed(1))
                 for _ in range(2))
    k, v = numbers(3, 32, 64, seed=2), numbers(3, 32, 64, seed=3)
    slots, rows = torch.tensor([32, -1, 64], device=DEVICE), torch.tensor([4, 0, 1], device=DEVICE)
    encode.append_blocks(tier, k, v, slots, rows, impl=impl)
    written = torch.cat([torch.arange(32, 64), torch.arange(64, 96)]).to(DEVICE)
    got = dequantise(tier, written, torch.float64)
    for a, x in zip(got, (k, v)):
        assert error(a, x[[0, 2]].flatten(0, 1)) < 0.1
    untouched = torch.ones(tier.slots, dtype=torch.bool, device=DEVICE)
    untouched[written] = False
    for name in ("k", "v", "v_scale", "v_zero", "k_group"):
        assert torch.equal(getattr(tier, name)[untouched], getattr(old, name)[untouched])
    assert torch.equal(tier.k_scale[[0, 2, 3]], old.k_scale[[0, 2, 3]]) and (tier.k_group[64:96] == 1).all()
    q = numbers(1, 4, 64, dtype=torch.float16)
    want = decode.reference.attend(q, [tier], 0.125)[0]
    assert error(decode.attend(q, [tier], 0.125, impl=impl).out, want) < 2e-3
    with pytest.raises(ValueError, match="per-channel"):
        encode.append_blocks(make_tier(4, [8], 64, device=DEVICE), k, v, slots, rows)


def uneven(bits, seed=0):
    return numbers(2**bits, seed=seed).sort().values


def unlike(got: torch.Tensor, want: torch.Tensor, y: torch.Tensor, table: torch.Tensor, bits: int, slack: float) -> None:
    """Codes may differ only where a number stands within `slack` of the middle of two levels."""
    a, b = levels.unpack(got, bits).long(), levels.unpack(want, bits).long()
    edges = (table[1:].double() + table[:-1].double()) / 2
    near = (y.double().unsqueeze(-1) - edges).abs().amin(-1) <= slack
    assert ((a == b) | near).all() and (a == b).double().mean() > 0.98


@pytest.mark.parametrize("bits,dim", [(1, 64), (2, 80), (3, 64), (4, 128), (4, 24), (3, 256)])
def test_numbers_of_a_turned_table(bits, dim):
    device = torch.device(DEVICE)
    x, table, turn = numbers(3, 37, dim, seed=bits), levels.normal_levels(bits, device), levels.turn(dim, 3, device)
    packed, norm = encode.table(x, table, bits, turn=turn, by_norm=True, impl="torch")
    want = (table.double()[levels.unpack(packed, bits).int()] / dim**0.5 @ turn.double()) * norm.double()
    for impl in ("torch", "triton"):
        assert error(encode.from_table(packed, norm, table, bits, turn, impl=impl), want) < 1e-6
    assert error(want, x) < {1: 0.7, 2: 0.4, 3: 0.22, 4: 0.12}[bits]


@pytest.mark.parametrize("codec", [
    NormalRotated(4, 1), NormalRotated(3, 1), NormalRotated(4, 1, signs=True), AffineRotated(4, 32, 1), AffineRotated(8, 64, 2),
])
def test_rotated_rows_coded_in_place(codec):
    """The row of a captured step: into its slot what `encode` gives, and back in another dtype."""
    x, slots = numbers(3, 64, seed=11), torch.tensor([7, 0, 4], device=DEVICE)
    found, _ = codec.encode(x[None, None], None)
    held = {name: torch.full((9, *f.shape[3:]), 7, dtype=f.dtype, device=DEVICE) for name, f in found.items()}
    codec.encode_into(x, held, slots)
    for name, f in found.items():
        assert torch.equal(held[name][slots], f[0, 0]) and (held[name][[1, 2, 3, 5, 6, 8]] == 7).all()
    if hasattr(codec, "decode_as"):
        assert torch.equal(codec.decode_as(torch.float16, found), codec.decode(found, {}, None).half())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_table_of_given_numbers(bits):
    """Nothing is rounded on the way, so codes are those of float64 and of torch, ties included."""
    table = uneven(bits)
    x = numbers(2, 9, 72, seed=1)
    x[0, 0, : 2**bits - 1] = ((table[1:] + table[:-1]) / 2)[:72]  # on the edges
    got, norm = encode.table(x, table, bits, impl="triton")
    assert norm is None and torch.equal(got, encode.table(x, table, bits, impl="torch")[0])
    far = (x.double().unsqueeze(-1) - table.double()).abs()
    best = far.gather(-1, levels.unpack(got, bits).long().unsqueeze(-1)).squeeze(-1)
    assert (best <= far.amin(-1) + 1e-6).all()


@pytest.mark.parametrize("bits,dim", [(2, 64), (3, 128), (4, 80), (4, 16), (8, 64)])
@pytest.mark.parametrize("turned,many", [(False, False), (True, False), (True, True)])
def test_table_by_norm_and_rotation(bits, dim, turned, many, monkeypatch):
    """TurboQuant's codes: the turned vector over its length, against float64; turned by the kernel or, many, by a product."""
    monkeypatch.setattr(coders, "MANY", 4 if many else 10**6)
    table = levels.normal_levels(bits) if bits < 8 else uneven(8)
    table = table.to(DEVICE)
    x = numbers(3, 7, dim, seed=4) * 5
    x[1, 2] = 0
    turn = levels.rotation(dim, 3).to(DEVICE) if turned else None
    got, norm = encode.table(x, table, bits, turn=turn, by_norm=True, impl="triton")
    want, length = encode.table(x, table, bits, turn=turn, by_norm=True, impl="torch")
    exact = x.double().norm(dim=-1, keepdim=True)
    assert ((norm.double() - exact).abs() <= exact * 2**-11 * 1.01).all() and norm.shape == length.shape
    y = x.double() if turn is None else x.double() @ turn.double().mT
    y = y / norm.double().clamp_min(1e-12) * dim**0.5
    float64 = levels.pack(levels.nearest(y, table.double()), bits)
    unlike(got, float64, y, table, bits, 1e-4)
    same = (norm == length).squeeze(-1)
    assert same.double().mean() > 0.9
    unlike(got[same], want[same], y[same], table, bits, 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", ["vector", "channel"])
def test_table_by_range(bits, per):
    """KVQuant's codes, bit for bit those of torch: every operation is the same."""
    table = uneven(bits, 5).clamp(-1, 1)
    x = numbers(2, 3, 11, 64, seed=6)
    if per == "vector":
        low, high = x.amin(-1, keepdim=True).half(), x.amax(-1, keepdim=True).half()
    else:
        low, high = x.amin((0, 2)).unsqueeze(1), x.amax((0, 2)).unsqueeze(1)
    got = encode.table(x, table, bits, low=low, high=high, impl="triton")[0]
    assert torch.equal(got, encode.table(x, table, bits, low=low, high=high, impl="torch")[0])
    y = 2 * (x.double() - low.double()) / (high.double() - low.double()) - 1
    unlike(got, levels.pack(levels.nearest(y, table.double()), bits), y, table, bits, 1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_table_in_place(impl):
    x, table = numbers(4, 64, seed=7), levels.normal_levels(4).to(DEVICE)
    slots = torch.tensor([5, -1, 0, 9], device=DEVICE)
    held, norms = torch.full((12, 32), 77, dtype=torch.uint8, device=DEVICE), torch.full((12, 1), 9.0, device=DEVICE).half()
    encode.table(x, table, 4, by_norm=True, out=(held, norms), slots=slots, impl=impl)
    want, length = encode.table(x, table, 4, by_norm=True, impl=impl)
    live = slots >= 0
    assert torch.equal(held[slots[live]], want[live]) and torch.equal(norms[slots[live]], length[live])
    others = torch.ones(12, dtype=torch.bool, device=DEVICE)
    others[slots[live]] = False
    assert (held[others] == 77).all() and (norms[others] == 9).all()


def test_tokens_of_any_shape_and_refusals():
    x = numbers(2, 3, 5, 64)
    for a, b in zip(encode.tokens(x, 4, 32, impl="triton"), codes.encode_tokens(x.cpu(), 4, 32)):
        assert torch.equal(a.cpu(), b)
    with pytest.raises(ValueError, match="whole bytes"):
        encode.channels(numbers(1, 16, 6), 2)
    with pytest.raises(ValueError, match="levels"):
        encode.table(x, uneven(3), 4)
    with pytest.raises(ValueError, match="in place"):
        encode.channels(numbers(1, 16, 8), 2, out=(x, x, x))


CODECS = [
    lambda to: TokenCodec(4, 32), lambda to: ChannelCodec(2, 16), lambda to: AffineRotated(4, 64, 1),
    lambda to: NormalRotated(3, 1),
    lambda to: LevelCodec(3, 1, uneven(3, 5).clamp(-1, 1).to(to)),
    lambda to: LevelCodec(4, 2, uneven(4, 5).clamp(-1, 1).to(to), *(numbers(2, 1, 64).to(to).abs() * s + s for s in (-2, 2))),
]


@pytest.mark.parametrize("make", CODECS)
def test_codecs_of_the_engine_give_the_same_fields_through_triton(make, monkeypatch):
    """What `encode` techniques store does not depend on where it was coded."""
    pytest.importorskip("triton")
    x, pos = numbers(2, 2, 32, 64, seed=8).cpu(), torch.arange(32).expand(2, 2, 32)
    want = make("cpu").encode(x, pos)
    used = []
    monkeypatch.setattr(coders, "choose", lambda *_: used.append(1) or "triton")
    codec = make(DEVICE)
    got = codec.encode(x.to(DEVICE), pos.to(DEVICE))
    assert used
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for name in a:
            same = (a[name].cpu() == b[name]).double().mean()
            turned = "Rotated" in type(codec).__name__  # sums in another order may round a number at a border the other way
            assert a[name].dtype == b[name].dtype and (same > 0.995 if turned else same == 1)
