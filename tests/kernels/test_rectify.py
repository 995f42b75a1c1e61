"""Block-sparse and rectified prefill against float64, through both paths."""

import pytest
import torch
from kernel_caches import DEVICE, error

from kernels import prefill
from kernels.cpu_attention import materialised
from kernels.prefill import blocks, rectify


def inputs(batch, heads, kv_heads, rows, keys, dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + keys + dim)
    sizes = (heads, rows), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, h, n, dim, generator=g).to(DEVICE, dtype) for h, n in sizes]


def test_lists_name_the_kept_blocks_in_order():
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.5
    keep[0, 0, 0], keep[1, 2, 3] = False, True
    index, count = blocks.lists(keep)
    for i, n, row in zip(index.flatten(0, 2), count.flatten(), keep.flatten(0, 2)):
        assert i[:n].tolist() == row.nonzero().flatten().tolist()


@pytest.mark.parametrize("block,rows,lead,dim", [
    (16, 50, 0, 64), (32, 70, 9, 80), (64, 64, 0, 16), (128, 130, 3, 64), (32, 1, 31, 128)])
def test_pooled_blocks(block, rows, lead, dim):
    x = inputs(2, 3, 1, rows, 1, dim)[0].transpose(1, 2).contiguous().transpose(1, 2)  # as a model's heads lie in memory
    for got, want in zip(rectify.pool(x, block, lead, impl="triton"), rectify.pool(x.double(), block, lead, impl="torch")):
        assert got.shape == want.shape == (2, 3, -(-(lead + rows) // block), dim) and error(got, want) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("size,rows,keys,dim,dtype", [
    (16, 40, 40, 64, torch.float32), (32, 50, 83, 80, torch.float16), (64, 100, 130, 64, torch.float16),
    (128, 140, 140, 64, torch.float32), (64, 90, 101, 144, torch.float32)])
def test_rows_read_their_blocks(size, rows, keys, dim, dtype, impl):
    """Any blocks for any head and sequence, calls that start inside a block, and rows left with nothing."""
    q, k, v = inputs(2, 4, 2, rows, keys, dim, dtype)
    start = keys - rows
    shape = (2, 4, -(-(start % size + rows) // size), -(-keys // size))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4
    keep[0, 1, 0] = False
    got = prefill.block_sparse(q, k, v, dim**-0.5, keep, size, impl=impl)
    row = (torch.arange(rows) + start % size) // size
    mask = keep.cpu()[:, :, row][..., torch.arange(keys) // size] & (torch.arange(keys) <= torch.arange(rows)[:, None] + start)
    wide = [x.cpu().double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    out, lse = materialised(*wide, dim**-0.5, mask=mask)
    limit = 1e-5 if dtype == torch.float32 else 2e-3
    assert error(got.out, out) <= limit and torch.isfinite(got.out).all()
    seen = mask.any(-1)
    assert torch.equal(torch.isfinite(got.lse.cpu()), seen) and (got.out.cpu()[~seen] == 0).all() and not seen.all()
    assert (got.lse.cpu() - lse)[seen].abs().max() < 5e-3


@pytest.mark.parametrize("jensen", [False, True])
@pytest.mark.parametrize("block,rows,keys", [(16, 90, 90), (32, 70, 110), (64, 150, 150)])
def test_rectified_is_its_formula(block, rows, keys, jensen):
    """Plan and outputs, against the same composition in float64 and against the formula of one row."""
    q, k, v = inputs(1, 4, 2, rows, keys, 64)
    centres = [torch.randn(1, h, 10, 64, generator=torch.Generator().manual_seed(h)).to(DEVICE) for h in (4, 2)]
    at = torch.arange(keys, device=DEVICE) // block  # rows of a block resemble each other, so their means can be trusted
    q, k = q * 0.1 + centres[0][:, :, at[keys - rows :]], k * 0.1 + centres[1][:, :, at]
    options = dict(block=block, share=0.5, jensen=jensen)
    plans = [rectify.plan(*x, 0.125, impl=impl, **options) for impl, x in (
        ("triton", (q, k, v)), ("torch", (q.double(), k.double(), v.double())))]
    assert torch.equal(plans[0].critical, plans[1].critical) and torch.equal(plans[0].rectified, plans[1].rectified)
    assert plans[0].rectified.any() and error(plans[0].p, plans[1].p) < 1e-5
    got = prefill.rectified(q, k, v, 0.125, impl="triton", **options)
    want = prefill.rectified(q.double(), k.double(), v.double(), 0.125, impl="torch", **options)
    assert error(got, want) < 1e-5
    h, i, start = 3, rows - 1, keys - rows
    mine = [x[0, h].cpu() for x in (plans[1].p, plans[1].critical, plans[1].rectified)]
    p, critical, trusted = (x[(start % block + i) // block] for x in mine)
    kept, column = 1 - p[trusted].sum(), torch.arange(keys) // block
    s = (q[0, h, i].cpu().double() @ k[0, h // 2].cpu().double().T * 0.125).masked_fill(~critical[column], -torch.inf)
    means = torch.stack([v[0, h // 2].cpu().double()[column == b].mean(0) for b in range(len(p))])
    exact = kept * s.softmax(-1) @ v[0, h // 2].cpu().double() + (p * trusted) @ means
    assert error(got[0, h, i], exact) < 1e-5


def test_a_share_of_one_is_dense():
    q, k, v = inputs(1, 2, 1, 70, 100, 64, torch.float16)
    want = prefill.attend(q.double(), k.double(), v.double(), 0.125, impl="torch").out
    for impl in ("torch", "triton"):
        assert error(prefill.rectified(q, k, v, 0.125, block=32, share=1.0, impl=impl), want) < 2e-3


def test_blocks_that_do_not_fit_are_refused():
    q, k, v = inputs(1, 2, 1, 70, 100, 64)
    keep = torch.ones(1, 2, 3, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="expected a size"):
        prefill.block_sparse(q, k, v, 1.0, keep, 24)
    with pytest.raises(ValueError, match="expected a size"):
        prefill.block_sparse(q, k, v, 1.0, keep[:, :, :2], 32)
    with pytest.raises(ValueError, match="block lists"):
        prefill.attend(q, k, v, 1.0, blocks=blocks.lists(keep))
