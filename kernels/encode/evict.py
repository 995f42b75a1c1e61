"""Dropping one entry of every lane in place, chosen on the device: what a decode step at a full budget does to its cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.backend import choose, home, interpreting


@dataclass
class Front:
    """The first rows of every lane, which are turned a little further for each step: row r of lane l becomes
    base*cos + quarter*sin. base, quarter float32 [lanes, r, d]; cos, sin float32 [steps, d]; the row after `step` is used."""

    base: torch.Tensor
    quarter: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def evict(
    tags: torch.Tensor, n: int, first: int, last: int, *, score: torch.Tensor | None = None, stat: torch.Tensor | None = None,
    rows: tuple[torch.Tensor, ...] = (), log: torch.Tensor | None = None, step: torch.Tensor | None = None,
    front: Front | None = None, add: torch.Tensor | None = None, impl: str = "auto",
) -> torch.Tensor:
    """Of the first n entries of every lane drop the one with the lowest score, and move entry n-1 (the newest) into its place.

    tags   int32 [lanes, cap > n-1], the entries' positions; entry n-1 is the newest. Afterwards tags[:, n-1] names the
           position after it, which is the next row's where rows come one by one.
    add    float [lanes, n] that is added to `stat`, whose sums are then the score.
    score  float [lanes, n]; None drops the oldest. Of equals the later entry leaves (rule R4).
    first, last  positions below `first` and the newest `last` positions never leave; where all are protected the newest does.
    stat   float32 [lanes, cap] moved along; the freed place is set to 0.
    rows   up to two tensors [lanes, capacity, d] moved along (keys, values).
    log    int32 [steps, lanes] and step int64 [1]: row log[step] gets the positions that left.
    front  what becomes of the first rows of rows[0] for the next step; they must be protected.
    Returns int64 [lanes]: the place that was freed and taken, n-1 where the newest itself left. Nothing synchronises.
    impl   "auto" | "torch" | "triton"; "auto" is Triton on CUDA and numpy on a CPU.
    """
    if choose(impl, tags) == "torch":
        if add is not None:
            score = stat[:, :n].add_(add)
        chosen = _evict_numpy if impl == "auto" and tags.device.type == "cpu" else _evict_torch
        slot = chosen(tags, n, first, last, score, stat, rows, log, step)
        if front is not None:
            cos, sin = (x.index_select(0, step + 1) for x in (front.cos, front.sin))
            rows[0][:, : front.base.shape[1]] = torch.addcmul(front.base * cos, front.quarter, sin)
        return slot
    import triton

    from kernels.encode.triton_encode import evict_kernel

    lanes = tags.shape[0]
    scores = score if add is None else add
    if any(x.stride(-1) != 1 for x in (tags, *rows)) or (scores is not None and scores.stride(-1) != 1):
        raise ValueError("evict needs tensors whose last dimension is contiguous.")
    slot = torch.empty(lanes, dtype=torch.int64, device=tags.device)
    one, two = (rows + (slot, slot))[:2]
    width = [x.shape[-1] for x in rows] + [1, 1]
    strides = [x.stride(0) for x in rows] + [0, 0]
    turning = (slot,) * 4 if front is None else (front.base, front.quarter, front.cos, front.sin)
    block = min(1024, max(16, triton.next_power_of_2(n)))
    home(evict_kernel)[(lanes,)](
        tags, slot if scores is None else scores, slot if stat is None else stat, one, two, slot if log is None else log,
        slot if step is None else step, slot, *turning, n, first, last, tags.stride(0), 0 if scores is None else scores.stride(0),
        0 if stat is None else stat.stride(0), strides[0], strides[1], lanes,
        BN=block, D1=width[0], P1=triton.next_power_of_2(width[0]), D2=width[1], P2=triton.next_power_of_2(width[1]),
        SCORE=scores is not None, ADD=add is not None, STAT=stat is not None, ROWS=len(rows), LOG=log is not None,
        FRONT=0 if front is None else front.base.shape[1], num_warps=4,
        **({} if interpreting() else {"num_stages": 1}),
    )
    return slot


def _evict_numpy(tags, n, first, last, score, stat, rows, log, step) -> torch.Tensor:
    """The same on a CPU, where numpy's small operations cost a fraction of torch's."""
    pos = tags.numpy()[:, :n]
    newest = pos[:, -1].copy()
    ranked = (pos if score is None else score.float().numpy()).astype(np.float32)
    ranked[pos > newest[:, None] - last] = np.inf
    if first:
        ranked[pos < first] = np.inf
    at = n - 1 - ranked[:, ::-1].argmin(-1)
    lanes = np.arange(len(at))
    if log is not None:
        log.numpy()[int(step)] = pos[lanes, at]
    pos[lanes, at] = newest
    pos[:, -1] = newest + 1
    if stat is not None:
        inside = stat.numpy()
        inside[lanes, at] = inside[:, n - 1]
        inside[:, n - 1] = 0
    for x in rows:
        inside = _words(x)
        inside[lanes, at] = inside[:, n - 1]
    return torch.from_numpy(at)


def _words(x: torch.Tensor) -> np.ndarray:
    """A tensor's memory as numpy knows it: bfloat16 as whole numbers."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


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
