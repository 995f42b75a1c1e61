"""One token's fused products against float64: norms, biases, gates, rotation, and where keys and values land."""

import pytest
import torch
from kernel_caches import CUDA, DEVICE, error

from kernels import step
from kernels.step import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])
IMPLS = ["torch", "triton"]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,columns,rows", [(1, 64, 33), (2, 576, 20), (3, 200, 7), (1, 1536, 12), (1, 2304, 5)])
def test_add_product(batch, columns, rows, dtype, impl):
    x, w = numbers(batch, columns, dtype=dtype), numbers(rows, columns, dtype=dtype, seed=1)
    bias = numbers(rows, dtype=dtype, seed=2) if rows % 2 else None
    h = numbers(batch, rows, seed=3)
    want = h.double() + reference.product(x, None, 0.0, w, bias, torch.float64)
    step.add_product(x, w, bias, h, impl=impl)
    assert error(h, want) < 1e-5  # the stream and every sum are float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,columns,width", [(1, 64, 40), (4, 96, 9), (1, 1100, 6)])
def test_gated(batch, columns, width, dtype, impl):
    h, norm = numbers(batch, columns) * 3, numbers(columns, dtype=dtype, seed=1)
    w, bias = numbers(2 * width, columns, dtype=dtype, seed=2) / columns**0.5, numbers(2 * width, dtype=dtype, seed=3)
    for b in (None, bias):
        out = poisoned(batch, width, dtype=dtype)
        step.gated(h, norm, 1e-5, w, b, out, impl=impl)
        gate, up = reference.product(h, norm, 1e-5, w, b, torch.float64).chunk(2, -1)
        assert error(out, torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_logits(dtype, impl):
    table, norm = numbers(101, 72, dtype=dtype), numbers(72, dtype=dtype, seed=1)
    ids, h = torch.tensor([[5], [100]], device=DEVICE), poisoned(2, 72)
    step.embed(ids, table, h, impl=impl)
    assert torch.equal(h, table[ids.view(-1)].float())
    got = step.logits(h, norm, 1e-6, table, None, impl=impl)
    assert got.dtype == torch.float32
    assert error(got, reference.product(h, norm, 1e-6, table, None, torch.float64)) < 1e-5


SHAPES = [(1, 9 if CUDA else 3, 3 if CUDA else 1, 64, 576), (2, 4, 2, 16, 40), (1, 2, 1, 80, 64), (3, 3, 3, 6, 32)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch,heads,kv,dim,columns,norms,dtype", [
    (*shape, norms, dtype) for n, shape in enumerate(SHAPES) for norms in (False, True) for m, dtype in enumerate(DTYPES)
    if CUDA or (n + m + norms) % 2  # in the interpreter, every two of the three together
])
def test_heads_turn_and_land(batch, heads, kv, dim, columns, norms, dtype, impl):
    h, norm = numbers(batch, columns) * 2, numbers(columns, dtype=dtype, seed=1)
    rows = (heads + 2 * kv) * dim
    w, bias = numbers(rows, columns, dtype=dtype, seed=2) / columns**0.5, numbers(rows, dtype=dtype, seed=3)
    first, place, lanes = 7, 12, batch * kv
    cos, sin = numbers(9, dim, dtype=dtype, seed=4), numbers(9, dim, dtype=dtype, seed=5)
    slot = (torch.arange(lanes, device=DEVICE) * 11 + 4) % 50
    head_norms = (numbers(dim, dtype=dtype, seed=6), numbers(dim, dtype=dtype, seed=7), 1e-6) if norms else None
    k, v = poisoned(50, dim, dtype=dtype), poisoned(50, dim, dtype=dtype)
    tag = torch.full((60,), -1, dtype=torch.int32, device=DEVICE)
    target = step.Heads(
        poisoned(batch, heads, dim, dtype=dtype), k, v, slot, cos, sin, torch.tensor([[place]], device=DEVICE), first, kv,
        head_norms, tag, slot + 3,
    )
    step.project(h, norm, 1e-5, w, bias, target, impl=impl)

    x = reference.product(h, norm, 1e-5, w, bias, torch.float64).view(batch, -1, dim)
    q, keys, values = x.split([heads, kv, kv], 1)
    if norms:
        q, keys = (reference.normed(part, g, 1e-6) for part, g in ((q, head_norms[0]), (keys, head_norms[1])))
    c, s = cos[place - first].double(), sin[place - first].double()
    tolerance = TOLERANCE[dtype]
    assert error(target.q, reference.turned(q, c, s)) < tolerance
    assert error(k[slot], reference.turned(keys, c, s).flatten(0, 1)) < tolerance
    assert error(v[slot], values.flatten(0, 1)) < tolerance
    untouched = torch.ones(50, dtype=torch.bool, device=DEVICE)
    untouched[slot] = False
    assert k[untouched].isnan().all() and v[untouched].isnan().all()
    assert (tag[slot + 3] == place).all() and (tag == place).sum() == lanes


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at most 4"):
        step.logits(numbers(5, 8), numbers(8), 1e-5, numbers(3, 8), None)
    with pytest.raises(ValueError, match="contiguous weight"):
        step.add_product(numbers(1, 8), numbers(3, 9), None, numbers(1, 3))


