"""Page summaries, scores, selection, and decode over the selected pages."""

from dataclasses import replace

import pytest
import torch
from kernel_caches import BEST, CUDA, DEVICE, error, make_tier

from kernels import decode, select
from kernels.decode import reference as decode_reference

LENGTHS = [130, 0, 37, 16] + ([9001] if CUDA else [])


def world(dim=64, group=3, dtype=torch.float16):
    generator = torch.Generator().manual_seed(dim + group)
    tier = make_tier(16, LENGTHS, dim, dtype=dtype, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, len(LENGTHS) * group, dim, generator=generator).to(DEVICE, dtype)
    return tier, q


@pytest.mark.parametrize("kind", ["bounds", "mean"])
@pytest.mark.parametrize("dim,page", [(64, 16), (96, 16), (64, 7)])
def test_scores_match_torch(kind, dim, page):
    tier, q = world(dim)
    low, high = select.page_summaries(tier, page, kind, impl="triton")
    low2, high2 = select.page_summaries(tier, page, kind, impl="torch")
    assert error(low, low2) < 1e-3 and (high is None or error(high, high2) < 1e-6)
    got = select.page_scores(q, low, high, tier.length, page, impl="triton")
    want = select.page_scores(q, low, high, tier.length, page, impl="torch")
    alive = torch.isfinite(want)
    assert torch.equal(alive, torch.isfinite(got)) and error(got[alive], want[alive]) < 2e-3


