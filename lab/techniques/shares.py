"""Splitting a budget of entries: what the `allocate` techniques share."""

from __future__ import annotations

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Forward, Technique, resolve_budget

SHARED_BUDGET_HELP = (
    "Mean budget per layer and head, as a fraction up to 1 or a number of entries; 0 takes the budget of the scoring technique."
)


def share_budget(technique: Technique, prompt: int) -> int | None:
    """A budget technique's own mean entries; None where it leaves that to the scorer (budget 0)."""
    budget = technique.budget
    return resolve_budget(technique.name, budget, prompt) if budget else None


def total_to_spread(technique: Technique, step: Forward) -> int | None:
    """The mean entries per lane that a whole prompt's lanes are to share: the technique's own or the scorer's; None while the
    prompt goes on and where everything fits."""
    if not step.complete:
        return None
    first = step.contexts[0]
    own = technique.budget_entries(first.prompt)
    total = own if own is not None else first.scorer.budget_entries(first.prompt)
    return None if total is None or total >= max(ctx.store.longest for ctx in step.contexts) else total


def always_kept(ctx: LayerContext, total: int) -> torch.Tensor:
    """bool [B,Hk,N] of the entries the scorer protects under a budget of `total` entries."""
    first, last = ctx.scorer.protected(total, ctx.prompt)
    pos = ctx.positions()
    return (pos < first) | (pos > ctx.newest - last)


def top_counts(scores: torch.Tensor, total: int) -> torch.Tensor:
    """How many of the `total` best scores [B, lanes, N] fall into each lane, int64 [B, lanes]; at least one each.

    Ties go to the earlier lane, then to the lower position.
    """
    batch, lanes, n = scores.shape
    order = scores.reshape(batch, -1).argsort(dim=-1, descending=True, stable=True)[:, :total]
    counts = torch.zeros(batch, lanes, dtype=torch.long, device=scores.device)
    counts.scatter_add_(1, order // n, torch.ones_like(order))
    for row in counts:  # an empty lane takes one entry from the fullest
        while int(row.min()) == 0:
            row[row.argmax()] -= 1
            row[row.argmin()] += 1
    return counts


def split(total: int, weights: list[float], floor: int, cap: int) -> list[int]:
    """Whole numbers in proportion to weights that sum to `total`, each from `floor` to `cap` where that is possible.

    What a bound takes or leaves is shared by the others in proportion; remainders go to the largest fractions.
    """
    n = len(weights)
    total = max(n * floor, min(total, n * cap))
    share: list[float] = [0.0] * n
    free, left = set(range(n)), float(total)
    while free:
        mass = sum(weights[i] for i in free)
        want = {i: left * weights[i] / mass if mass > 0 else left / len(free) for i in free}
        low, high = {i for i in free if want[i] < floor}, {i for i in free if want[i] > cap}
        lost, gained = sum(floor - want[i] for i in low), sum(want[i] - cap for i in high)
        fixed, bound = (low, floor) if lost >= gained else (high, cap)
        if not fixed:
            share = [want.get(i, share[i]) for i in range(n)]
            break
        for i in fixed:
            share[i] = float(bound)
        free -= fixed
        left -= bound * len(fixed)
    whole = [int(x) for x in share]
    by_fraction = sorted(range(n), key=lambda i: (whole[i] - share[i], i))
    missing = total - sum(whole)
    for i in by_fraction * 2:
        if missing <= 0:
            break
        if whole[i] < cap:
            whole[i], missing = whole[i] + 1, missing - 1
    return whole


def packed(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots int64 [B,Hk,m], real bool [B,Hk,m]) of the entries flagged in flags bool [B,Hk,N], in order, per lane.

    m is the fullest lane's count; slots where `real` is False are filler.
    """
    count = flags.sum(-1, keepdim=True)
    m = int(count.max())
    slots = (~flags).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, :m]
    return slots, torch.arange(m, device=flags.device) < count
