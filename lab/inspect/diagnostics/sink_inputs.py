"""Does the sink need meaning? Sink rates of the run's own text beside random tokens, one token repeated, and a cut start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic, part
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.diagnostics.sinks import THRESHOLDS
from lab.inspect.scores import Progress

TOKENS, TEXTS = 64, 8
KINDS = ("the run's text", "without its first token", "random tokens", "one token repeated")


def received(a: torch.Tensor) -> torch.Tensor:
    """float32 [..., T] mean weight each token gets from the rows at or after it; a [..., T, T] causal weights."""
    t = a.shape[-1]
    return a.sum(-2) / torch.arange(t, 0, -1, device=a.device)


def texts(ids: Sequence[int], vocabulary: int, kind: str, count: int = TEXTS, seed: int = 0) -> torch.Tensor:
    """int64 [n, T] inputs of one kind: stretches of the run, the same begun one token later, or made-up tokens."""
    g, t = torch.Generator().manual_seed(seed), min(TOKENS, len(ids) - 1)
    if kind == KINDS[2]:
        return torch.randint(vocabulary, (count, t), generator=g)
    if kind == KINDS[3]:
        return torch.randint(vocabulary, (count, 1), generator=g).expand(count, t)
    shift = 1 if kind == KINDS[1] else 0
    starts = np.unique(np.linspace(0, len(ids) - t - 1, count).astype(int))
    return torch.tensor([list(ids[a + shift : a + shift + t]) for a in starts])


def rates(
    probe: ModelProbe, inputs: torch.Tensor, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(share of heads whose token 0 receives more than each threshold, mean received weight of the first 16 tokens)."""
    share, curve = [], []
    for n, one in enumerate(inputs):
        alpha = received(probe.attention(one.to(probe.device)))
        share.append([float((alpha[..., 0] > e).float().mean()) for e in THRESHOLDS])
        curve.append(alpha.mean((0, 1))[:16].cpu().numpy())
        if progress:
            progress((n + 1) / len(inputs))
    return np.mean(share, axis=0), np.mean(curve, axis=0)


@diagnostic(
    name="sink_inputs",
    title="Sinks without meaning",
    paper=Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781", 2024),
    needs=("probe", "token_ids"),
    help="Is it the first word or the first place that attracts attention? The model reads stretches of this run, the same "
    "stretches begun one token later, random tokens, and one token over and over, and the share of heads with a sink on the "
    "first token is counted for each.",
    explanation="If random tokens have as many sinks as text, the place makes the sink and not the word. With one token "
    "repeated all keys carry the same content, and a model whose sink comes from content spreads its attention there.",
    figures=(
        Figure("rates", "lines", ("input", "threshold"), "Heads with a sink on the first token", "share of heads"),
        Figure("received", "lines", ("input", "token"), "Weight that each of the first tokens receives",
               "mean share of attention"),
    ),
    before=f"Feeds {len(KINDS)} kinds of {TEXTS} texts of {TOKENS} tokens.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``TEXTS`` inputs of ``TOKENS`` tokens of each kind, fewer where the run is short."""
    ids, probe = list(session.token_ids), session.probe
    if len(ids) < 4:
        raise LabError(f"The run has only {len(ids)} tokens", "Sinks show from a handful on", "Make a longer run")
    found = []
    vocabulary = probe.model.get_input_embeddings().weight.shape[0]
    for n, kind in enumerate(KINDS):
        found.append(rates(probe, texts(ids, vocabulary, kind), part(progress, n / len(KINDS), (n + 1) / len(KINDS))))
    return {
        "rates": np.stack([share for share, _ in found]),
        "received": np.stack([curve for _, curve in found]),
        "inputs": np.array(KINDS),
        "thresholds": np.array(THRESHOLDS),
    }
