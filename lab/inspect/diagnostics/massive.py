"""Massive activations: a few channels of a few tokens thousands of times larger than the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, to_numpy
from lab.inspect.scores import Progress

ABSOLUTE, RATIO = 100.0, 1000.0


def find(hidden: Sequence[torch.Tensor], absolute: float = ABSOLUTE, ratio: float = RATIO) -> np.ndarray:
    """float64 [n, 5] (state, token, channel, value, value / median) above both thresholds, strongest
    first."""
    found = []
    for layer, h in enumerate(hidden):
        h = h.detach().float()
        median = float(h.abs().median())
        for token, channel in torch.nonzero((h.abs() > absolute) & (h.abs() > ratio * median)).tolist():
            value = float(h[token, channel])
            found.append((layer, token, channel, value, abs(value) / max(median, 1e-30)))
    found.sort(key=lambda row: -row[4])
    return np.array(found, dtype=np.float64).reshape(-1, 5)


def replace(
    h: torch.Tensor, spots: Sequence[tuple[int, int]], values: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """A copy of a hidden state [T, D] with (token, channel) spots set to ``values`` (one, or one each).

    For the intervention of the paper: 0, or the spot's mean over other texts.
    """
    out = h.clone()
    rows, columns = torch.tensor(list(spots), dtype=torch.long).reshape(-1, 2).T
    out[rows, columns] = torch.as_tensor(values, dtype=h.dtype, device=h.device)
    return out


@diagnostic(
    name="massive",
    title="Massive activations",
    paper=Paper("A Refined Analysis of Massive Activations in LLMs", "2503.22329", 2025),
    needs=("hidden",),
    help="From some layer on, one or two channels of the first token become thousands of times "
    "larger than everything else. They act as a constant the later layers rely on, and they "
    "are why the first token attracts attention.",
    explanation="The lines are the largest and the median magnitude of each hidden state; a jump of "
    "several orders marks the layer where a massive activation is written. The table flags "
    "values above 100 and above 1,000 times the median, thresholds that depend on the model's "
    "scale.",
    figures=(
        Figure(
            "top", "lines", ("rank", "state"), "Three largest magnitudes and the median of each hidden state"
        ),
        Figure("token", "matrix", ("state", "token"), "Largest magnitude of each token, over the median"),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Flags, the three largest magnitudes and the median per state, and each token's largest ratio."""
    top, token = [], []
    for n, h in enumerate(session.hidden):
        size = h.detach().float().abs()
        largest = size.flatten().topk(min(3, size.numel())).values
        median = size.median()
        top.append(to_numpy(torch.cat([largest, median[None]])))
        token.append(to_numpy(size.amax(1) / median.clamp(min=1e-30)))
        progress((n + 1) / len(session.hidden))
    return {"flags": find(session.hidden), "top": np.stack(top, axis=1), "token": np.stack(token)}
