"""Prefill attention against its float64 reference."""

import pytest
import torch
from kernel_caches import BEST, CUDA, DEVICE, error

from kernels import prefill
from kernels.prefill import reference
from kernels.prefill.options import normalise

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
LONG = 5 if CUDA else 1


def inputs(heads, kv_heads, rows, keys, dim, dtype=torch.float16, batch=1):
    generator = torch.Generator().manual_seed(heads + rows + dim)
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def check(q, k, v, **options):
    want = {x: options.pop(x, False) for x in ("want_mass", "want_entropy")}
    scale = q.shape[-1] ** -0.5
    got = prefill.attend(q, k, v, scale, impl=BEST, **want, **options)
    o = normalise(q, k, **{**dict(start=None, window=None, sinks=0, rows=None, blocks=None, softcap=None, sink=None,
                                  key_bias=None, weight="softmax"), **options})
    out, lse, entropy, mass = reference.attend(q, k, v, scale, o)
    limit = TOLERANCE[q.dtype]
    assert error(got.out, out) <= limit
    seen = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(got.lse), seen)
    assert (got.lse.double() - lse)[seen].abs().max() <= max(2 * limit, 1e-4) * max(1.0, float(lse[seen].abs().max()))
    if want["want_entropy"]:
        assert (got.entropy.double() - entropy).abs().max() <= 0.02
    if want["want_mass"]:
        assert error(got.mass, mass) <= limit
        if options.get("weight", "softmax") == "softmax" and options.get("sink") is None:
            rows_seen = float(seen.sum())
            assert abs(float(got.mass.sum()) - rows_seen) <= 2e-3 * rows_seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + ([torch.bfloat16] if CUDA else []))
@pytest.mark.parametrize("dim,rows", [(64, 70), (96, 33), (128, 64), (256, 17), (80, 1)])
def test_causal(dtype, dim, rows):
    q, k, v = inputs(4, 2, rows * LONG, rows * LONG, dim, dtype)
    check(q, k, v, want_mass=True, want_entropy=True)


@pytest.mark.parametrize("window,sinks", [(16, 0), (1, 0), (40, 5), (33, 32), (7, 70), (1000, 3)])
def test_window_and_sinks(window, sinks):
    q, k, v = inputs(2, 1, 100 * LONG, 100 * LONG, 64)
    check(q, k, v, window=window, sinks=sinks, want_mass=True)


def test_spans_per_head_and_chunk_in_the_middle():
    q, k, v = inputs(4, 2, 45 * LONG, 130 * LONG, 64, batch=2)
    spans = torch.tensor([3, 20, 64, 500])
    check(q, k, v, window=spans, sinks=torch.tensor([0, 4, 33, 1]), want_mass=True, want_entropy=True)
    check(q, k, v, start=20 * LONG, window=spans, want_mass=True)


def test_options():
    q, k, v = inputs(4, 2, 70, 70, 64)
    bias, sink = torch.randn(4, 70).to(DEVICE), torch.randn(4).to(DEVICE)
    check(q, k, v, softcap=3.0, key_bias=bias, want_mass=True)
    check(q, k, v, sink=sink, want_mass=True, want_entropy=True)


@pytest.mark.parametrize("weight", ["sigmoid", "relu"])
def test_weights_without_normaliser(weight):
    q, k, v = inputs(2, 1, 70 * LONG, 70 * LONG, 64)
    check(q, k, v, weight=weight, want_mass=True)
    check(q, k, v, weight=weight, window=20, sinks=3, key_bias=torch.randn(2, k.shape[2]).to(DEVICE))


def test_chosen_rows():
    q, k, v = inputs(2, 1, 100, 150, 64)
    rows = torch.tensor([50, 51, 80, 99, 149], dtype=torch.int32, device=DEVICE)
    check(q, k, v, rows=rows)
    check(q, k, v, rows=rows, window=20, sinks=2)


def test_block_lists():
    q, k, v = inputs(2, 1, 200, 200, 64)
    index = torch.tensor([[[[0, 0, 0, 0], [0, 2, 3, 0]], [[1, 0, 0, 0], [3, 1, 0, 0]]]], dtype=torch.int32, device=DEVICE)
    count = torch.tensor([[[1, 3], [2, 2]]], dtype=torch.int32, device=DEVICE)
    check(q, k, v, blocks=(index, count))


def test_strided_inputs_need_no_copy():
    base = torch.randn(1, 50, 4, 64).to(DEVICE, torch.float16)
    q = base.transpose(1, 2)
    check(q, q[:, :2], q[:, 2:], want_mass=True)


def test_delta():
    q, k, v = inputs(2, 1, 300, 300, 64)
    dense = reference.attend(q, k, v, 0.125, normalise(q, k, start=None, window=None, sinks=0, rows=None, blocks=None,
                                                      softcap=None, sink=None, key_bias=None, weight="softmax"))[0]
    got = prefill.delta(q, k, v, 0.125, gamma=32, sinks=4, window=64, impl="triton")
    assert error(got[:, :, :160:32], dense[:, :, :160:32]) < 3e-3 and error(got[:, :, 172:], dense[:, :, 172:]) < 3e-3
    assert error(prefill.delta(q, k, v, 0.125, gamma=1, sinks=4, window=64, impl="triton"), dense) < 3e-3
    torch_path = prefill.delta(q.float(), k.float(), v.float(), 0.125, gamma=32, sinks=4, window=64, impl="torch")
    assert error(got, torch_path) < 3e-3


