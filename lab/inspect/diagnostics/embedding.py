"""Token embedding variability: how evenly the embedding's rows are spread, and how variance grows through
the layers."""

from __future__ import annotations

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Number, Paper, Session, diagnostic, to_numpy
from lab.inspect.scores import Progress


def variability(embedding: torch.Tensor, piece: int = 8192) -> torch.Tensor:
    """float32 [V] standard deviation of each row's channels; the TEV is its mean."""
    return torch.cat([part.detach().float().std(1, correction=0) for part in embedding.split(piece)])


@diagnostic(
    name="embedding",
    title="Token embedding variability",
    paper=Paper("Stable Language Model Pre-training by Reducing Embedding Variability", "2409.07787", 2024),
    needs=("embedding", "hidden"),
    help="How far an embedding's channels spread, per token of the vocabulary, is a cheap sign of "
    "how stable training was: large or uneven variability goes with noisy gradients. The "
    "second figure follows the variance of the hidden states through the layers.",
    explanation="A narrow histogram means that all tokens enter at the same scale, outliers are usually "
    "rare or unused tokens. The growth line shows by how much the residual stream has grown "
    "when the last layer reads it; one model's number says little, it is meant to compare "
    "checkpoints.",
    figures=(
        Figure("histogram", "bars", ("standard deviation",), "Tokens by the spread of their channels", "tokens"),
        Figure("growth", "lines", ("state",), "Variance of the hidden state", "variance over channels, median token"),
    ),
    numbers=(
        Number("tev", "mean standard deviation of a token's channels {}"),
        Number("tev_spread", "which varies between tokens by {} (standard deviation)"),
    ),
    before="Reads the whole embedding, and one forward pass over the run.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """TEV, its spread, the histogram with edges, and the median token variance of each hidden state."""
    spread = to_numpy(variability(session.embedding))
    counts, edges = np.histogram(spread, bins=48)
    progress(0.5)
    growth = [float(h.detach().float().var(1, correction=0).median()) for h in session.hidden]
    progress(1.0)
    return {
        "tev": np.array(spread.mean()),
        "tev_spread": np.array(spread.std()),
        "histogram": counts,
        "edges": edges,
        "growth": np.array(growth, dtype=np.float32),
    }