@pytest.mark.gpu
def test_a_captured_chain_gives_what_its_launches_give_one_by_one():
    """Launches that start before their predecessors end must still wait for what those write: bit for bit, many times."""
    from kernels import decode

    layers, width, heads, kv, dim, inner, vocab, held = 6, 576, 9, 3, 64, 1536, 3000, 300
    half = lambda *shape, seed: numbers(*shape, dtype=torch.bfloat16, seed=seed) / shape[-1] ** 0.5  # noqa: E731
    table, norm = half(vocab, width, seed=0) * 20, numbers(width, dtype=torch.bfloat16, seed=1)
    parts = [
        (half((heads + 2 * kv) * dim, width, seed=10 * i), half(width, heads * dim, seed=10 * i + 1),
         half(2 * inner, width, seed=10 * i + 2), half(width, inner, seed=10 * i + 3),
         half(kv * 400, dim, seed=10 * i + 4) * 8, half(kv * 400, dim, seed=10 * i + 5) * 8)
        for i in range(layers)
    ]
    cos, sin = numbers(16, dim, dtype=torch.bfloat16, seed=4), numbers(16, dim, dtype=torch.bfloat16, seed=5)
    start = (torch.arange(kv, device=DEVICE) * 400).int()
    length, slot = torch.full((kv,), held + 1, dtype=torch.int32, device=DEVICE), start.long() + held
    position = torch.tensor([[held]], device=DEVICE)
    ids, h = torch.zeros(1, 1, dtype=torch.long, device=DEVICE), poisoned(1, width)
    q, act = poisoned(1, heads, dim, dtype=torch.bfloat16), poisoned(1, inner, dtype=torch.bfloat16)

    def run(after=lambda: None):
        step.embed(ids, table, h)
        after()
        for qkv, out, up, down, k, v in parts:
            step.project(h, norm, 1e-5, qkv, None, step.Heads(q, k, v, slot, cos, sin, position, held - 3, kv))
            after()
            tier = decode.TierView(16, k, v, start, length, 400)
            got = decode.attend(q, [tier], dim**-0.5, early=True).out
            after()
            step.add_product(got.view(1, -1), out, None, h)
            after()
            step.gated(h, norm, 1e-5, up, None, act)
            after()
            step.add_product(act, down, None, h)
            after()
        return step.logits(h, norm, 1e-5, table, None)

    run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    for trial in range(60):
        ids.fill_(trial * 37 % vocab)
        want = run(torch.cuda.synchronize).clone()
        for x in (h, q, act, logits):
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.isfinite(want).all() and torch.equal(logits, want)
