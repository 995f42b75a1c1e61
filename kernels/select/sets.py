"""Choosing by share: the fewest entries that hold so much of a sum."""

from __future__ import annotations

import torch


def smallest_sets(mass: torch.Tensor, share: float) -> torch.Tensor:
    """bool: along the last dimension, the fewest largest entries that hold `share` of the row's sum."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = (before < share * mass.sum(-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, wanted)
