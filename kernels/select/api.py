"""Public page selection: summaries kept beside the keys, scores, and the pages worth reading."""

from __future__ import annotations

import dataclasses

import torch

from kernels.backend import choose, home
from kernels.decode.api import Decoded, attend
from kernels.decode.tier import TierView
from kernels.select import reference


def page_summaries(tier: TierView, page: int = 16, kind: str = "bounds", impl: str = "auto"):
    """(low, high) [lanes,P,d] per-channel bounds of each page of keys ("bounds", Quest), or (centroid, None) ("mean").

    tier is a 16-bit tier; pages count from each lane's start, P = ceil(capacity/page). Rebuilds every page.
    """
    if tier.bits != 16:
        raise ValueError(f"page summaries are built from exact keys, not from {tier.bits}-bit codes.")
    if choose(impl, tier.k) == "torch":
        return reference.page_summaries(tier.k, tier.start, tier.length, tier.capacity, page, kind)
    pages = -(-tier.capacity // page)
    low = torch.empty(tier.lanes, pages, tier.dim, dtype=tier.k.dtype, device=tier.k.device)
    high = torch.empty_like(low) if kind == "bounds" else None
    _summarise(tier.k, tier.start, tier.length, low, high, page, pages)
    return low, high


def _summarise(k, start, length, low, high, page: int, programs: int = 0) -> None:
    """Launch the summaries of `programs` pages of every lane, or of each lane's newest page."""
    import triton

    from kernels.select.triton_pages import summary_kernel

    lanes, pages, dim = low.shape
    home(summary_kernel)[(programs or 1, lanes)](
        k, start, length, low, low if high is None else high, pages, PAGE=page, PP=triton.next_power_of_2(page), D=dim,
        DP=max(16, triton.next_power_of_2(dim)), MEAN=high is None, NEWEST=programs == 0, num_warps=1,
    )


def grow_means(
    mean: torch.Tensor, k: torch.Tensor, start: torch.Tensor, length: torch.Tensor, page: int = 16, impl: str = "auto",
) -> None:
    """The mean [lanes,P,d] of every lane's newest page, anew and in place, its newest entry counted: arguments as
    `grow_bounds`."""
    if choose(impl, k) == "torch":
        reference.grow_means(mean, k, start, length, page)
    else:
        _summarise(k, start, length, mean, None, page)


def grow_bounds(
    low: torch.Tensor, high: torch.Tensor, k: torch.Tensor, start: torch.Tensor, length: torch.Tensor, page: int = 16,
    impl: str = "auto",
) -> None:
    """Take the newest entry of every lane into the bounds low, high [lanes,P,d] of its page, in place: k [slots,d], the lane's
    start and its length, the newest entry counted. A page's first entry replaces whatever stood there. Waits for nothing."""
    if choose(impl, k) == "torch":
        reference.grow_bounds(low, high, k, start, length, page)
        return
    import triton

    from kernels.select.triton_grow import grow_kernel

    lanes, pages, dim = low.shape
    padded = max(16, triton.next_power_of_2(dim))
    few = min(triton.next_power_of_2(lanes), max(1, 1024 // padded))
    home(grow_kernel)[(triton.cdiv(lanes, few),)](
        k, start, length, low, high, pages, lanes, PAGE=page, D=dim, DP=padded, LANES=few, num_warps=4)


def page_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, length: torch.Tensor, page: int = 16,
                impl: str = "auto") -> torch.Tensor:
    """Scores [lanes,P] float32 of every page for q [B,Hq,d]: Quest's upper bound of any logit in the page, maximum over
    the group's heads; or with high None the mean logit. Pages past a lane's end score -inf."""
    lanes, pages, dim = low.shape
    group = q.shape[0] * q.shape[1] // lanes
    rows = q.reshape(lanes, group, dim)
    if choose(impl, q) == "torch":
        s = reference.page_scores(rows, low, high, torch.float32)
        have = (length.long() + page - 1) // page
        return s.masked_fill(torch.arange(pages, device=q.device) >= have[:, None], -torch.inf)
    import triton

    from kernels.select.triton_pages import score_kernel

    out = torch.empty(lanes, pages, dtype=torch.float32, device=q.device)
    bp = 64
    home(score_kernel)[(triton.cdiv(pages, bp), lanes)](
        rows.contiguous(), low, low if high is None else high, length, out, pages, PAGE=page, G=group,
        NQ=max(8, triton.next_power_of_2(group)), D=dim, DP=max(16, triton.next_power_of_2(dim)), BP=bp, MEAN=high is None,
        num_warps=2,
    )
    return out


def top_pages(scores: torch.Tensor, length: torch.Tensor, count: int, page: int = 16, last: int = 1,
              impl: str = "auto", want: torch.Tensor | None = None) -> torch.Tensor:
    """The `count` best pages of each lane, ascending, int32 [lanes,count], -1 where a lane has fewer.

    last: the pages of so many newest entries are always among them, whatever their scores; `count` has room for those.
    Deterministic: ties go to the lower page (R4). want int32 [1], on the device: the number of pages where it is below `count`,
    so that a captured graph may read more of them later.
    """
    if choose(impl, scores) == "torch":
        return reference.top_pages(scores, length, page, count, last, want)
    import triton

    from kernels.select.triton_pages import top_kernel

    lanes, pages = scores.shape
    scores = scores.contiguous()
    out = torch.empty(lanes, count, dtype=torch.int32, device=scores.device)

    def launch(source: torch.Tensor, target: torch.Tensor, parts: int, padded: int, given: int) -> None:
        limited = want is not None and target is out
        home(top_kernel)[(lanes, parts)](
            scores, length, source, target, want if limited else length, pages, count, given, last, PAGE=page, PP=padded,
            GIVEN=given > 0, WANT=limited, num_warps=4 if padded <= 1024 else 8 if padded <= 8192 else 16,
        )

    slice_ = max(512, triton.next_power_of_2(4 * count))
    parts = triton.cdiv(pages, slice_)
    if parts <= 2:
        launch(length, out, 1, triton.next_power_of_2(max(16, pages, count)), 0)
    else:
        # one program per slice finds its own best, a second round picks among those: many multiprocessors, same answer
        best = torch.empty(lanes, parts * count, dtype=torch.int32, device=scores.device)
        launch(length, best, parts, slice_, 0)
        launch(best, out, 1, triton.next_power_of_2(parts * count), parts * count)
    return out


def best_pages(
    q: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, length: torch.Tensor, count: int, page: int = 16,
    last: int = 1, impl: str = "auto", way: str = "auto", want: torch.Tensor | None = None,
) -> torch.Tensor:
    """`top_pages` of `page_scores` in one call, int32 [lanes,count]: the same pages, and no scores in memory.

    way: "slices" scores a whole slice of pages per program, keeps that slice's best in registers and picks among those in
    one small launch; "scores" is the two calls; "auto" takes slices wherever one program can hold what they keep.
    """
    if way not in ("auto", "slices", "scores"):
        raise ValueError(f"unknown way {way!r}; expected 'auto', 'slices' or 'scores'.")
    lanes, pages, dim = low.shape
    if choose(impl, q) == "triton" and way != "scores":
        from kernels.select import best

        cut = best.slices(lanes, pages, dim, low.element_size())
        if best.fits(cut, pages, count):
            return best.best_pages(q.reshape(lanes, -1, dim), low, high, length, count, page, last, cut, want=want)
        if way == "slices":
            raise ValueError(f"{count} pages of each slice of {cut.pages} among {pages} do not fit one program; use way='auto'.")
    return top_pages(page_scores(q, low, high, length, page, impl), length, count, page, last, impl, want)


def attend_best(
    q: torch.Tensor, tier: TierView, low: torch.Tensor, high: torch.Tensor | None, count: int, scale: float, *, page: int = 16,
    last: int = 1, impl: str = "auto", way: str = "auto", want: torch.Tensor | None = None,
    softcap: float | None = None, sink: torch.Tensor | None = None, gate: torch.Tensor | None = None,
    front: TierView | None = None,
) -> Decoded:
    """Attention of q [B,Hq,d] to the `count` best pages of every lane of `tier`: `best_pages`, `read_pages` and decode in one.

    way: "joined" chooses the pages inside the launch that reads them (16-bit tiers without bias or rotation, in q's dtype, no
    softcap, pages of 1 to 64 entries, a power of two); "steps" takes the three calls; "auto" joins where it can and few enough
    pages are left to choose from, as every program of a joined launch repeats the last round.
    front: entries of the same k and v that are read besides, in any lanes. last and want as for `top_pages`; softcap,
    sink and gate as for `kernels.decode.attend`.
    """
    if way not in ("auto", "joined", "steps"):
        raise ValueError(f"unknown way {way!r}; expected 'auto', 'joined' or 'steps'.")
    plain = tier.bits == 16 and tier.k.dtype == q.dtype and tier.bias is None and tier.rotation is None and tier.pages is None
    plain = plain and softcap is None
    if way != "steps" and plain and page in (1, 2, 4, 8, 16, 32, 64) and choose(impl, q) == "triton":
        from kernels.select import best

        cut = best.slices(*low.shape, low.element_size())
        if best.fits(cut, low.shape[1], count, best.MOST if way == "joined" else best.REPEATED):
            return best.attend(q, tier, low, high, count, scale, page, last, cut, want=want, sink=sink, gate=gate, front=front)
    if way == "joined":
        raise ValueError("way='joined' takes Triton, a plain 16-bit tier of the query's dtype and pages up to 64; use 'auto'.")
    pages = best_pages(q, low, high, tier.length, count, page, last, impl, want=want)
    reading = [read_pages(tier, pages, page)] + ([] if front is None else [front])
    return attend(q, reading, scale, softcap=softcap, sink=sink, impl=impl, early=True, gate=gate)


def read_pages(tier: TierView, pages: torch.Tensor, page: int = 16) -> TierView:
    """The same tier reading only the listed pages, int32 [lanes,n] (-1 entries are skipped): pass it to decode.attend."""
    if pages.shape[0] != tier.lanes:
        raise ValueError(f"page lists for {pages.shape[0]} lanes do not fit a tier of {tier.lanes}.")
    return dataclasses.replace(tier, pages=pages, page=page)
