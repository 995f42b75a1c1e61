"""Where attention is parked: sink rates, stable sinks and whether they move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part, to_numpy
from lab.inspect.scores import Progress, logits, row_blocks, weights

THRESHOLDS = (0.1, 0.3, 0.5, 0.8)
MIN_ROWS = 32
"""Columns seen by fewer rows than this have no reliable mean."""


def received(capture: Capture, progress: Progress | None = None) -> torch.Tensor:
    """float32 [Hq, T] mean weight each token gets from the rows at or after it."""
    t = capture.tokens
    out = torch.zeros(capture.heads, t, device=capture.q.device)
    for head in range(capture.heads):
        for rows in row_blocks(capture):
            out[head, : rows[1]] += weights(capture, head, rows, (0, rows[1])).sum(0)
            if progress:
                progress((head + rows[1] / t) / capture.heads)
    return out / torch.arange(t, 0, -1, device=out.device)


def sink_rate(alpha: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """float32 [thresholds, T] share of heads ([L, Hq, T] received weights) in which each token passes a
    threshold."""
    return np.stack([(alpha > e).mean(axis=(0, 1)) for e in thresholds]).astype(np.float32)


def stable_sinks(alpha: np.ndarray, threshold: float = 0.1, min_rows: int = MIN_ROWS) -> np.ndarray:
    """int32 [n, 3] (layer, head, position) that receive more than ``threshold`` on average from enough
    rows."""
    enough = np.arange(alpha.shape[-1], 0, -1) >= min(min_rows, alpha.shape[-1])
    return np.argwhere((alpha > threshold) & enough).astype(np.int32)


def drift(capture: Capture, parts: int = 16, progress: Progress | None = None) -> np.ndarray:
    """int32 [Hq, parts] the token that receives most in each of consecutive groups of rows: a sink that
    moves shows."""
    t = capture.tokens
    edges = np.unique(np.linspace(0, t, min(parts, t) + 1).astype(int))
    out = np.zeros((capture.heads, len(edges) - 1), dtype=np.int32)
    for head in range(capture.heads):
        for n, (a, b) in enumerate(zip(edges, edges[1:])):
            mass = torch.zeros(t, device=capture.q.device)
            for rows in row_blocks(capture, (int(a), int(b))):
                mass[: rows[1]] += weights(capture, head, rows, (0, rows[1])).sum(0)
            out[head, n] = int(mass.argmax())
        if progress:
            progress((head + 1) / capture.heads)
    return out


def dwell(positions: np.ndarray) -> np.ndarray:
    """float32 [...] share of steps along the last axis that keep the same sink as the step before; 1 = never
    moves."""
    if positions.shape[-1] < 2:
        return np.ones(positions.shape[:-1], dtype=np.float32)
    return (positions[..., 1:] == positions[..., :-1]).mean(axis=-1).astype(np.float32)


def advantage(capture: Capture, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(mean, spread) float32 [Hq] of token 0's logit over the mean of the other visible logits, over sampled rows, in nats.

    A sink that is a bias of the key stands high by nearly the same amount in every row.
    """
    t, mean, spread = capture.tokens, [], []
    chosen = np.unique(np.linspace(min(8, t - 1), t - 1, rows).astype(int))
    for head in range(capture.heads):
        found = []
        for i in chosen:
            s = logits(capture, head, (int(i), int(i) + 1), (0, int(i) + 1))[0]
            rest = s[1:][torch.isfinite(s[1:])]
            if torch.isfinite(s[0]) and rest.numel():
                found.append(float(s[0] - rest.mean()))
        mean.append(np.mean(found) if found else np.nan)
        spread.append(np.std(found) if found else np.nan)
    return np.array(mean, dtype=np.float32), np.array(spread, dtype=np.float32)


@diagnostic(
    name="sinks",
    title="Attention sinks",
    paper=Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781", 2024),
    needs=("captures",),
    help="Softmax must put its weight somewhere. Heads that have nothing to say park it on a token "
    "that carries little, mostly the first. The sink rate is the share of heads that give a "
    "token more than a threshold of their attention, averaged over all later rows.",
    explanation="The first token usually stands far above the rest at every threshold, and other columns "
    "with a high rate are secondary sinks. A sink takes weight, not meaning: its value vector "
    "is usually small, so dropping it hurts by changing the normalisation.",
    figures=(
        Figure("rate", "lines", ("threshold", "token"), "Heads that park more than a share of attention on a token",
               "share of heads", phrase="over {}"),
        Figure("first_token", "matrix", ("layer", "head"), "Mean weight on token 0", "share of attention"),
        Figure("dwell", "matrix", ("layer", "head"), "How often the strongest token stays the same", "share of steps"),
        Figure("bias", "matrix", ("layer", "head"), "Token 0's logit over the mean of the others", "nats"),
        Figure("bias_spread", "matrix", ("layer", "head"), "How much that varies from row to row (a bias would not)",
               "nats, standard deviation"),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Received weights of all captured layers, rates at four thresholds, stable sinks and their drift."""
    alpha, where, bias = [], [], []
    for n, capture in enumerate(session.captures):
        told = part(progress, n / len(session.captures), (n + 1) / len(session.captures))
        alpha.append(to_numpy(received(capture, part(told, 0, 0.5))))
        where.append(drift(capture, progress=part(told, 0.5, 0.9)))
        bias.append(advantage(capture))
        told(1.0)
    alpha, where = np.stack(alpha), np.stack(where)
    return {
        "received": alpha,
        "rate": sink_rate(alpha),
        "thresholds": np.array(THRESHOLDS),
        "first_token": alpha[:, :, 0],
        "stable": stable_sinks(alpha),
        "drift": where,
        "dwell": dwell(where),
        "bias": np.stack([mean for mean, _ in bias]),
        "bias_spread": np.stack([spread for _, spread in bias]),
    }
