"""An atlas of head patterns: thumbnails reduced, clustered, and shown by their most typical members."""

from __future__ import annotations

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic
from lab.inspect.heads import grid, sampled_blocks
from lab.inspect.scores import Progress, weights

DIMENSIONS, CHOICES = 16, range(4, 13)


def features(thumbnails: np.ndarray, dimensions: int = DIMENSIONS) -> np.ndarray:
    """[n, s, s] thumbnails to [n, <= dimensions] principal components; each row of a thumbnail is scaled to
    its largest."""
    x = np.nan_to_num(np.asarray(thumbnails, dtype=np.float64))
    x = x / np.maximum(x.max(axis=2, keepdims=True), 1e-12)
    x = x.reshape(len(x), -1)
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return (u * s)[:, : min(dimensions, len(s))]


def kmeans(
    x: np.ndarray, k: int, seed: int = 0, rounds: int = 100, starts: int = 8
) -> tuple[np.ndarray, float]:
    """(labels [n], within-cluster sum of squares) of the best of several k-means++ starts; deterministic."""
    rng, best = np.random.default_rng(seed), (np.zeros(len(x), dtype=int), np.inf)
    for _ in range(starts):
        centres = [x[rng.integers(len(x))]]
        while len(centres) < k:
            d = ((x[:, None] - np.array(centres)) ** 2).sum(2).min(1)
            centres.append(x[rng.choice(len(x), p=d / d.sum())] if d.sum() > 0 else x[rng.integers(len(x))])
        centres = np.array(centres)
        for _ in range(rounds):
            labels = ((x[:, None] - centres) ** 2).sum(2).argmin(1)
            moved = np.array(
                [x[labels == c].mean(0) if (labels == c).any() else centres[c] for c in range(k)]
            )
            if np.allclose(moved, centres):
                break
            centres = moved
        labels = ((x[:, None] - centres) ** 2).sum(2).argmin(1)
        cost = float(((x - centres[labels]) ** 2).sum())
        if cost < best[1]:
            best = (labels, cost)
    return best


def silhouette(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette, -1..1; 0 for points alone in their cluster."""
    d = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    scores = np.zeros(len(x))
    names = np.unique(labels)
    if len(names) < 2:
        return 0.0
    for i in range(len(x)):
        own = labels == labels[i]
        if own.sum() < 2:
            continue
        a = d[i, own].sum() / (own.sum() - 1)
        b = min(d[i, labels == c].mean() for c in names if c != labels[i])
        scores[i] = (b - a) / max(a, b, 1e-30)
    return float(scores.mean())


def cluster(x: np.ndarray, choices: range = CHOICES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n] renumbered by size, silhouette of each tried k); the k with the highest silhouette wins."""
    tried = [k for k in choices if k < len(x)]
    if not tried:
        return np.zeros(len(x), dtype=int), np.zeros(0)
    found = [kmeans(x, k, seed)[0] for k in tried]
    scores = np.array([silhouette(x, labels) for labels in found])
    labels = found[int(scores.argmax())]
    names, counts = np.unique(labels, return_counts=True)
    order = {int(name): n for n, name in enumerate(names[np.argsort(-counts, kind="stable")])}
    return np.array([order[int(label)] for label in labels]), scores


def exemplars(x: np.ndarray, labels: np.ndarray, each: int = 4) -> np.ndarray:
    """int64 [clusters, each] members nearest to their cluster's centre, -1 where a cluster is smaller."""
    out = np.full((labels.max() + 1, each), -1)
    for c in range(labels.max() + 1):
        members = np.flatnonzero(labels == c)
        near = members[np.argsort(((x[members] - x[members].mean(0)) ** 2).sum(1), kind="stable")][:each]
        out[c, : len(near)] = near
    return out


EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def strength(capture: Capture, rows: int = 256) -> np.ndarray:
    """float64 [len(EDGES)] share of attention by distance, mean over heads and sampled rows: [0], [1], [2, 3], [4, 7] ..."""
    out, count = np.zeros(len(EDGES)), 0
    for block in sampled_blocks(capture.tokens, rows, first=min(1, capture.tokens - 1)):
        far = torch.arange(*block)[:, None] - torch.arange(block[1])
        bins = torch.bucketize(far.clamp(min=0), torch.tensor(EDGES), right=True) - 1
        for head in range(capture.heads):
            w = weights(capture, head, block, (0, block[1])).double().cpu()
            out += torch.zeros(len(EDGES), dtype=torch.float64).index_add_(0, bins.flatten(), w.flatten()).numpy()
        count += (block[1] - block[0]) * capture.heads
    return out / max(1, count)


def reached(by_distance: np.ndarray, tokens: int) -> tuple[np.ndarray, list[str]]:
    """([L, n] shares, n names): distances that fewer than half of ``tokens`` rows reach count to the last that they do."""
    n = max(1, int(np.searchsorted(EDGES, tokens / 2, side="right")))
    out = by_distance[:, :n].copy()
    out[:, -1] += by_distance[:, n:].sum(1)
    names = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in zip(EDGES[: n - 1], EDGES[1:n])]
    return out, [*names, f"{EDGES[n - 1]} or more"]


