"""Which prompt tokens matter, by each layer's own ranking and by what the answer looked at."""

from __future__ import annotations

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic
from lab.inspect.diagnostics.measures import overlap, spearman
from lab.inspect.scores import Progress, weights

WINDOW, KERNEL, LAYERS, RATE = 32, 7, 4, 0.3  # those of the technique `claa`
BOTH = {"ranking": ("this layer alone", f"best of {LAYERS} layers")}


def pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    """Mean over neighbouring positions of scores [N]; at the edges over what exists."""
    ones = np.ones(kernel)
    return np.convolve(scores, ones, "same") / np.convolve(np.ones_like(scores), ones, "same")


def ranking(capture: Capture, prompt: int, window: int) -> np.ndarray:
    """float64 [prompt - window]: attention from the last `window` prompt rows, summed over rows and heads."""
    total = np.zeros(prompt - window)
    for head in range(capture.heads):
        total += weights(capture, head, (prompt - window, prompt), (0, prompt - window)).sum(0).double().cpu().numpy()
    return total


def answer_ranking(captures: list[Capture], prompt: int, progress: Progress) -> np.ndarray:
    """float64 [prompt]: attention of the answer's rows over prompt positions alone, its maximum over layers and heads, the mean
    over rows."""
    best = None
    for n, capture in enumerate(captures):
        for head in range(capture.heads):
            p = weights(capture, head, (prompt, capture.tokens), (0, prompt)).double()
            p = p / p.sum(1, keepdim=True).clamp_min(1e-30)
            best = p if best is None else torch.maximum(best, p)
        progress(0.5 * (n + 1) / len(captures))
    return best.mean(0).cpu().numpy()


@diagnostic(
    name="prompt_ranking",
    title="Ranking of prompt tokens",
    paper=Paper("CLAA: Cross-Layer Attention Aggregation for Accelerating LLM Prefill", "2602.16054", 2026),
    needs=("captures", "prompt_tokens"),
    help="Methods that drop prompt tokens early rank them by what the last tokens of the prompt attend to in some layer. The "
    "answer tells afterwards which tokens it really looked at: the oracle. The curves compare every layer's own ranking, and "
    "the best score of a few layers together, with that oracle.",
    explanation="Where a layer's curve is low, cutting the prompt there by its ranking alone loses what the answer needs, and "
    "the combined ranking should stay above the dips. The oracle is one answer to one prompt, and attention is not proof of use.",
    figures=(
        Figure("overlap", "lines", ("ranking", "layer"), "The oracle's top tokens that a ranking finds", "share found", BOTH),
        Figure("rank_correlation", "lines", ("ranking", "layer"), "Agreement with the oracle", "Spearman correlation", BOTH),
        Figure("scores", "lines", ("score", "token"), "Scores by position", "over the largest",
               {"score": ("combined, before the last layer", "oracle: what the answer read")}),
    ),
    before="Needs generated tokens after a prompt of at least 8.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options["ranking"]``: {"window", "kernel", "layers", "rate"} other than the technique's. Tokens of the window itself,
    which always go on, are not ranked."""
    asked = {"window": WINDOW, "kernel": KERNEL, "layers": LAYERS, "rate": RATE, **session.options.get("ranking", {})}
    captures, prompt = list(session.captures), session.prompt_tokens
    window = min(asked["window"], max(1, prompt // 4))
    if prompt >= captures[0].tokens or prompt < 8:
        raise LabError(
            "There is no answer to compare with", "The run holds generated tokens after a prompt", "Generate some tokens"
        )
    oracle = pooled(answer_ranking(captures, prompt, progress)[: prompt - window], asked["kernel"])
    alone = []
    for n, capture in enumerate(captures):
        alone.append(pooled(ranking(capture, prompt, window), asked["kernel"]))
        progress(0.5 + 0.5 * (n + 1) / len(captures))
    combined = [np.max(alone[max(0, n + 1 - asked["layers"]) : n + 1], axis=0) for n in range(len(alone))]
    count = max(1, round(asked["rate"] * len(oracle)))
    both = (alone, combined)
    return {
        "overlap": np.array([[overlap(x, oracle, count) for x in side] for side in both]),
        "rank_correlation": np.array([[spearman(x, oracle) for x in side] for side in both]),
        "scores": np.stack([combined[-1] / max(combined[-1].max(), 1e-30), oracle / max(oracle.max(), 1e-30)]),
    }
