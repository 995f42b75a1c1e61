"""Hierarchical risk parity: budgets from a tree of heads that resemble each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.slots import Paper
from lab.techniques.head_returns import Portfolio


@dataclass(frozen=True)
class HRP(Portfolio):
    """Entries per head in proportion to hierarchical-risk-parity weights (an experiment of the lab; Lopez de Prado 2016)."""

    name: ClassVar[str] = "hrp"
    title: ClassVar[str] = "Risk-parity budgets"
    paper: ClassVar[Paper] = Paper(
        "Building Diversified Portfolios that Outperform Out of Sample", "Journal of Portfolio Management 42(4)", 2016
    )
    help: ClassVar[str] = (
        "Groups heads whose contributions to the output rise and fall together, then halves the budget from group to group, "
        "the calmer half getting more. It avoids inverting a noisy matrix, which is where minimum-variance weights go wrong. "
        "On the default model equal budgets are clearly better: it is an experiment."
    )

    @staticmethod
    def weights(s: torch.Tensor) -> torch.Tensor:
        return weights(s)


def weights(s: torch.Tensor) -> torch.Tensor:
    """Hierarchical-risk-parity weights [H] of a covariance s [H,H]: positive, summing to 1."""
    size = s.diagonal().clamp_min(1e-300).sqrt()
    distance = ((1 - (s / size[:, None] / size[None])).clamp(0, 2) / 2).sqrt()
    order = linked_order(distance)
    w = torch.ones(len(s), dtype=s.dtype)
    stack = [order]
    while stack:
        items = stack.pop()
        if len(items) < 2:
            continue
        left, right = items[: len(items) // 2], items[len(items) // 2 :]
        a, b = cluster_variance(s, left), cluster_variance(s, right)
        share = 1 - a / (a + b)
        w[left] *= share
        w[right] *= 1 - share
        stack += [left, right]
    return w / w.sum()


def cluster_variance(s: torch.Tensor, items: list[int]) -> float:
    """Variance of the inverse-variance portfolio of some heads."""
    part = s[items][:, items]
    w = 1 / part.diagonal()
    w = w / w.sum()
    return float(w @ part @ w)


def linked_order(distance: torch.Tensor) -> list[int]:
    """Heads in the order of the single-linkage tree's leaves, so that neighbours resemble each other."""
    d = distance.tolist()
    n = len(d)
    edges, near, source = [], list(d[0]), [0] * n
    outside = set(range(1, n))
    while outside:  # Prim: the minimum spanning tree's edges, shortest first, are the single-linkage merges
        j = min(outside, key=lambda x: (near[x], x))
        outside.remove(j)
        edges.append((near[j], source[j], j))
        for x in outside:
            if d[j][x] < near[x]:
                near[x], source[x] = d[j][x], j
    members = {i: [i] for i in range(n)}
    owner = list(range(n))
    for _, a, b in sorted(edges):
        left, right = owner[a], owner[b]
        members[left] += members.pop(right)
        for i in members[left]:
            owner[i] = left
    return members[owner[0]]
