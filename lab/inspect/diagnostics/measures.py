"""Statistics that several diagnostics share: rank agreement, distances between distributions, spectra,
AUROC."""

from __future__ import annotations

import numpy as np
import torch


def ranks(x: np.ndarray) -> np.ndarray:
    """float64 ranks from 1, ties share their mean rank."""
    x = np.asarray(x, dtype=np.float64)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; NaN when either is constant."""
    x, y = (np.asarray(v, dtype=np.float64) - np.mean(v) for v in (x, y))
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties averaged; NaN when either is constant."""
    return pearson(ranks(x), ranks(y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b: agreement over pairs, corrected for ties; NaN when either is constant."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    dx, dy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    scale = np.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / scale) if scale > 0 else float("nan")


def overlap(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Share of the k largest that two score vectors have in common; ties go to the lower position."""
    k = min(k, len(x))
    top = [set(np.argsort(-np.asarray(v, dtype=np.float64), kind="stable")[:k].tolist()) for v in (x, y)]
    return len(top[0] & top[1]) / k if k else float("nan")


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Wasserstein-1 distance between two samples of equal size: mean difference of the sorted values."""
    x, y = (np.sort(np.asarray(v, dtype=np.float64).ravel()) for v in (x, y))
    if x.size != y.size:
        raise ValueError("samples of different size")
    return float(np.abs(x - y).mean())


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Half the L1 distance of distributions along the last axis, 0..1."""
    return (p - q).abs().sum(-1) / 2


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in nats along the last axis, 0..ln 2."""
    m = ((p + q) / 2).clamp(min=1e-30)
    return (torch.xlogy(p, p.clamp(min=1e-30) / m) + torch.xlogy(q, q.clamp(min=1e-30) / m)).sum(-1) / 2


def effective_rank(singular: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the normalised singular values [..., n]: 1 for rank one, n for an orthogonal
    matrix."""
    p = singular / singular.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties half; NaN when one class is absent."""
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def bootstrap(values: np.ndarray, rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by resampling the first axis."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
