"""Which heads look far, and can that be told without reading the far keys? A Gaussian estimate of the bulk's
mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Number, Paper, Session, diagnostic
from lab.inspect.scores import Progress, logits

FIRST, LAST, TAU = 16, 128, 0.4


@dataclass(frozen=True)
class Estimate:
    """Per query head and row read: true and estimated log mass of the bulk, and log mass of the near keys.

    All float32 [Hq, n]; ``rows`` int [n].
    """

    rows: np.ndarray
    bulk: np.ndarray
    estimated: np.ndarray
    near: np.ndarray


def estimate(capture: Capture, rows: Sequence[int], first: int = FIRST, last: int = LAST) -> Estimate:
    """Compare ln Z of the keys between the first and the newest with ln N + q.m + qCq/2 from their mean and
    covariance.

    Rows with an empty bulk give -inf for both. Evicted keys count in neither; a soft cap or bias is ignored
    by the
    estimate, as it would be by a method that does not read the keys.
    """
    n = len(rows)
    bulk, guess, near = (torch.full((capture.heads, n), -torch.inf) for _ in range(3))
    for column, i in enumerate(rows):
        lo, hi = min(first, i + 1), max(first, i + 1 - last)
        moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        for head in range(capture.heads):
            s = logits(capture, head, (i, i + 1), (0, i + 1))[0]
            near[head, column] = torch.logsumexp(torch.cat([s[:lo], s[max(lo, hi) :]]), 0)
            if hi <= lo:
                continue
            bulk[head, column] = torch.logsumexp(s[lo:hi], 0)
            kv = capture.kv_head(head)
            if kv not in moments:
                keys = capture.keys(kv)[lo:hi]
                if capture.death is not None:
                    keys = keys[capture.death[kv, lo:hi] > i]
                mean = keys.mean(0) if len(keys) else keys.sum(0)
                centred = keys - mean
                moments[kv] = (len(keys), mean, centred.T @ centred / max(1, len(keys)))
            count, mean, covariance = moments[kv]
            if count:
                q = capture.queries(head)[i]
                guess[head, column] = float(np.log(count)) + q @ mean + q @ covariance @ q / 2
    return Estimate(np.array(rows), bulk.numpy(), guess.numpy(), near.numpy())


def long_share(log_bulk: np.ndarray, log_near: np.ndarray) -> np.ndarray:
    """Share of a row's attention that lies in the bulk, from the two log masses; 0 where the bulk is
    empty."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.isneginf(log_bulk), 0.0, 1 / (1 + np.exp(log_near - log_bulk)))


@diagnostic(
    name="long_heads",
    title="Local and long-context heads",
    paper=Paper(
        "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification", "2502.09647", 2025
    ),
    needs=("captures",),
    help="Most heads read the first few and the newest tokens and little else. Whether this query "
    "needs the rest can be guessed from the mean and spread of the far keys alone, as if they "
    "were Gaussian, without reading them one by one.",
    explanation="The first map is the share of queries for which a head truly puts more than the "
    "threshold on the bulk of keys; the second says the same from the estimate. The misses "
    "are queries that did look far while the estimate called them local: a single needle "
    "hardly moves a mean.",
    figures=(
        Figure("long", "matrix", ("layer", "head"), "Share of queries that look far", "share of queries"),
        Figure("long_estimated", "matrix", ("layer", "head"), "The same, estimated from key moments", "share of queries"),
        Figure("misses", "matrix", ("layer", "head"), "Share of all queries that were missed", "share of queries"),
        Figure("far_mass", "matrix", ("layer", "head"), "Mean attention on the bulk", "share of attention"),
    ),
    numbers=(Number("tau", "a query looks far when more than {} of its attention lies on the bulk", share=True),),
    before=f"The bulk is what lies between the first {FIRST} and the newest {LAST} tokens: a shorter run has none.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Reads up to 64 rows that have a bulk; ``options``: "first", "last", "tau" (share that counts as
    looking far)."""
    first, last = session.options.get("first", FIRST), session.options.get("last", LAST)
    tau = session.options.get("tau", TAU)
    t = session.captures[0].tokens
    start = min(t - 1, first + last)
    rows = np.unique(np.linspace(start, t - 1, 64).astype(int)).tolist()
    true, guessed = [], []
    for n, capture in enumerate(session.captures):
        e = estimate(capture, rows, first, last)
        true.append(long_share(e.bulk, e.near))
        guessed.append(long_share(e.estimated, e.near))
        progress((n + 1) / len(session.captures))
    true, guessed = np.stack(true), np.stack(guessed)
    return {
        "long": (true > tau).mean(2),
        "long_estimated": (guessed > tau).mean(2),
        "misses": ((true > tau) & (guessed <= tau)).mean(2),
        "false_alarms": ((true <= tau) & (guessed > tau)).mean(2),
        "far_mass": true.mean(2),
        "rows": np.array(rows),
        "tau": np.array(tau),
    }