def test_torch_path_and_column_mass():
    q, k, v = inputs(4, 2, 40, 60, 64, torch.float32)
    a = prefill.attend(q, k, v, 0.125, window=9, sinks=2, want_mass=True, impl="torch")
    b = prefill.column_mass(q, k, a.lse, 0.125, window=9, sinks=2, impl="torch")
    assert error(b, a.mass) < 1e-5


@pytest.mark.parametrize("dim,wide", [(32, 48), (48, 32), (300, 300)])
def test_heads_no_tile_holds_take_the_torch_path(dim, wide):
    """Values wider or narrower than keys (latent attention), and very wide heads."""
    q, k, _ = inputs(2, 1, 20, 20, dim, torch.float32)
    v = inputs(2, 1, 20, 20, wide, torch.float32)[2]
    got = prefill.attend(q, k, v, 0.125)
    mask = torch.ones(20, 20, dtype=torch.bool, device=DEVICE).tril()
    want = (q.double() @ k.double().mT * 0.125).masked_fill(~mask, -torch.inf).softmax(-1) @ v.double()
    assert got.out.shape == (1, 2, 20, wide) and error(got.out, want) < 1e-5
    with pytest.raises(ValueError, match="one width"):
        prefill.attend(q, k, v, 0.125, impl="triton")


def test_refusals():
    q, k, v = inputs(3, 1, 8, 8, 64)
    with pytest.raises(ValueError, match="multiple"):
        prefill.attend(q, k.expand(1, 2, 8, 64), v, 1.0)
    with pytest.raises(ValueError, match="weight"):
        prefill.attend(q, k, v, 1.0, weight="softmin")
    with pytest.raises(ValueError, match="per-head"):
        prefill.attend(q, k, v, 1.0, window=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_library_path_gives_the_same_lse_and_mass(dtype):
    q, k, v = inputs(8, 2, 1000, 1000, 128, dtype)
    a = prefill.attend(q, k, v, 0.0884, want_mass=True)
    b = prefill.attend(q, k, v, 0.0884, want_mass=True, impl="triton")
    assert error(a.out, b.out) < 8e-3 and error(a.lse, b.lse) < 1e-3 and error(a.mass, b.mass) < 3e-3


@pytest.mark.parametrize("heads,kv_heads,dim,rows,extra,gamma,sinks,window", [
    (4, 1, 64, 170, 0, 32, 4, 64), (2, 2, 64, 145, 60, 16, 0, 33), (3, 1, 80, 201, 0, 64, 64, 40), (8, 1, 128, 140, 0, 32, 10, 1),
    (2, 1, 64, 100, 0, 16, 4, 1000), (2, 1, 64, 90, 200, 64, 5, 20), (2, 1, 256, 130, 0, 32, 40, 7)])
def test_delta_joined_is_its_definition(heads, kv_heads, dim, rows, extra, gamma, sinks, window):
    """Against the three passes in float64: anchors inside tiles, ragged ends, rows before the window, chunks in the middle."""
    rows *= 2 * LONG if CUDA else 1  # tiles of the interpreter have 32 rows, those of a card up to 128
    q, k, v = inputs(heads, kv_heads, rows, rows + extra, dim, batch=2)
    options = dict(gamma=gamma, sinks=sinks, window=window)
    want = prefill.delta(q.double(), k.double(), v.double(), dim**-0.5, impl="torch", **options)
    assert error(prefill.delta(q, k, v, dim**-0.5, impl="triton", way="joined", **options), want) < 2e-3
    options["start"] = extra // 2
    if extra:
        want = prefill.delta(q.double(), k.double(), v.double(), dim**-0.5, impl="torch", **options)
        assert error(prefill.delta(q, k, v, dim**-0.5, impl="triton", way="joined", **options), want) < 2e-3


def test_delta_joined_in_float32_and_refusals():
    q, k, v = inputs(4, 2, 200, 200, 64, torch.float32)
    want = prefill.delta(q.double(), k.double(), v.double(), 0.125, impl="torch", gamma=16, sinks=3, window=21)
    for way in ("joined", "passes"):
        got = prefill.delta(q, k, v, 0.125, impl="triton", way=way, gamma=16, sinks=3, window=21)
        assert error(got, want) < 1e-5
    with pytest.raises(ValueError, match="plain softmax"):
        prefill.delta(q, k, v, 0.125, impl="triton", way="joined", softcap=3.0)
    with pytest.raises(ValueError, match="unknown way"):
        prefill.delta(q, k, v, 0.125, way="quick")


def test_delta_with_a_window_for_each_head():
    """Spans of each head take the three passes, whatever the way."""
    q, k, v = (torch.randn(1, 4, 40, 16, device=DEVICE) for _ in range(3))
    window = torch.tensor([8, 16, 32, 40], device=DEVICE)
    got, want = (prefill.delta(q, k, v, 0.25, gamma=16, sinks=2, window=window, impl=impl) for impl in ("triton", "torch"))
    assert torch.allclose(got, want, atol=1e-4)
