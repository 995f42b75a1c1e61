"""What softmax can and cannot tell apart: distance and separation of the chosen tokens, and the slope of
softmax."""

from __future__ import annotations

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, head_values
from lab.inspect.scores import Progress, logits, weights

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
TOKENS = 256


def separation(p: torch.Tensor, x: torch.Tensor, top: int) -> tuple[float, float]:
    """(distance, separated) of the ``top`` largest weights of one row.

    s is the weighted sum of the chosen vectors. ``distance`` is the summed distance of the other weighted
    vectors from
    s over the largest that sum can be (every one as far as the farthest); ``separated`` is the share of the
    chosen
    whose weighted vector lies within r of s, r the smallest distance between any two of the vectors.

    Args:
        p: [n] weights.  x: [n, d] vectors.  top: how many are chosen.
    """
    order = p.argsort(descending=True, stable=True)
    chosen, rest = order[:top], order[top:]
    moved = p[:, None] * x
    far = (moved - moved[chosen].sum(0)).norm(dim=1)
    distance = float(far[rest].sum() / (len(rest) * far[rest].max()).clamp(min=1e-30)) if len(rest) else 0.0
    return distance, float((far[chosen] <= _closest(x)).float().mean())


def _closest(x: torch.Tensor) -> torch.Tensor:
    if len(x) < 2:
        return torch.tensor(torch.inf)
    return torch.pdist(x).min()


def raw_distance(p: torch.Tensor, x: torch.Tensor, top: int) -> float:
    """Summed distance of the unchosen weighted vectors from the weighted sum of the chosen, not
    normalised."""
    order = p.argsort(descending=True, stable=True)
    moved = p[:, None] * x
    return float((moved[order[top:]] - moved[order[:top]].sum(0)).norm(dim=1).sum())


def softmax_slope(logits: torch.Tensor, temperature: float = 1.0) -> float:
    """Largest singular value of the softmax Jacobian at ``logits`` [n]; never above 1 / (2 temperature)."""
    p = torch.softmax(logits.double() / temperature, 0)
    return float(torch.linalg.eigvalsh((torch.diag(p) - p[:, None] * p) / temperature).max())


@diagnostic(
    name="limits",
    title="Limits of normalisation",
    paper=Paper("Limitations of Normalization in Attention Mechanism", "2508.17821", 2025),
    needs=("captures", "values"),
    help="Weights that must sum to one get thinner as more tokens share them. For a growing set of "
    "the most attended tokens this asks how far the rest lies from their sum, and how many "
    "of the chosen can still be told apart.",
    explanation="As the chosen share grows the distance first rises, then falls to nothing, and ever "
    "fewer of the chosen stay near their sum: past that point a head averages rather than "
    "selects. The last figure is the steepest response of one row's softmax at different "
    "temperatures with its bound; lower temperatures select more sharply and make training "
    "harder.",
    figures=(
        Figure(
            "distance",
            "lines",
            ("layer", "share chosen"),
            "Distance of the other tokens as more are chosen",
            "relative to the smallest set",
            phrase="layer {}",
        ),
        Figure("separated", "lines", ("layer", "share chosen"), "Chosen tokens near their sum", "share of the chosen",
               phrase="layer {}"),
        Figure("slope", "lines", ("curve", "temperature"), "Steepest slope of softmax, and its bound",
               "norm of the Jacobian", {"curve": ("this row", "bound, 1 / (2 temperature)")}, log="x"),
    ),
    before=f"Reads the last row of every head over its {TOKENS} newest entries.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Reads the last row of every head over at most its ``TOKENS`` newest entries."""
    captures = session.captures
    t = captures[0].tokens
    a = max(0, t - TOKENS)
    distance, separated = (np.zeros((len(captures), len(SHARES))) for _ in range(2))
    for n, capture in enumerate(captures):
        for head in range(capture.heads):
            p = weights(capture, head, (t - 1, t), (a, t))[0]
            x = head_values(session, n, head)[a:t]
            for m, share in enumerate(SHARES):
                top = max(1, round(share * len(p)))
                distance[n, m] += raw_distance(p, x, top) / capture.heads
                separated[n, m] += separation(p, x, top)[1] / capture.heads
            progress((n * capture.heads + head + 1) / (len(captures) * capture.heads))
    temperatures = np.geomspace(0.1, 10, 17)
    row = logits(captures[-1], 0, (t - 1, t), (a, t))[0]
    row = row[torch.isfinite(row)].topk(min(128, int(torch.isfinite(row).sum()))).values
    slope = np.stack([[softmax_slope(row, tau) for tau in temperatures], 1 / (2 * temperatures)])
    return {
        "distance": distance / np.maximum(distance[:, :1], 1e-30),
        "separated": separated,
        "share chosen": np.array(SHARES),
        "slope": slope,
        "temperatures": temperatures,
    }
