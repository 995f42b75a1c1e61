"""The shape of every head in scalars: entropy, effective rank, variance, kurtosis, focus, concentration,
diversity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part
from lab.inspect.diagnostics.measures import effective_rank
from lab.inspect.scores import Progress, log_weights

LIMIT = 256
"""Rows and columns looked at: the last ones of longer runs, so that the matrix stays small."""
NAMES = (
    "entropy",
    "evenness",
    "effective_rank",
    "variance",
    "kurtosis",
    "concentration",
    "mean_distance",
    "focus_0",
    "focus_1",
    "focus_2",
    "focus_3",
)


def head_matrix(capture: Capture, head: int, limit: int = LIMIT) -> torch.Tensor:
    """float32 [R, n] weights of the last ``limit`` rows over everything they see."""
    t = capture.tokens
    return log_weights(capture, head, (max(0, t - limit), t), (0, t)).exp_()


def describe(a: torch.Tensor, first_row: int = 0) -> dict[str, float]:
    """Scalars of one attention matrix [R, n] whose first row is token ``first_row``.

    ``variance`` and ``kurtosis`` (excess) are over the visible weights of a row, averaged over rows; the
    focus at N is
    the mean weight on the token N before.
    """
    rows, n = a.shape
    i = torch.arange(first_row, first_row + rows, device=a.device)
    j = torch.arange(n, device=a.device)
    seen = (j <= i[:, None]).to(a.dtype)
    count = seen.sum(1)
    entropy = -torch.xlogy(a, a.clamp(min=1e-30)).sum(1)
    mean = a.sum(1) / count
    centred = (a - mean[:, None]) * seen
    var = (centred**2).sum(1) / count
    several = count > 2
    fourth = (centred**4).sum(1) / count
    spread = several & (var > 1e-14)
    kurtosis = (fourth[spread] / var[spread] ** 2 - 3).mean() if spread.any() else torch.tensor(torch.nan)
    out = {
        "entropy": entropy.mean(),
        "evenness": (
            (entropy[count > 1] / count[count > 1].log()).mean() if (count > 1).any() else torch.tensor(0.0)
        ),
        "effective_rank": effective_rank(torch.linalg.svdvals(a)),
        "variance": var.mean(),
        "kurtosis": kurtosis,
        "concentration": a.norm(),
        "mean_distance": (i * a.sum(1) - a @ j.to(a.dtype)).mean(),
    }
    for back in range(4):
        at = i - back
        ok = at >= 0
        picked = a.gather(1, at.clamp(min=0)[:, None])[:, 0][ok]
        out[f"focus_{back}"] = picked.mean() if ok.any() else torch.tensor(torch.nan)
    return {name: float(out[name]) for name in NAMES}


def without_first(a: torch.Tensor) -> torch.Tensor:
    """The matrix without token 0's column, rows renormalised (rows that gave it everything become 0)."""
    rest = a.clone()
    rest[:, 0] = 0
    return rest / rest.sum(1, keepdim=True).clamp(min=1e-30)


def shapes(
    captures: Sequence[Capture],
    limit: int = LIMIT,
    drop_first: bool = False,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """{name: float32 [L, Hq]} for every name in ``NAMES`` and ``diversity`` float32 [L] (mean spread between
    heads)."""
    out = {name: np.zeros((len(captures), captures[0].heads), dtype=np.float32) for name in NAMES}
    diversity = np.zeros(len(captures), dtype=np.float32)
    for layer, capture in enumerate(captures):
        total, squares = 0.0, 0.0
        for head in range(capture.heads):
            a = head_matrix(capture, head, limit)
            a = without_first(a) if drop_first else a
            for name, value in describe(a, capture.tokens - a.shape[0]).items():
                out[name][layer, head] = value
            total, squares = total + a, squares + a**2
            if progress:
                progress((layer * capture.heads + head + 1) / (len(captures) * capture.heads))
        spread = (squares / capture.heads - (total / capture.heads) ** 2).clamp(min=0).sqrt()
        diversity[layer] = float(spread.mean())
    return out | {"diversity": diversity}


def output_shapes(outputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """{"output_effective_rank", "output_kurtosis": float32 [L]} of attention outputs [T, D]."""
    rank, kurtosis = [], []
    for o in outputs:
        o = o.detach().float()
        rank.append(float(effective_rank(torch.linalg.svdvals(o))))
        o = o.double()
        c = o - o.mean()
        kurtosis.append(float((c**4).mean() / (c**2).mean().clamp(min=1e-30) ** 2 - 3))
    return {
        "output_effective_rank": np.array(rank, dtype=np.float32),
        "output_kurtosis": np.array(kurtosis, dtype=np.float32),
    }


@diagnostic(
    name="shapes",
    title="Shape of every head",
    paper=Paper(
        "When Self-Reference Fails to Close: Matrix-Level Dynamics in Large Language Models",
        "2604.12128",
        2026,
    ),
    needs=("captures",),
    help="A head is a matrix of weights, and a few numbers tell its kind. Entropy says how spread "
    "a row is, effective rank how many different rows there are, kurtosis how spiky a row is, "
    "and the focus how much goes to the token itself or just before.",
    explanation="Each map is one number per head; a head with low entropy and a rank near one reads the "
    "same token from everywhere, a high rank with low entropy reads something different in "
    "every row. Both versions are given, with and without token 0, because the sink dominates "
    "every one of these numbers.",
    figures=(
        Figure("entropy", "matrix", ("layer", "head"), "Entropy of a row", "nats"),
        Figure("effective_rank", "matrix", ("layer", "head"), "Effective rank", "different rows"),
        Figure("variance", "matrix", ("layer", "head"), "Variance of a row's weights", "variance"),
        Figure("kurtosis", "matrix", ("layer", "head"), "Excess kurtosis of a row's weights", "0: as a bell curve"),
        Figure("no_sink_effective_rank", "matrix", ("layer", "head"), "Effective rank without token 0", "different rows"),
    ),
    before=f"Reads the last {LIMIT} rows.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """All scalars with and without token 0 (prefix ``no_sink_``), and the attention outputs' where they are
    known."""
    limit = session.options.get("limit", LIMIT)
    out = shapes(session.captures, limit, progress=part(progress, 0, 0.5))
    bare = shapes(session.captures, limit, drop_first=True, progress=part(progress, 0.5, 1))
    out |= {f"no_sink_{name}": value for name, value in bare.items()}
    if session.attention_out:
        out |= output_shapes(session.attention_out)
    return out
