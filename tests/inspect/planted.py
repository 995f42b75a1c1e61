"""Captures whose attention is known because it was planted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lab.inspect.capture import Capture


def from_weights(heads: Sequence[torch.Tensor], **fields) -> Capture:
    """A capture whose head h attends with the causal rows ``heads[h]`` [T, T]: keys are the unit vectors."""
    t = heads[0].shape[0]
    q = torch.stack([(w.double() + 1e-30).log().clamp(min=-60).float() for w in heads])
    return Capture(q, torch.eye(t)[None].expand(len(heads), t, t).contiguous(), scale=1.0, **fields)


def uniform(t: int) -> torch.Tensor:
    """Every row spread evenly over what it may see."""
    return torch.tril(torch.ones(t, t)) / torch.arange(1, t + 1)[:, None]


def sink(t: int, mass: float = 1.0) -> torch.Tensor:
    """Every row gives token 0 ``mass`` and itself the rest."""
    w = torch.eye(t) * (1 - mass)
    w[:, 0] += mass
    return w


def induction(ids: Sequence[int]) -> torch.Tensor:
    """Every row reads the token after the last earlier occurrence of its own token, else the first token."""
    t = len(ids)
    w = torch.zeros(t, t)
    for i in range(t):
        earlier = [j for j in range(i - 1) if ids[j] == ids[i]]
        w[i, earlier[-1] + 1 if earlier else 0] = 1
    return w
