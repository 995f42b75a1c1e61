"""One entry of every lane leaves in place: against the same thing written with lists, torch and Triton alike."""

import pytest
import torch
from kernel_caches import DEVICE

from kernels import encode


def by_hand(pos, score, n, first, last):
    """(index that leaves) for one lane; of equals the later one, and the newest where everything is protected."""
    newest = pos[n - 1]
    free = [i for i in range(n) if first <= pos[i] <= newest - last]
    return max(free, key=lambda i: (-score[i], i)) if free else n - 1


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("n,first,last,kind", [
    (9, 0, 1, "score"), (40, 4, 1, "age"), (1100, 3, 20, "ties"), (6, 3, 3, "score"), (7, 0, 0, "score"),
])
def test_evict(impl, n, first, last, kind):
    lanes, cap = 3, n + 3
    g = torch.Generator().manual_seed(n)
    tags = torch.stack([torch.randperm(4 * n, generator=g)[:cap] for _ in range(lanes)]).int()
    tags[:, n - 1] = 4 * n
    score = None if kind == "age" else torch.rand(lanes, n, generator=g)
    if kind == "ties":
        score = (score * 4).floor()
    stat, k, v = (
        torch.rand(lanes, cap, generator=g), torch.randn(lanes, cap, 16, generator=g),
        torch.randn(lanes, n + 1, 24, generator=g),
    )
    log, step = torch.zeros(4, lanes, dtype=torch.int32), torch.tensor([2])
    want = [
        by_hand(tags[i].tolist(), tags[i].tolist() if score is None else score[i].tolist(), n, first, last)
        for i in range(lanes)
    ]
    old = [x.clone() for x in (tags, stat, k, v)]
    tensors = [x.to(DEVICE) for x in (tags, stat, k, v, log, step)]
    got_tags, got_stat, got_k, got_v, got_log, at_step = tensors
    slot = encode.evict(
        got_tags, n, first, last, score=None if score is None else score.to(DEVICE), stat=got_stat, rows=(got_k, got_v),
        log=got_log, step=at_step, impl=impl,
    )
    assert slot.tolist() == want
    assert got_log[2].tolist() == [int(old[0][i, w]) for i, w in enumerate(want)] and not got_log[:2].any()
    for lane, w in enumerate(want):
        for got, before in zip((got_tags, got_stat, got_k, got_v), old):
            expected = before[lane].clone()
            expected[w] = before[lane][n - 1]
            if before is old[0]:
                expected[n - 1] = before[lane][n - 1] + 1
            if before is old[1]:
                expected[n - 1] = 0
            assert torch.equal(got[lane].cpu(), expected)


def test_the_newest_leaves_where_it_scores_lowest():
    tags, score = torch.arange(5, dtype=torch.int32)[None].to(DEVICE), torch.tensor([[3.0, 2, 4, 5, 1]], device=DEVICE)
    for impl in ("torch", "triton"):
        mine = tags.clone()
        assert encode.evict(mine, 5, 0, 0, score=score, impl=impl).tolist() == [4] and mine[0].tolist() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_sums_grow_and_the_lightest_leaves(impl):
    g = torch.Generator().manual_seed(8)
    tags = torch.arange(30, dtype=torch.int32).repeat(3, 1).to(DEVICE)
    stat, add = torch.rand(3, 32, generator=g), torch.rand(3, 30, generator=g)
    total = stat[:, :30] + add
    ours = stat.to(DEVICE)
    slot = encode.evict(tags, 30, 2, 10, stat=ours, add=add.to(DEVICE), impl=impl)
    assert slot.tolist() == [2 + int(row[2:20].argmin()) for row in total]
    for lane, at in enumerate(slot.tolist()):
        expected = total[lane].clone()
        expected[at], expected[29] = total[lane, 29], 0
        assert torch.allclose(ours[lane, :30].cpu(), expected) and torch.equal(ours[lane, 30:].cpu(), stat[lane, 30:])


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_the_first_rows_turn_on(impl):
    g = torch.Generator().manual_seed(3)
    tags = torch.arange(9, dtype=torch.int32).repeat(2, 1).to(DEVICE)
    k, v = (torch.randn(2, 9, 16, generator=g).to(DEVICE) for _ in range(2))
    base, quarter = (torch.randn(2, 3, 16, generator=g).to(DEVICE) for _ in range(2))
    cos, sin = (torch.randn(5, 16, generator=g).to(DEVICE) for _ in range(2))
    old = k.clone()
    encode.evict(tags, 9, 3, 1, rows=(k, v), step=torch.tensor([2], device=DEVICE),
                 front=encode.Front(base, quarter, cos, sin), impl=impl)
    assert torch.allclose(k[:, :3], base * cos[3] + quarter * sin[3], atol=1e-6)
    assert torch.equal(k[:, 3], old[:, 8]) and torch.equal(k[:, 4:], old[:, 4:])
