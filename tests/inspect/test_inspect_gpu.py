"""The same functions on a CUDA device give the same numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from brute_force import check

from lab.inspect import pooled
from lab.inspect.capture import NEVER, Capture
from lab.inspect.diagnostics import Session, registry, run
from lab.inspect.heads import MEASURES, grid, stats
from lab.inspect.view import cell, row, view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def pair(t: int = 40) -> tuple[Capture, Capture]:
    """One capture on the CPU and the same on the GPU."""
    torch.manual_seed(0)
    death = torch.where(torch.rand(2, t) < 0.4, torch.arange(t).expand(2, t) + 7, NEVER)
    fields = {
        "q": torch.randn(4, t, 8),
        "k": torch.randn(2, t, 8),
        "death": death,
        "bits": torch.full((2, t), 4, dtype=torch.uint8),
    }
    return Capture(**fields, window=30), Capture(**{n: x.cuda() for n, x in fields.items()}, window=30)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("head", [1, "mean", "max"])
@pytest.mark.parametrize("stored", [False, True])
def test_views(monkeypatch, head, pool, stored):
    if stored:
        monkeypatch.setattr(pooled, "DIRECT_GPU", 0)
    host, device = pair()
    every = [(0, h) for h in range(4)] if isinstance(head, str) else [(0, head)]
    v = view(device, head, (3, 39), (1, 38), 6, 7, pool)
    check(v, [host], every, head if isinstance(head, str) else "mean")
    np.testing.assert_array_equal(v.bits, view(host, head, v.rows, v.cols, *v.shape[::-1], pool).bits)
    np.testing.assert_allclose(row(device, head, 30), row(host, head, 30), atol=1e-5)
    assert cell(device, head, 30, 2).why == cell(host, head, 30, 2).why


@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("head", [1, "mean", "max"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_layers_on_both(pool, head, over):
    (h1, d1), (h2, d2) = pair(), pair()
    a, b = (view(c, head, (3, 39), (1, 38), 6, 7, pool, layers=over) for c in ([h1, h2], [d1, d2]))
    np.testing.assert_allclose(a.values, b.values, atol=1e-5)


def test_heads():
    host, device = pair()
    a, b = stats(host, range(40)), stats(device, range(40))
    for name in MEASURES:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4)
    np.testing.assert_allclose(grid([host], 8).values, grid([device], 8).values, atol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, d in registry().items() if "captures" in d.needs and "probe" not in d.needs]
)
def test_diagnostics(name):
    host, device = pair()
    values = torch.randn(2, 40, 8)
    session = Session(
        captures=[host] * 2,
        values=[values] * 2,
        prompt_tokens=20,
        logprobs=[-1.0] * 40,
        documents=[(0, 8), (8, 16), (16, 24), (24, 32)],
        marked=[30, 34],
        options={"steps": 3, "permutations": 3, "first": 2, "last": 6},
    )
    moved = dataclasses.replace(session, captures=[device] * 2, values=[values.cuda()] * 2)
    a, b = run(name, session), run(name, moved)
    assert a.keys() == b.keys()
    if name not in ("counterfactual", "deviation", "atlas"):
        for key in a:
            if a[key].dtype.kind == "f":
                np.testing.assert_allclose(a[key], b[key], atol=2e-3, rtol=1e-2)
