"""Attention followed through the layers: rollout at any length, and maximum flow on short runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import OUTPUT, Arrays, Figure, Number, Paper, Session, diagnostic, part, to_numpy
from lab.inspect.rollout import mean_weights, rollout_rows
from lab.inspect.scores import Progress

FLOW_TOKENS = 48


def uniform_rollout(layers: int, rows: Sequence[int], t: int) -> torch.Tensor:
    """The rollout of a model whose heads spread evenly over the past: what early tokens get for being
    early."""
    x = torch.zeros(len(rows), t, dtype=torch.float64)
    x[torch.arange(len(rows)), torch.as_tensor(list(rows))] = 1.0
    for _ in range(layers):
        share = x / torch.arange(1, t + 1)
        x = x / 2 + share.flip(1).cumsum(1).flip(1) / 2
    return x.float()


def flow(
    captures: Sequence[Capture], output: int, first: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """float64 [output + 1 - first] maximum flow from ``output`` in the last layer to each input token from ``first`` on.

    Edges between layers carry half the head-mean attention plus half the identity; what rows read before ``first`` has no edge.
    """
    t = captures[0].check_row(output) + 1
    if t - first > FLOW_TOKENS:
        raise LabError(
            f"Attention flow is computed for at most {FLOW_TOKENS} tokens, and position {output} has {t - first}",
            None,
            "Choose an earlier token or a shorter prompt",
        )
    n = t - first
    layers = [(to_numpy(mean_weights(c, (first, t))[:, first:]).astype(np.float64) + np.eye(n)) / 2 for c in captures]
    found = []
    for j in range(n):
        found.append(max_flow(layers, n - 1, j))
        if progress:
            progress((j + 1) / n)
    return np.array(found)


def max_flow(layers: list[np.ndarray], output: int, source: int) -> float:
    """Maximum flow from (top layer, ``output``) down to (layer 0, ``source``) through capacities [row,
    column].

    Augments along shortest paths found breadth first; numbers below 1e-9 count as nothing.
    """
    depth = len(layers)
    # Index l joins level l+1 (rows) to level l (columns): down is what is left, up what can be taken back.
    down = [a.copy() for a in layers]
    up = [np.zeros_like(a) for a in layers]
    total = 0.0
    while True:
        came = {(depth, output): None}
        queue = deque([(depth, output)])
        while queue and (0, source) not in came:
            level, i = queue.popleft()
            if level > 0:
                for j in np.flatnonzero(down[level - 1][i] > 1e-9):
                    if (level - 1, j) not in came:
                        came[(level - 1, int(j))] = (level, i)
                        queue.append((level - 1, int(j)))
            if level < depth:
                for j in np.flatnonzero(up[level][:, i] > 1e-9):
                    if (level + 1, j) not in came:
                        came[(level + 1, int(j))] = (level, i)
                        queue.append((level + 1, int(j)))
        if (0, source) not in came:
            return total
        path, node = [], (0, source)
        while came[node] is not None:
            path.append((came[node], node))
            node = came[node]
        amount = min(down[b[0]][a[1], b[1]] if b[0] < a[0] else up[a[0]][b[1], a[1]] for a, b in path)
        for a, b in path:
            if b[0] < a[0]:
                down[b[0]][a[1], b[1]] -= amount
                up[b[0]][a[1], b[1]] += amount
            else:
                up[a[0]][b[1], a[1]] -= amount
                down[a[0]][b[1], a[1]] += amount
        total += float(amount)


@diagnostic(
    name="rollout",
    title="Attention rollout and flow",
    paper=Paper("Quantifying Attention Flow in Transformers", "2005.00928", 2020),
    needs=("captures",),
    help="Each layer mixes tokens, so a late layer's attention does not point at words any more. "
    "Rollout multiplies the layers together, with half of every step kept by the residual "
    "stream, and says which input tokens an output position is made of. Flow instead asks how "
    "much could be carried there at most, among the nearest tokens.",
    explanation="A bar is the share of an input token in the chosen position after all layers; the lift "
    "divides it by what evenly spread attention would give, because early tokens always win "
    "otherwise. It follows attention weights only, so a token that is read but has a tiny "
    "value vector still looks important.",
    figures=(
        Figure("lift", "bars", ("token",), "Rollout against even attention", "times even attention"),
        Figure("rollout", "bars", ("token",), "Rollout of the chosen token", "share of the token"),
        Figure("flow", "bars", ("token",), f"Maximum flow, within the last {FLOW_TOKENS} tokens", "flow, at most 1",
               absent=f"This result is older than flow within a window of {FLOW_TOKENS} tokens. Press Run to compute it."),
    ),
    numbers=(Number("output", "looked from token {}"),),
    before=f"Flow is followed among the {FLOW_TOKENS} tokens up to the chosen one, as its cost grows "
    "with the square of their number; what they read from earlier tokens is left out there.",
    inputs=(OUTPUT,),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options["output"]`` chooses the position (default: the last). ``flow`` is NaN outside the ``FLOW_TOKENS`` tokens up to
    it."""
    captures = session.captures
    t = captures[0].tokens
    output = captures[0].check_row(session.options.get("output", t - 1))
    rolled = to_numpy(rollout_rows(captures, [output], part(progress, 0, 0.4))[0])
    even = to_numpy(uniform_rollout(len(captures), [output], t)[0])
    carried = np.full(t, np.nan)
    first = max(0, output + 1 - FLOW_TOKENS)
    carried[first : output + 1] = flow(captures, output, first, part(progress, 0.4, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = np.where(np.arange(t) <= output, rolled / even, np.nan)
    return {"rollout": rolled, "lift": lift, "flow": carried, "output": np.array(output)}
