"""Page selection in plain torch (Quest, arXiv 2406.10774; Kinetics block top-k, arXiv 2506.05333)."""

from __future__ import annotations

import torch


def page_summaries(
    k: torch.Tensor, start: torch.Tensor, length: torch.Tensor, capacity: int, page: int, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """k [slots,d] -> ("bounds") per-channel minimum and maximum [lanes,P,d], or ("mean") centroid and None.

    P = ceil(capacity/page). A last page that is not full is summarised over the entries it has; pages past the lane's
    end are zero.
    """
    lanes, pages = len(start), -(-capacity // page)
    i = torch.arange(pages * page, device=k.device)
    slot = (start.long()[:, None] + i).clamp_max(k.shape[0] - 1)
    alive = (i < length[:, None]).view(lanes, pages, page, 1)
    x = k[slot].float().view(lanes, pages, page, -1)
    some = alive.any(2)
    if kind == "mean":
        total = torch.where(alive, x, 0.0).sum(2) / alive.sum(2).clamp_min(1)
        return total.to(k.dtype), None
    low = torch.where(alive, x, torch.inf).amin(2)
    high = torch.where(alive, x, -torch.inf).amax(2)
    return torch.where(some, low, 0.0).to(k.dtype), torch.where(some, high, 0.0).to(k.dtype)


def grow_bounds(
    low: torch.Tensor, high: torch.Tensor, k: torch.Tensor, start: torch.Tensor, length: torch.Tensor, page: int
) -> None:
    """The newest of length[lane] >= 1 entries of each lane enters its page's bounds low, high [lanes,P,d], in place."""
    lanes, pages, dim = low.shape
    last = length.long() - 1
    x = k.index_select(0, start.long() + last)
    at = torch.arange(lanes, device=k.device) * pages + last // page
    begun = (last % page != 0)[:, None]
    for table, join in ((low, torch.minimum), (high, torch.maximum)):
        rows = table.view(lanes * pages, dim)
        rows.index_copy_(0, at, torch.where(begun, join(rows.index_select(0, at), x), x))


def grow_means(mean: torch.Tensor, k: torch.Tensor, start: torch.Tensor, length: torch.Tensor, page: int) -> None:
    """The mean of the newest page of each lane, of length[lane] >= 1 entries, anew: mean [lanes,P,d], in place."""
    lanes, pages, dim = mean.shape
    newest = (length.long() - 1) // page
    i = newest[:, None] * page + torch.arange(page, device=k.device)
    alive = (i < length[:, None]).unsqueeze(-1)
    x = k.index_select(0, (start.long()[:, None] + i).clamp_max(k.shape[0] - 1).flatten()).view(lanes, page, dim).float()
    found = torch.where(alive, x, 0.0).sum(1) / alive.sum(1)
    mean.view(lanes * pages, dim).index_copy_(0, torch.arange(lanes, device=k.device) * pages + newest, found.to(mean.dtype))


def page_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, dtype=torch.float64) -> torch.Tensor:
    """q [lanes,G,d] -> [lanes,P]: Quest's bound, maximum over the group; with high None the mean logit of the centroid."""
    x, a = q.to(dtype), low.to(dtype)
    if high is None:
        return (x @ a.mT).mean(1)
    return (x.clamp_min(0) @ high.to(dtype).mT + x.clamp_max(0) @ a.mT).amax(1)


def top_pages(
    scores: torch.Tensor, length: torch.Tensor, page: int, count: int, last: int, want: torch.Tensor | None = None
) -> torch.Tensor:
    """The `count` best pages of each lane, ascending, int32 [lanes,count]; ties go to the lower page; -1 where a lane has
    fewer pages. want int [1]: how many of the `count` it shall be."""
    lanes, pages = scores.shape
    n = (length.long() + page - 1) // page
    i = torch.arange(pages, device=scores.device)
    s = scores.float().clamp_max(torch.finfo(torch.float32).max)  # endless scores stay behind a page that must be kept
    s = s.masked_fill(i >= n[:, None], -torch.inf)
    if last:
        newest = (length.long() - last).clamp_min(0) // page
        s = torch.where((i >= newest[:, None]) & (i < n[:, None]), torch.inf, s)
    order = torch.sort(s, dim=1, descending=True, stable=True).indices[:, :count]
    most = n[:, None] if want is None else n[:, None].minimum(want)
    order = torch.where(torch.arange(order.shape[1], device=s.device) < most, order, pages)
    order = order.sort(1).values
    out = torch.full((lanes, count), -1, dtype=torch.int32, device=scores.device)
    out[:, : order.shape[1]] = torch.where(order == pages, -1, order)
    return out