def test_bounds_are_never_below_a_logit():
    tier, q = world()
    low, high = select.page_summaries(tier, 16, impl=BEST)
    scores = select.page_scores(q, low, high, tier.length, impl="torch")
    rows = q.view(len(LENGTHS), -1, 64).float()
    for lane, n in enumerate(LENGTHS):
        s = int(tier.start[lane])
        logits = (rows[lane] @ tier.k[s : s + n].float().mT).amax(0)
        for page in range(-(-n // 16)):
            assert logits[page * 16 : page * 16 + 16].max() <= scores[lane, page] + 1e-3


@pytest.mark.parametrize("count,last", [(1, 1), (1, 0), (3, 1), (3, 0), (64, 1), (64, 0), (7, 40), (64, 700)])
def test_top_pages_with_ties(count, last):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(-3, 3, (4, 40), generator=generator).float().to(DEVICE)
    scores[0, 5] = -0.0
    length = torch.tensor([640, 1, 0, 301], dtype=torch.int32, device=DEVICE)
    got = select.top_pages(scores, length, count, last=last, impl="triton")
    assert torch.equal(got, select.top_pages(scores, length, count, last=last, impl="torch"))


def test_top_pages_in_two_rounds():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 200, (2, 1700), generator=generator).float().to(DEVICE)
    length = torch.tensor([27200, 9000], dtype=torch.int32, device=DEVICE)
    got = select.top_pages(scores, length, 20, impl="triton")
    assert torch.equal(got, select.top_pages(scores, length, 20, impl="torch"))


@pytest.mark.parametrize("way", ["steps", "joined"])
def test_lanes_may_hold_different_numbers_in_front(way):
    pytest.importorskip("triton")
    generator, ahead = torch.Generator().manual_seed(0), torch.tensor([100, 5, 0], dtype=torch.int32, device=DEVICE)
    whole = make_tier(16, [300, 240, 160], 64, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, 6, 64, generator=generator).to(DEVICE, torch.float16)
    tier, front = (
        replace(whole, start=whole.start + ahead, length=whole.length - ahead), replace(whole, length=ahead, capacity=100)
    )
    mean, _ = select.page_summaries(tier, 16, "mean", impl="torch")
    pages = select.best_pages(q, mean, None, tier.length, 6, last=20, impl="torch")
    out = decode_reference.attend(q, [select.read_pages(tier, pages), front], 0.125)[0]
    got = select.attend_best(q, tier, mean, None, 6, 0.125, last=20, impl="triton", way=way, front=front)
    assert error(got.out, out) < 2e-3


@pytest.mark.parametrize("impl", ["torch", BEST])
@pytest.mark.parametrize("dim,page", [(64, 16), (80, 7)])
def test_bounds_that_grow_are_bounds_built_afresh(dim, page, impl):
    """Row by row from one entry on, over pages that begin and fill; what stood in a page not begun does not count."""
    generator = torch.Generator().manual_seed(page)
    final = [40, 1, 19, 33, 18]
    tier = make_tier(16, final, dim, device=DEVICE, generator=generator, spare=5)
    low, high = (x.clone() for x in select.page_summaries(tier, page, impl="torch"))
    low[:], high[:] = 9e3, -9e3
    for step in range(max(final)):
        tier.length.copy_(torch.tensor([max(1, n - max(final) + step + 1) for n in final]))
        select.grow_bounds(low, high, tier.k, tier.start, tier.length, page, impl=impl)
    want = select.page_summaries(tier, page, impl="torch")
    for lane, n in enumerate(final):
        pages = -(-n // page)
        assert torch.equal(low[lane, :pages], want[0][lane, :pages]) and torch.equal(high[lane, :pages], want[1][lane, :pages])
        assert (low[lane, pages:] == 9e3).all()


@pytest.mark.parametrize("pages,count,want", [(44, 7, 1), (44, 7, 5), (44, 7, 99), (1030, 40, 9)])
def test_fewer_pages_than_there_is_room_for(pages, count, want):
    """A number on the device says how many pages: the same as asking for that many, in every way to choose and to read."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(pages)
    tier = make_tier(16, [pages * 16 - 3, 0, 37], 64, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, 6, 64, generator=generator).to(DEVICE, torch.float16)
    low, high = select.page_summaries(tier, 16, impl="torch")
    number, few = torch.tensor([want], dtype=torch.int32, device=DEVICE), min(want, count)
    expected = select.best_pages(q, low, high, tier.length, few, impl="torch")
    for impl, way in (("torch", "auto"), ("triton", "slices"), ("triton", "scores")):
        got = select.best_pages(q, low, high, tier.length, count, impl=impl, way=way, want=number)
        assert torch.equal(got[:, :few], expected) and (got[:, few:] == -1).all()
    out = decode_reference.attend(q, [select.read_pages(tier, expected)], 0.125)[0]
    for impl, way in (("torch", "auto"), ("triton", "joined"), ("triton", "steps")):
        assert error(select.attend_best(q, tier, low, high, count, 0.125, impl=impl, way=way, want=number).out, out) < 2e-3


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sinks_gates_and_caps_of_chosen_pages(softcap):
    tier, q = world()
    low, high = select.page_summaries(tier, 16, impl=BEST)
    extra = dict(softcap=softcap, sink=torch.linspace(-1, 2, q.shape[1], device=DEVICE))
    gate = torch.linspace(0, 1, q.shape[1], device=DEVICE)
    pages = select.best_pages(q, low, high, tier.length, 3, impl="torch")
    want = decode_reference.attend(q, [select.read_pages(tier, pages)], 0.125, **extra)[0] * gate[:, None]
    for impl in ("torch", BEST):
        assert error(select.attend_best(q, tier, low, high, 3, 0.125, impl=impl, gate=gate, **extra).out, want) < 2e-3


@pytest.mark.parametrize("bits", [16, 4])
def test_reading_selected_pages(bits):
    tier, q = world()
    low, high = select.page_summaries(tier, 16, impl=BEST)
    pages = select.top_pages(select.page_scores(q, low, high, tier.length), tier.length, 3)
    if bits == 4:
        tier = make_tier(4, LENGTHS, 64, channels=32, device=DEVICE, spare=5)
    sparse = select.read_pages(tier, pages)
    got = decode.attend(q, [sparse], 0.125, impl=BEST)
    assert error(got.out, decode_reference.attend(q, [sparse], 0.125)[0]) < 2e-3
    every = select.read_pages(tier, select.top_pages(torch.rand(len(LENGTHS), -(-max(LENGTHS) // 16), device=DEVICE),
                                                     tier.length, -(-max(LENGTHS) // 16)))
    assert error(decode.attend(q, [every], 0.125, impl=BEST).out, decode.attend(q, [tier], 0.125, impl="torch").out) < 2e-3


@pytest.mark.parametrize("dim,group,count,last,kind", [
    (64, 1, 3, 1, "bounds"), (80, 4, 7, 0, "bounds"), (96, 3, 20, 64, "mean"), (128, 8, 16, 1, "bounds"),
    (256, 2, 1, 1, "bounds"), (64, 5, 1, 0, "mean"), (128, 4, 200, 1, "bounds"), (64, 3, 50, 700, "mean")])
def test_best_pages_of_slices(dim, group, count, last, kind):
    """Every slice's best and then the best of those, over ragged and empty lanes, with equal scores among them."""
    pytest.importorskip("triton")
    from kernels.select import best

    generator = torch.Generator().manual_seed(dim + count)
    lengths = [1500, 0, 37, 700] + ([40001] if CUDA else [])
    tier = make_tier(16, lengths, dim, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, len(lengths) * group, dim, generator=generator).to(DEVICE, torch.float16)
    low, high = select.page_summaries(tier, 16, kind, impl="torch")
    low[:, 3:6], low[0, 40] = low[:, 2:3], low[0, 2]  # ties within a slice and across slices
    if high is not None:
        high[:, 3:6], high[0, 40] = high[:, 2:3], high[0, 2]
    rows = q.view(len(lengths), group, dim)
    for cut in (best.Slices(16, 2, 1), best.Slices(32, 1, 2), best.slices(*low.shape, low.element_size())):
        scores = torch.empty(low.shape[:2], device=DEVICE)
        got = best.best_pages(rows, low, high, tier.length, count, 16, last, cut, scores)
        assert torch.equal(got, select.top_pages(scores, tier.length, count, last=last, impl="torch"))
        want = select.page_scores(q, low, high, tier.length, impl="torch")
        seen = torch.isfinite(want)
        assert torch.equal(seen, torch.isfinite(scores)) and error(scores[seen], want[seen]) < 2e-3
    assert torch.equal(got, select.best_pages(q, low, high, tier.length, count, 16, last, impl="triton", way="slices"))


def test_best_pages_with_endless_and_equal_scores():
    """Overflowing scores, all scores equal, and fewer pages than asked for."""
    low = torch.zeros(3, 70, 64, device=DEVICE, dtype=torch.float16)
    low[1, ::7] = torch.inf
    low[2] = torch.randn(70, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    length = torch.tensor([1120, 1100, 50], dtype=torch.int32, device=DEVICE)
    q = torch.ones(1, 6, 64, device=DEVICE, dtype=torch.float16)
    for last in (1, 0):
        got = select.best_pages(q, low, None, length, 5, last=last, impl="triton", way="slices")
        want = select.best_pages(q, low, None, length, 5, last=last, impl="torch")
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="unknown way"):
        select.best_pages(q, low, None, length, 5, way="sorted")


@pytest.mark.parametrize("dim,group,count,page,dtype", [
    (64, 3, 5, 16, torch.float16), (80, 1, 20, 16, torch.float16), (128, 8, 3, 32, torch.float16), (256, 4, 9, 16, torch.float32),
    (96, 2, 40, 8, torch.float16)] + ([(128, 4, 64, 16, torch.bfloat16)] if CUDA else []))
def test_attend_best_is_its_three_steps(dim, group, count, page, dtype):
    lengths = [700 if CUDA else 550, 0, 37, 16] + ([40001] if CUDA else [])
    generator = torch.Generator().manual_seed(dim)
    tier = make_tier(16, lengths, dim, dtype=dtype, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, len(lengths) * group, dim, generator=generator).to(DEVICE, dtype)
    low, high = select.page_summaries(tier, page, impl="torch")
    for last in (50, 1, 0) if CUDA or dim == 64 else (50, 0) if page == 8 else (1,):
        pages = select.best_pages(q, low, high, tier.length, count, page, last, impl="triton" if CUDA else "torch")
        want = decode_reference.attend(q, [select.read_pages(tier, pages, page)], dim**-0.5)
        got = select.attend_best(q, tier, low, high, count, dim**-0.5, page=page, last=last, impl="triton", way="joined")
        assert error(got.out, want[0]) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
        seen = torch.isfinite(want[1])
        assert torch.equal(torch.isfinite(got.lse), seen) and (got.lse.double() - want[1])[seen].abs().max() < 5e-3
    steps = select.attend_best(q, tier, low, high, count, dim**-0.5, page=page, last=last, impl="triton", way="steps")
    assert error(got.out, steps.out) < (8e-3 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("page,first,last,want", [(16, 4, 64, None), (16, 100, 40, 7), (7, 4, 20, 6), (1, 1, 9, None)])
def test_entries_in_front_are_always_read(page, first, last, want):
    """What block top-k reads: entries before the first page, the best pages by their means, those of the newest entries."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(page)
    whole = make_tier(16, [330, 331, first, first + 5], 64, device=DEVICE, generator=generator, spare=5)
    q = torch.randn(1, 12, 64, generator=generator).to(DEVICE, torch.float16)
    tier = replace(whole, start=whole.start + first, length=whole.length - first, capacity=331 - first)
    front = replace(whole, length=torch.full_like(whole.length, first), capacity=first)
    mean, _ = select.page_summaries(tier, page, "mean", impl="torch")
    number = None if want is None else torch.tensor([want], dtype=torch.int32, device=DEVICE)
    pages = select.best_pages(q, mean, None, tier.length, 12, page, last, impl="torch", want=number)
    out = decode_reference.attend(q, [select.read_pages(tier, pages, page), front], 0.125)[0]
    for impl, way in [("torch", "auto"), ("triton", "steps")] + ([] if page == 7 else [("triton", "joined")]):
        got = select.attend_best(
            q, tier, mean, None, 12, 0.125, page=page, last=last, impl=impl, way=way, want=number, front=front)
        assert error(got.out, out) < 2e-3


@pytest.mark.parametrize("impl", ["torch", BEST])
@pytest.mark.parametrize("dim,page", [(64, 16), (80, 7)])
def test_the_newest_pages_mean_is_made_anew(dim, page, impl):
    generator = torch.Generator().manual_seed(page)
    tier = make_tier(16, [40, 1, 19, 32, 14], dim, device=DEVICE, generator=generator, spare=5)
    want, _ = select.page_summaries(tier, page, "mean", impl="torch")
    mean, newest = torch.full_like(want, 9e3), (tier.length.long() - 1) // page
    select.grow_means(mean, tier.k, tier.start, tier.length, page, impl=impl)
    for lane, p in enumerate(newest.tolist()):
        assert error(mean[lane, p], want[lane, p]) < 1e-3
        assert (mean[lane, :p] == 9e3).all() and (mean[lane, p + 1 :] == 9e3).all()


def test_attend_best_of_other_tiers_takes_the_steps():
    tier, q = world()
    low, high = select.page_summaries(tier, 16, impl=BEST)
    codes = make_tier(4, LENGTHS, 64, channels=32, device=DEVICE, spare=5)
    pages = select.best_pages(q, low, high, tier.length, 3)
    want = decode_reference.attend(q, [select.read_pages(codes, pages)], 0.125)[0]
    assert error(select.attend_best(q, codes, low, high, 3, 0.125).out, want) < 2e-3
    with pytest.raises(ValueError, match="plain 16-bit"):
        select.attend_best(q, codes, low, high, 3, 0.125, way="joined")
    with pytest.raises(ValueError, match="unknown way"):
        select.attend_best(q, tier, low, high, 3, 0.125, way="one")
