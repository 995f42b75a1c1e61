"""The attention basin: documents at the ends of a list get more attention than those in the middle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic
from lab.inspect.diagnostics.measures import bootstrap
from lab.inspect.scores import Progress, row_blocks, weights


def slot_attention(capture: Capture, slots: Sequence[tuple[int, int]], rows: tuple[int, int]) -> np.ndarray:
    """float64 [Hq, slots] attention per token of each slot, averaged over the rows."""
    out = np.zeros((capture.heads, len(slots)))
    for head in range(capture.heads):
        for block in row_blocks(capture, rows):
            mass = weights(capture, head, block, (0, block[1])).sum(0).cpu().numpy()
            out[head] += [mass[a:b].sum() / (b - a) for a, b in slots]
    return out / (rows[1] - rows[0])


def basin_score(curve: np.ndarray) -> float:
    """Mean of the first and last slot minus the mean of those between: positive for a basin."""
    return float((curve[0] + curve[-1]) / 2 - curve[1:-1].mean())


def average(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [K], 95 % interval [K, 2]) of curves [shuffles, K], so that what the documents say cancels
    out."""
    curves = np.asarray(curves, dtype=np.float64)
    return curves.mean(0), np.array([bootstrap(curves[:, k]) for k in range(curves.shape[1])])


def reorder(curve: np.ndarray, relevance: Sequence[float]) -> list[int]:
    """Which document goes to each slot so that the most relevant get the most attended slots (ties to the
    earlier)."""
    by_attention = np.argsort(-np.asarray(curve), kind="stable")
    by_relevance = np.argsort(-np.asarray(relevance, dtype=np.float64), kind="stable")
    out = [0] * len(by_attention)
    for slot, document in zip(by_attention, by_relevance):
        out[slot] = int(document)
    return out


@diagnostic(
    name="basin",
    title="Attention basin",
    paper=Paper(
        "Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128", 2025
    ),
    needs=("captures", "documents"),
    help="Give a model a list of documents and it looks most at the first and the last, least at "
    "those in the middle. The curve is the attention each place in the list gets from the "
    "tokens after it, whatever stands there.",
    explanation="A curve high at both ends and low between is a basin, and its score is the height of the "
    "ends over the middle. One run shows place and content mixed: average runs with shuffled "
    "documents before you believe the shape.",
    figures=(
        Figure("curve", "bars", ("slot",), "Attention per token of each document"),
        Figure("by_layer", "matrix", ("layer", "slot"), "The same for each layer"),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Reads the rows after the last document. ``options["curves"]``: earlier shuffles [n, K] to average
    with."""
    slots, t = list(session.documents), session.captures[0].tokens
    if len(slots) < 3 or any(not 0 <= a < b <= t for a, b in slots) or slots[-1][1] >= t:
        raise LabError(
            "The attention basin needs at least three documents with text after them",
            f"Document ranges lie inside the run's {t} tokens",
            "Mark the documents again",
        )
    by_layer = []
    for n, capture in enumerate(session.captures):
        by_layer.append(slot_attention(capture, slots, (slots[-1][1], t)).mean(0))
        progress((n + 1) / len(session.captures))
    by_layer = np.stack(by_layer)
    curves = np.concatenate(
        [np.reshape(session.options.get("curves", []), (-1, len(slots))), by_layer.mean(0)[None]]
    )
    mean, interval = average(curves)
    return {
        "curve": mean,
        "interval": interval,
        "by_layer": by_layer,
        "score": np.array(basin_score(mean)),
        "curves": curves,
    }
