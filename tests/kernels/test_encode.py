"""Writing the cache: codes equal to the torch path bit for bit, demotion, compaction in place."""

import pytest
import torch
from kernel_caches import CUDA, DEVICE, error, make_tier

from kernels import codes, decode, encode
from kernels.decode.reference import dequantise


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim,group", [(64, 64), (128, 32), (96, 32), (80, 16)])
def test_codes_equal_torch(bits, dim, group):
    x = torch.randn(37, dim, generator=torch.Generator().manual_seed(dim)).to(DEVICE) * 3
    x[3] = 1.25  # a constant vector has scale zero
    x[5] = 0
    got = encode.encode_tokens(x, bits, group, impl="triton")
    want = codes.encode_tokens(x.cpu(), bits, group)
    for a, b in zip(got, want):
        assert torch.equal(a.cpu(), b)
    decoded = codes.decode_tokens(*got, bits)
    scale = got[1].float().repeat_interleave(group, -1)
    assert ((decoded - x).abs() <= scale / 2 + 1e-5).all()


@pytest.mark.parametrize("bits,dim,group", [(8, 64, 64), (4, 96, 32), (2, 64, 16)])
def test_both_sides_in_one_launch(bits, dim, group):
    """Rows gathered or in order, into places that start further on for each lane."""
    g = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(7, dim, generator=g).to(DEVICE) for _ in range(2))
    source, slots = torch.tensor([6, 0, 3, 3, 1], device=DEVICE), torch.tensor([4, 0, 2, 1, 3], device=DEVICE)
    made = lambda: tuple(torch.zeros(50, w, dtype=t, device=DEVICE) for w, t in (  # noqa: E731
        (dim * bits // 8, torch.uint8), (dim // group, torch.float16), (dim // group, torch.float16)))
    got, want = (made(), made()), (made(), made())
    encode.encode_sides((k, v), bits, group, got, slots, stride=9, source=source, impl="triton")
    encode.encode_sides((k, v), bits, group, want, slots, stride=9, source=source, impl="torch")
    one = made()
    encode.encode_sides((v,), bits, group, (one,), slots, impl="triton")
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1])):
        assert torch.equal(a, b) and a.any()
    for a, b in zip(one, codes.encode_tokens(v.cpu(), bits, group)):
        assert torch.equal(a[slots].cpu(), b[:5])


def test_append_skips_negative_slots_and_demote_moves_rows():
    generator = torch.Generator().manual_seed(1)
    wide = make_tier(16, [20, 9], 64, device=DEVICE, generator=generator)
    narrow = make_tier(4, [30, 30], 64, channels=32, device=DEVICE, generator=generator)
    before = narrow.k.clone()
    source = torch.tensor([0, 5, 28, 3], device=DEVICE)
    target = torch.tensor([7, -1, 40, 59], device=DEVICE)
    encode.demote(wide, source, narrow, target, impl="triton")
    got = dequantise(narrow, target[target >= 0], torch.float32)
    want = dequantise(wide, source[target >= 0], torch.float32)
    assert error(got[0], want[0]) < 0.15 and error(got[1], want[1]) < 0.15
    untouched = torch.ones(60, dtype=torch.bool, device=DEVICE)
    untouched[target[target >= 0]] = False
    assert torch.equal(narrow.k[untouched], before[untouched])
    encode.append(wide, torch.ones(2, 64, device=DEVICE), torch.zeros(2, 64, device=DEVICE),
                  torch.tensor([-1, 4], device=DEVICE), impl="triton")
    assert (wide.k[4] == 1).all() and (wide.v[4] == 0).all() and not (wide.k[0] == 1).all()


@pytest.mark.parametrize("bits,kind", [(16, "token"), (4, "token"), (2, "block")])
def test_compaction_keeps_order_and_contents(bits, kind):
    lengths = [300 if CUDA else 150, 0, 33, 5]
    make = lambda: make_tier(bits, lengths, 64, channels=32, kind=kind, spare=4, device=DEVICE,  # noqa: E731
                             generator=torch.Generator().manual_seed(3))
    a, b = make(), make()
    keep = torch.rand(a.slots, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.6
    keep[a.start[3] : a.start[3] + 5] = False
    pos_a = torch.arange(a.slots, dtype=torch.int32, device=DEVICE)
    pos_b = pos_a.clone()
    encode.compact(a, keep, [pos_a], impl="triton")
    encode.compact(b, keep, [pos_b], impl="torch")
    assert torch.equal(a.length, b.length) and a.k_block == 0
    for s, n in zip(a.start.tolist(), a.length.tolist()):
        rows = torch.arange(s, s + n, device=DEVICE)
        for x, y in zip(dequantise(a, rows, torch.float32), dequantise(b, rows, torch.float32)):
            assert torch.equal(x, y)
        assert torch.equal(pos_a[rows], pos_b[rows])
    q = torch.randn(1, 8, 64).to(DEVICE, torch.float16)
    assert error(decode.attend(q, [a], 0.125, impl="triton").out, decode.attend(q, [b], 0.125, impl="torch").out) < 2e-3


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="groups"):
        encode.encode_tokens(torch.zeros(2, 64), 4, 48)
