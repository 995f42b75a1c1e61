"""Attention-IoU: how much two non-negative maps overlap, as one number."""

from __future__ import annotations

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import MARKED, OUTPUT, Arrays, Figure, Number, Paper, Session, diagnostic
from lab.inspect.scores import Progress, weights


def attention_iou(a: np.ndarray, b: np.ndarray) -> float:
    """sum ab / sum ((a + b) / 2)^2 of the maps scaled to sum 1: 1 iff equal, 0 iff disjoint; NaN for an
    empty map."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.sum() <= 0 or b.sum() <= 0:
        return float("nan")
    a, b = a / a.sum(), b / b.sum()
    return float((a * b).sum() / (((a + b) / 2) ** 2).sum())


@diagnostic(
    name="iou",
    title="Overlap with highlighted words",
    paper=Paper("Attention IoU: Examining Biases in CelebA using Attention Maps", "2503.19846", 2025),
    needs=("captures", "marked"),
    help="Highlight words and see which heads look just there: the overlap is one when a head "
    "spreads its attention over exactly those words and zero when it looks elsewhere. With "
    "words that should not matter it is a test for bias.",
    explanation="Bright heads attend to the highlighted words when the chosen token is read. Overlap says "
    "where a head looks, not what it does with it, so check a suspect by removing the words.",
    figures=(
        Figure("overlap", "matrix", ("layer", "head"), "Attention-IoU with the highlighted words", "0: disjoint, 1: equal"),
        Figure("mass", "matrix", ("layer", "head"), "Attention on the highlighted words", "share of attention"),
    ),
    numbers=(Number("row", "read at row {}"),),
    before="Needs words of the prompt: type some into the field below.",
    inputs=(MARKED, OUTPUT),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options["output"]`` chooses the row (default the last)."""
    t = session.captures[0].tokens
    row = session.captures[0].check_row(session.options.get("output", t - 1))
    marked = sorted({m for m in session.marked if 0 <= m <= row})
    if not marked:
        raise LabError(
            f"None of the highlighted words comes before token {row}", None, "Highlight earlier words"
        )
    mask = np.zeros(row + 1)
    mask[marked] = 1
    overlap, mass = [], []
    for n, c in enumerate(session.captures):
        w = (
            torch.stack([weights(c, h, (row, row + 1), (0, row + 1))[0] for h in range(c.heads)])
            .cpu()
            .numpy()
        )
        overlap.append([attention_iou(a, mask) for a in w])
        mass.append(w[:, marked].sum(1))
        progress((n + 1) / len(session.captures))
    return {"overlap": np.array(overlap), "mass": np.array(mass), "row": np.array(row)}