@diagnostic(
    name="atlas",
    title="Atlas of head patterns",
    paper=Paper(
        "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", "2303.13731", 2023
    ),
    needs=("captures",),
    help="Heads fall into a handful of patterns: a diagonal, a stripe at the first token, blocks, "
    "an even spread. Every head's thumbnail is reduced to sixteen numbers and grouped, and "
    "each group is shown by the small maps of its most typical members.",
    explanation="Heads of one colour draw alike on this text, and the exemplars show how. The number of "
    "groups is the one that separates best between 4 and 12, and another text may group heads "
    "differently.",
    figures=(
        Figure("exemplars", "thumbnails", ("group", "member"), "The most typical heads of each group",
               "weight, each row over its largest", {"member": ("most typical", "second", "third", "fourth")},
               cells="thumbnails"),
        Figure("cluster", "groups", ("layer", "head"), "Group of each head"),
        Figure("position", "scatter", ("first principal component", "second principal component"), "Heads by likeness",
               cells="cluster"),
        Figure("silhouette", "bars", ("number of groups",), "How well groups separate", "mean silhouette, 1 at most",
               {"number of groups": CHOICES}),
        Figure("strength", "matrix", ("layer", "distance"), "Attention by distance in each layer", "share of attention"),
        Figure("importance", "bars", ("group",), "Mean importance of the heads of each group", "mean importance",
               absent="Compute importance in the head grid above first, then run this again."),
    ),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Exemplars index heads as layer * Hq + head.

    ``options["importance"]`` [layers, heads] gives each pattern's mean importance; NaN where it is not known.
    """
    thumbnails = grid(session.captures, progress=lambda f: progress(0.8 * f)).values
    layers, heads = thumbnails.shape[:2]
    if layers * heads < 5:
        raise LabError(
            f"There are only {layers * heads} heads to compare",
            "An atlas needs at least five",
            "Capture more layers",
        )
    x = features(thumbnails.reshape(layers * heads, *thumbnails.shape[2:]))
    labels, scores = cluster(x)
    weigh = np.asarray(session.options.get("importance", np.full((layers, heads), np.nan)), dtype=np.float64)
    if weigh.shape != (layers, heads):
        weigh = np.full((layers, heads), np.nan)
    by_distance = []
    for n, capture in enumerate(session.captures):
        by_distance.append(strength(capture))
        progress(0.8 + 0.2 * (n + 1) / len(session.captures))
    by_distance, distances = reached(np.stack(by_distance), session.captures[0].tokens)
    return {
        "strength": by_distance,
        "distances": np.array(distances),
        "importance": np.array([weigh.flatten()[labels == c].mean() for c in range(labels.max() + 1)]),
        "cluster": labels.reshape(layers, heads),
        "position": x[:, :2],
        "silhouette": scores,
        "exemplars": exemplars(x, labels),
        "thumbnails": thumbnails,
    }
