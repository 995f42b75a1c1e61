"""Any per-token measure of generated text: what a run recorded, and what its captures say about each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lab.inspect.capture import Capture
from lab.inspect.diagnostics.hallucination import row_features
from lab.inspect.scores import Cancel, Cancelled, Progress


@dataclass(frozen=True)
class Measure:
    """How a per-token number is named and scaled: ``low`` is shown without colour, ``high`` with all of it."""

    name: str
    title: str
    help: str
    low: float
    high: float | None


MEASURES = (
    Measure("kl", "KL", "KL(reference ‖ variant) in nats, the reference's text before it", 0.0, 1.0),
    Measure("agree", "disagreement", "marked where the variant's first choice is not the reference's token", 0.0, 1.0),
    Measure("surprisal", "surprisal", "−ln of the probability that the chosen token had, in nats", 0.0, 5.0),
    Measure("entropy", "entropy", "spread of the next-token distribution, in nats", 0.0, 5.0),
    Measure("prompt_mass", "attention to the prompt", "weight on prompt tokens, mean over heads of the captured layers", 0.0,
            1.0),
    Measure("lookback", "lookback ratio", "mean weight on a prompt token over that plus the mean weight on a generated one", 0.0,
            1.0),
    Measure("kept", "cache kept", "share of its entries that the cache still held at this step", 0.0, 1.0),
)


def recorded(tokens: Sequence[Mapping], fidelity: Sequence[Mapping], written: int) -> dict[str, list[float | None]]:
    """Measures of a variant's own tokens. KL and agreement stop after the first divergence, where contexts part.

    ``written`` is how many tokens share the reference's context: the first divergence itself included.
    """
    def of(name: str) -> list[float | None]:
        return [None if t.get(name) is None else float(t[name]) for t in tokens]
    kept = [k if k is not None and k <= 1 else None for k in of("kept")]
    told = [fidelity[i] if i < min(written, len(fidelity)) else {} for i in range(len(tokens))]
    found = {"surprisal": [None if p is None else max(0.0, -p) for p in of("logprob")], "entropy": of("entropy"), "kept": kept,
             "kl": [f.get("kl") for f in told],
             "agree": [None if f.get("agree") is None else float(not f["agree"]) for f in told]}
    return {name: values for name, values in found.items() if any(v is not None for v in values)}


def attended(captures: Sequence[Capture], prompt: int, tokens: int, progress: Progress | None = None,
             cancel: Cancel | None = None) -> dict[str, list[float | None]]:
    """"prompt_mass" and "lookback" of each generated token as the row that predicted the next one; the mean of all heads.

    Token k of the text is row ``prompt + k``; the last one was never fed, so it has None.
    """
    if not captures or not 1 <= prompt < captures[0].tokens:
        return {}
    sums: dict[str, np.ndarray] = {}
    for n, capture in enumerate(captures):
        if cancel and cancel():
            raise Cancelled()
        for name, values in row_features(capture, prompt).items():
            if name in ("prompt_mass", "lookback"):
                sums[name] = sums.get(name, 0) + values.mean(axis=0)
        if progress:
            progress((n + 1) / len(captures))
    return {name: [float(x) for x in (total / len(captures))[:tokens]] + [None] * max(0, tokens - total.shape[0])
            for name, total in sums.items()}
