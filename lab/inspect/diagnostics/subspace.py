"""How many directions do attention outputs use? Their spectrum against the MLP's and the residual
stream's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Number, Paper, Session, diagnostic, part
from lab.inspect.scores import Progress

SHARE = 0.99


def spectrum(x: torch.Tensor) -> np.ndarray:
    """float64 share of variance of each principal direction of rows [n, D], descending."""
    x = x.detach().double()
    s = torch.linalg.svdvals((x - x.mean(0)).float()).double() ** 2
    return (s / s.sum().clamp(min=1e-300)).cpu().numpy()


def rank_at(shares: np.ndarray, share: float = SHARE) -> int:
    """Fewest directions that hold at least ``share`` of the variance."""
    return int(np.searchsorted(np.cumsum(shares), share - 1e-12) + 1)


def relative_ranks(
    outputs: Sequence[torch.Tensor], share: float = SHARE, progress: Progress | None = None
) -> np.ndarray:
    """float32 [L] ``rank_at`` over the largest rank these rows could have, min(n - 1, D)."""
    out = []
    for n, x in enumerate(outputs):
        x = x[torch.isfinite(x).all(1)]
        out.append(rank_at(spectrum(x), share) / max(1, min(x.shape[0] - 1, x.shape[1])))
        if progress:
            progress((n + 1) / len(outputs))
    return np.array(out, dtype=np.float32)


@diagnostic(
    name="subspace",
    title="Low-dimensional attention outputs",
    paper=Paper("Attention Layers Add Into Low-Dimensional Residual Subspaces", "2508.16929", 2025),
    needs=("attention_out", "mlp_out", "hidden"),
    help="The vectors that attention adds to the residual stream vary in far fewer directions than "
    "they have channels. Counting the principal directions that hold 99 % of the variance, "
    "in attention outputs, MLP outputs and the stream, makes the difference visible.",
    explanation="Lower lines use fewer directions; attention usually runs below the MLP in most layers. "
    "With fewer tokens than about ten per channel the ratio is taken to the largest rank "
    "those tokens allow, and it is then a bound rather than the model's property.",
    figures=(
        Figure(
            "ranks",
            "lines",
            ("part", "layer"),
            "Directions that hold 99 % of the variance",
            "share of the largest rank possible",
            {"part": ("attention output", "MLP output", "residual stream")},
        ),
        Figure("spectrum", "lines", ("layer", "direction"), "Variance of attention outputs left after so many directions",
               "share of the variance", phrase="layer {}"),
    ),
    numbers=(
        Number("below_mlp", "attention uses fewer directions than the MLP in {} of the layers", share=True),
        Number("tokens_per_channel", "{} tokens per channel were read (ten make a property of the model)"),
    ),
    before="One forward pass over the run's tokens; token 0 is left out.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Token 0 is left out: its massive activation would be most of the variance."""
    parts = []
    streams = (session.attention_out, session.mlp_out, list(session.hidden)[1:])
    for n, outputs in enumerate(streams):
        parts.append(relative_ranks([x[1:] for x in outputs], progress=part(progress, n / 4, (n + 1) / 4)))
    length = min(len(p) for p in parts)
    spectra = []
    for n, x in enumerate(session.attention_out):
        spectra.append(spectrum(x[1:]))
        progress(0.75 + 0.25 * (n + 1) / len(session.attention_out))
    left = np.stack([1 - np.cumsum(s) for s in spectra]).clip(min=0)
    ranks = np.stack([p[:length] for p in parts])
    tokens, channels = session.attention_out[0].shape
    return {
        "ranks": ranks,
        "spectrum": left.astype(np.float32),
        "below_mlp": np.array((ranks[0] < ranks[1]).mean()),
        "tokens_per_channel": np.array((tokens - 1) / channels),
    }
