"""Thresholds of Top-theta: the score, and the weight, above which a row's k best lie, per layer, head and row length.

Rows are cut to their true top-k while measuring, so that later layers see the sparse activations they will get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.reads import Weighed
from lab.engine.slots import Paper, Technique
from lab.engine.stack import Stack
from lab.measure.fitting.common import forward, samples, sizes
from lab.techniques.top_theta import SIZES

BINS = 12
EVERY = 10  # rows sampled


@torch.no_grad()
def fit(
    technique, model, tokenizer, progress, *, sequences: int = 3, length: int = 1024, sizes_k=SIZES
) -> dict[str, torch.Tensor]:
    """{"theta", "std" of scores, "weight", "weight_std" of weights, "missing": [K, L, Hq, bins], "lengths": [K, bins]} for
    each k of SIZES."""
    ids = samples(model, tokenizer, sequences, length)
    layers, heads = sizes(model)[:2]
    names = ("theta", "std", "missing", "weight", "weight_std")
    out = {name: torch.zeros(len(SIZES), layers, heads, BINS) for name in names}
    out["lengths"] = torch.zeros(len(SIZES), BINS)
    for at, k in enumerate(SIZES):
        top = max(k + 1, ids.shape[1])
        out["lengths"][at] = torch.linspace(k + 1, top, BINS)
        if k not in sizes_k or ids.shape[1] <= k:
            out["theta"][at] = -torch.inf
            continue
        sums = torch.zeros(6, layers, heads, BINS)
        for n, row in enumerate(ids):
            forward(model, row, Stack((_TopK(k, out["lengths"][at], sums),)))
            progress((at + (n + 1) / len(ids)) / len(SIZES), f"Thresholds for {k} tokens per row")
        count = sums[0].clamp_min(1)
        for first, name, spread in ((1, "theta", "std"), (4, "weight", "weight_std")):
            mean = sums[first] / count
            out[name][at] = _filled(mean, sums[0])
            out[spread][at] = _filled((sums[first + 1] / count - mean**2).clamp_min(0).sqrt(), sums[0])
        out["missing"][at] = _filled(sums[3] / count, sums[0])
    return out


def _filled(table: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Bins without samples take the nearest bin that has some."""
    seen = (count[0, 0] > 0).nonzero().flatten()
    nearest = (torch.arange(count.shape[-1])[:, None] - seen).abs().argmin(-1)
    return table[..., seen[nearest]]


@dataclass(frozen=True, eq=False)
class _TopK(Technique):
    """Exact top-k per row, noting of sampled rows in sums: count, the k-th score and its square, what is left out relative to
    the largest, and the k-th weight and its square."""

    name: ClassVar[str] = "top_k_probe"
    title: ClassVar[str] = "Top-k probe"
    paper: ClassVar[Paper] = Paper("probe", "probe", 2025)
    slots: ClassVar[tuple[str, ...]] = ("weigh",)
    help: ClassVar[str] = ""

    k: int
    lengths: torch.Tensor
    sums: torch.Tensor

    def weigh(self, ctx, s, place):
        count = (s > -torch.inf).sum(-1)
        if s.shape[-1] <= self.k:
            p = s.softmax(-1)
            return Weighed(p, s.logsumexp(-1))
        kth = s.topk(self.k, dim=-1).values[..., -1]
        keep = s >= kth.unsqueeze(-1)
        top = s.amax(-1, keepdim=True)
        left = (torch.exp(s - top) * ~keep).sum(-1)
        weight = torch.exp(kth - s.logsumexp(-1))
        for r in range(s.shape[3]):
            n = int(count[0, 0, 0, r])
            if n > self.k and (n % EVERY == 0 or s.shape[-1] < self.k + EVERY):
                bin_ = int((self.lengths - n).abs().argmin())
                theta, miss, w = (x[0, :, :, r].flatten().cpu() for x in (kth, left, weight))
                self.sums[:, ctx.layer, :, bin_] += torch.stack([torch.ones_like(theta), theta, theta**2, miss, w, w**2])
        s = s.masked_fill(~keep, -torch.inf)
        return Weighed(s.softmax(-1), s.logsumexp(-1))
