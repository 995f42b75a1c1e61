"""The attention view against torch, whole maps and corners, every pooling."""

import pytest
import torch
from kernel_caches import BEST, DEVICE, error

from kernels import view


def head(n=150, dim=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(n, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    s = (q.double() @ k.double().mT * dim**-0.5).masked_fill(torch.ones(n, n, device=DEVICE).triu(1).bool(), -torch.inf)
    return q, k, torch.logsumexp(s, -1).float()


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize("rows,cols,steps", [
    ((0, 150), (0, 150), (7, 12)), ((40, 99), (3, 80), (1, 1)), ((100, 150), (64, 150), (50, 64)),
])
def test_matches_torch(kind, rows, cols, steps):
    q, k, lse = head()
    options = dict(rows=rows, cols=cols, row_step=steps[0], col_step=steps[1], kind=kind)
    got = view.pooled(q, k, lse, 0.125, impl="triton", **options)
    want = view.pooled(q.double(), k.double(), lse, 0.125, impl="torch", **options)
    assert got.shape == want.shape and error(got, want) < 1e-5


def test_options_and_half_precision():
    q, k, lse = head(dtype=torch.float16)
    death = torch.where(torch.arange(150, device=DEVICE) % 3 == 0, 90, 2**31 - 1).int()
    options = dict(rows=(20, 150), cols=(0, 140), row_step=10, col_step=16, kind="sum", window=60, softcap=4.0, death=death,
                   key_bias=torch.randn(150, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    got = view.pooled(q, k, lse, 0.125, impl="triton", **options)
    assert error(got, view.pooled(q.double(), k.double(), lse, 0.125, impl="torch", **options)) < 2e-3


def test_rows_of_a_whole_map_sum_to_one():
    q, k, lse = head(70)
    got = view.pooled(q, k, lse, 0.125, rows=(0, 70), cols=(0, 70), row_step=1, col_step=30, kind="sum", impl=BEST)
    assert torch.allclose(got.sum(1), torch.ones(70, device=DEVICE), atol=1e-4)


def test_windows_outside_are_refused():
    q, k, lse = head()
    with pytest.raises(ValueError, match="do not lie"):
        view.pooled(q, k, lse, 1.0, rows=(0, 151), cols=(0, 10), row_step=1, col_step=1)
