"""Massive activations: a few channels of a few tokens thousands of times larger than the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part, to_numpy
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.scores import Progress

ABSOLUTE, RATIO = 100.0, 1000.0
TOKENS, PIECE, PIECES = 256, 48, 8


def find(hidden: Sequence[torch.Tensor], absolute: float = ABSOLUTE, ratio: float = RATIO) -> np.ndarray:
    """float64 [n, 5] (state, token, channel, value, value / median) above both thresholds, strongest first."""
    found = []
    for layer, h in enumerate(hidden):
        h = h.detach().float()
        median = float(h.abs().median())
        for token, channel in torch.nonzero((h.abs() > absolute) & (h.abs() > ratio * median)).tolist():
            value = float(h[token, channel])
            found.append((layer, token, channel, value, abs(value) / max(median, 1e-30)))
    found.sort(key=lambda row: -row[4])
    return np.array(found, dtype=np.float64).reshape(-1, 5)


def replace(
    h: torch.Tensor, spots: Sequence[tuple[int, int]], values: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """A copy of a hidden state [T, D] with (token, channel) spots set to ``values`` (one, or one each).

    For the intervention of the paper: 0, or the spot's mean over other texts.
    """
    out = h.clone()
    rows, columns = torch.tensor(list(spots), dtype=torch.long).reshape(-1, 2).T
    out[rows, columns] = torch.as_tensor(values, dtype=h.dtype, device=h.device)
    return out


@torch.no_grad()
def interventions(
    probe: ModelProbe,
    ids: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    flags: np.ndarray,
    progress: Progress | None = None,
) -> np.ndarray:
    """float64 [3] perplexity of ``ids`` [T]: as it is, with the first massive activations set to 0, and to their mean.

    The state where they first appear is changed, at the flagged (token, channel) spots. The mean is that of the same
    channel at the first token of other stretches of the text, each read on its own.
    """
    state = int(flags[:, 0].min())
    spots = [(int(f[1]), int(f[2])) for f in flags if int(f[0]) == state and f[1] < len(ids)]
    channels = torch.tensor([c for _, c in spots], device=ids.device)
    starts = range(0, max(1, len(ids) - PIECE), max(1, (len(ids) - PIECE) // PIECES))
    tell, pieces = progress or (lambda fraction: None), []
    for n, a in enumerate(list(starts)[:PIECES]):
        pieces.append(probe.states(probe.embed(ids[None, a : a + PIECE]))[state][0, 0, channels].float())
        tell(0.5 * (n + 1) / PIECES)
    mean = torch.stack(pieces).mean(0)

    def perplexity(values: torch.Tensor | float | None) -> float:
        edit = None
        if values is not None:
            edit = (state - 1, lambda h: torch.stack([replace(one, spots, values) for one in h]))
        logits = probe.logits(probe.embed(ids[None]), edit=edit)[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[1:]).exp())

    found = []
    for n, values in enumerate((None, 0.0, mean)):
        found.append(perplexity(values))
        tell(0.5 + (n + 1) / 6)
    return np.array(found)


@diagnostic(
    name="massive",
    title="Massive activations",
    paper=Paper("A Refined Analysis of Massive Activations in LLMs", "2503.22329", 2025),
    needs=("hidden",),
    help="From some layer on, one or two channels of the first token become thousands of times "
    "larger than everything else. They act as a constant the later layers rely on, and they "
    "are why the first token attracts attention.",
    explanation="The lines are the largest and the median magnitude of each hidden state; a jump of several orders marks the "
    "layer where a massive activation is written, flagged above 100 and above 1,000 times the median. The last figure sets "
    "the flagged values to zero and to their mean over other stretches of the text: harm by zero and none by the mean says "
    "that the model needs a constant there, not a message.",
    figures=(
        Figure("top", "lines", ("rank", "state"), "Three largest magnitudes and the median of each hidden state", "magnitude"),
        Figure("token", "matrix", ("state", "token"), "Largest magnitude of each token", "times the state's median"),
        Figure("perplexity", "bars", ("intervention",), "Perplexity when the flagged values are replaced", "perplexity",
               absent="No value between the first and the last layer was above both thresholds among the first "
               f"{TOKENS} tokens, so none was replaced."),
    ),
    before=f"One forward pass over the run; the replaced values are tried on its first {TOKENS} tokens.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Flags, the three largest magnitudes and the median per state, each token's largest ratio, and the interventions.

    ``perplexity`` is NaN where nothing is flagged below the last state or no probe is there.
    """
    top, token = [], []
    for n, h in enumerate(session.hidden):
        size = h.detach().float().abs()
        largest = size.flatten().topk(min(3, size.numel())).values
        median = size.median()
        top.append(to_numpy(torch.cat([largest, median[None]])))
        token.append(to_numpy(size.amax(1) / median.clamp(min=1e-30)))
        progress(0.6 * (n + 1) / len(session.hidden))
    flags, perplexity = find(session.hidden), np.full(3, np.nan)
    inside = flags[(flags[:, 0] >= 1) & (flags[:, 0] < len(session.hidden) - 1) & (flags[:, 1] < TOKENS)]
    if session.probe is not None and session.token_ids is not None and len(inside):
        ids = torch.as_tensor(list(session.token_ids)[:TOKENS], device=session.probe.device)
        if len(ids) > 2:
            perplexity = interventions(session.probe, ids, session.hidden, inside, part(progress, 0.6, 1))
    progress(1.0)
    return {
        "flags": flags,
        "top": np.stack(top, axis=1),
        "token": np.stack(token),
        "ranks": np.array(("largest", "second", "third")[: top[0].size - 1] + ("median",)),
        "perplexity": perplexity,
        "interventions": np.array(("as it is", "set to 0", "set to the mean")),
    }
