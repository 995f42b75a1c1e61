"""Dropping one entry of every lane in place, chosen on the device: what a decode step at a full budget does to its cache."""

from __future__ import annotations

import torch

from kernels.backend import choose, interpreting


def evict(
    tags: torch.Tensor, n: int, first: int, last: int, *, score: torch.Tensor | None = None, stat: torch.Tensor | None = None,
    rows: tuple[torch.Tensor, ...] = (), log: torch.Tensor | None = None, step: torch.Tensor | None = None, impl: str = "auto",
) -> torch.Tensor:
    """Of the first n entries of every lane drop the one with the lowest score, and move entry n-1 (the newest) into its place.

    tags   int32 [lanes, cap > n-1], the entries' positions; entry n-1 is the newest. Afterwards tags[:, n-1] names the
           position after it, which is the next row's where rows come one by one.
    score  float [lanes, n]; None drops the oldest. Of equals the later entry leaves (rule R4).
    first, last  positions below `first` and the newest `last` positions never leave; where all are protected the newest does.
    stat   float32 [lanes, cap] moved along; the freed place is set to 0.
    rows   up to two tensors [lanes, capacity, d] moved along (keys, values).
    log    int32 [steps, lanes] and step int64 [1]: row log[step] gets the positions that left.
    Returns int64 [lanes]: the place that was freed and taken, n-1 where the newest itself left. Nothing synchronises.
    """
    if choose(impl, tags) == "torch":
        return _evict_torch(tags, n, first, last, score, stat, rows, log, step)
    import triton

    from kernels.encode.triton_encode import evict_kernel

    lanes = tags.shape[0]
    if any(x.stride(-1) != 1 for x in (tags, *rows)) or (score is not None and score.stride(-1) != 1):
        raise ValueError("evict needs tensors whose last dimension is contiguous.")
    slot = torch.empty(lanes, dtype=torch.int64, device=tags.device)
    one, two = (rows + (slot, slot))[:2]
    width = [x.shape[-1] for x in rows] + [1, 1]
    strides = [x.stride(0) for x in rows] + [0, 0]
    block = min(1024, max(16, triton.next_power_of_2(n)))
    evict_kernel[(lanes,)](
        tags, slot if score is None else score, slot if stat is None else stat, one, two, slot if log is None else log,
        slot if step is None else step, slot, n, first, last, tags.stride(0), 0 if score is None else score.stride(0),
        0 if stat is None else stat.stride(0), strides[0], strides[1], lanes,
        BN=block, D1=width[0], P1=triton.next_power_of_2(width[0]), D2=width[1], P2=triton.next_power_of_2(width[1]),
        SCORE=score is not None, STAT=stat is not None, ROWS=len(rows), LOG=log is not None, num_warps=4,
        **({} if interpreting() else {"num_stages": 1}),
    )
    return slot


def _evict_torch(tags, n, first, last, score, stat, rows, log, step) -> torch.Tensor:
    pos = tags[:, :n]
    newest = pos[:, -1:].clone()
    ranked = (pos.float() if score is None else score).masked_fill(pos > newest - last, torch.inf)
    if first:
        ranked = ranked.masked_fill(pos < first, torch.inf)
    at = n - 1 - ranked.flip(-1).argmin(-1, keepdim=True)  # [lanes, 1]
    if log is not None:
        log.index_copy_(0, step, pos.gather(1, at).view(1, -1))
    pos.scatter_(1, at, newest)
    pos[:, -1:] = newest + 1
    if stat is not None:
        inside = stat[:, :n]
        inside.scatter_(1, at, inside[:, -1:].clone())
        inside[:, -1] = 0
    for x in rows:
        x.scatter_(1, at.unsqueeze(-1).expand(-1, 1, x.shape[-1]), x[:, n - 1 : n].clone())
    return at.squeeze(1)
