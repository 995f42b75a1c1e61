"""Minimum-variance budgets: heads as a portfolio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.slots import Paper
from lab.techniques.head_returns import Portfolio


@dataclass(frozen=True)
class MinVariance(Portfolio):
    """Entries per head in proportion to minimum-variance portfolio weights (an experiment of the lab; Markowitz 1952)."""

    name: ClassVar[str] = "min_variance"
    title: ClassVar[str] = "Minimum-variance budgets"
    paper: ClassVar[Paper] = Paper("Portfolio Selection", "Journal of Finance 7(1)", 1952)
    help: ClassVar[str] = (
        "Treats each head like a share on a market: its contribution to the output, row by row, is its return. The weights "
        "that make the sum vary least decide how many entries a head keeps, so steady heads get more. Nothing says that a "
        "steady head needs many entries, and on the default model equal budgets are clearly better: it is an experiment."
    )

    @staticmethod
    def weights(s: torch.Tensor) -> torch.Tensor:
        return weights(s)


def weights(s: torch.Tensor) -> torch.Tensor:
    """Minimum-variance weights [H] of a covariance s [H,H]: S^-1 1, negative ones cut to zero, summing to 1."""
    w = torch.linalg.solve(s, torch.ones(len(s), 1, dtype=s.dtype)).squeeze(1).clamp_min(0)
    return w / w.sum()
