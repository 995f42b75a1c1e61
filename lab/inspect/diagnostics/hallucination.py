"""Features of attention that go with making things up: lookback to the prompt and attention-weighted
uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics.base import Arrays, Figure, Paper, Session, diagnostic
from lab.inspect.scores import Progress, row_blocks, weights

ALPHA = 0.2
AGGREGATIONS = ("previous", "prompt_mean", "prompt_max", "past_mean", "no_sink")


def row_features(capture: Capture, prompt: int) -> dict[str, np.ndarray]:
    """{name: float32 [Hq, T - prompt]} of the rows after the prompt.

    ``lookback``: mean weight on the prompt over mean weight on prompt and generated tokens, 0..1 (the row's
    own token
    counts as generated).  ``prompt_mass``: sum on the prompt.  ``previous``: weight on the token before.
    ``prompt_mean``, ``prompt_max``, ``past_mean``: mean or largest weight on prompt tokens or on all earlier
    tokens.
    ``no_sink``: 1 - weight on token 0.
    """
    t = capture.tokens
    names = ("lookback", "prompt_mass", *AGGREGATIONS)
    out = {name: np.zeros((capture.heads, t - prompt), dtype=np.float32) for name in names}
    for head in range(capture.heads):
        for rows in row_blocks(capture, (prompt, t)):
            w = weights(capture, head, rows, (0, rows[1]))
            i = torch.arange(*rows, device=w.device)
            near = w[:, prompt:].sum(1) / (i - prompt + 1)
            far = w[:, :prompt].mean(1)
            own = w.gather(1, i[:, None])[:, 0]
            found = {
                "lookback": far / (far + near).clamp(min=1e-30),
                "prompt_mass": w[:, :prompt].sum(1),
                "previous": w.gather(1, (i - 1)[:, None])[:, 0],
                "prompt_mean": far,
                "prompt_max": w[:, :prompt].amax(1),
                "past_mean": (w.sum(1) - own) / i,
                "no_sink": 1 - w[:, 0],
            }
            for name in names:
                out[name][head, rows[0] - prompt : rows[1] - prompt] = found[name].cpu().numpy()
    return out


def choose_head(previous: np.ndarray) -> int:
    """The head ([Hq, n]) that gives the token before the most weight on average."""
    return int(previous.mean(axis=1).argmax())


def confidence(probability: Sequence[float], attention: Sequence[float], alpha: float = ALPHA) -> np.ndarray:
    """float64 [n] c_1 = p_1, then c_i = alpha p_i + (1 - alpha) a_i c_{i-1}: confidence handed on along
    attention."""
    c = np.empty(len(probability))
    for i, (p, a) in enumerate(zip(probability, attention)):
        c[i] = p if i == 0 else alpha * p + (1 - alpha) * a * c[i - 1]
    return c


def uncertainty(confidences: np.ndarray) -> float:
    """-mean ln c: 0 when everything was certain."""
    return float(-np.log(np.clip(confidences, 1e-30, None)).mean()) if len(confidences) else float("nan")


@diagnostic(
    name="hallucination",
    title="Signs of making it up",
    paper=Paper(
        "The Map of Misbelief: Tracing Intrinsic and Extrinsic Hallucinations Through Attention Patterns",
        "2511.10837",
        2025,
    ),
    needs=("captures", "prompt_tokens", "logprobs"),
    help="When a model contradicts its prompt, its heads often look at the prompt less. The "
    "lookback ratio of each head and an uncertainty that is handed from token to token along "
    "attention are two cheap signals computed from one answer.",
    explanation="The line is the mean lookback of each generated token, where a drop says that the model "
    "reads itself rather than the prompt; the scores sum up the whole answer for each way to "
    "aggregate attention, higher is less sure. No score is a verdict: compare answers to the "
    "same prompt, and expect it to see contradictions better than wrong facts.",
    figures=(
        Figure("lookback", "lines", ("generated token",), "Mean lookback to the prompt",
               "0: reads itself, 1: reads the prompt"),
        Figure("lookback_heads", "matrix", ("layer", "head"), "Lookback of each head", "0: itself, 1: the prompt"),
        Figure("scores", "bars", ("handed on",), "Uncertainty of the answer, by what is handed on", "nats",
               {"handed on": ("attention to the token before", "mean attention to the prompt",
                                "largest attention to the prompt", "mean attention to all before", "attention off token 0")}),
        Figure("confidence", "lines", ("generated token",), "Confidence handed on from the token before",
               "0: none, 1: certain"),
    ),
    before="Needs generated tokens; the scores are of the middle third of the captured layers.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Per-token lookback and prompt mass (means over heads and layers), per-head lookback, and u = max over
    the middle
    third of layers for every aggregation."""
    captures, prompt = session.captures, session.prompt_tokens
    t = captures[0].tokens
    if not 1 <= prompt < t:
        raise LabError(
            "There are no generated tokens to judge",
            f"The run has {t} tokens, {prompt} of them prompt",
            "Generate an answer first",
        )
    if len(session.logprobs) < t:
        raise LabError(
            f"There are probabilities for {len(session.logprobs)} tokens of {t}", None, "Replay the run"
        )
    p = np.exp(np.nan_to_num(np.asarray(session.logprobs[prompt:t], dtype=np.float64), nan=0.0))
    features = []
    for n, capture in enumerate(captures):
        features.append(row_features(capture, prompt))
        progress((n + 1) / len(captures))
    third = len(captures) // 3
    middle = range(third, max(third + 1, len(captures) - third))
    heads = [choose_head(f["previous"]) for f in features]
    handed = {name: {n: confidence(p, features[n][name][heads[n]]) for n in middle} for name in AGGREGATIONS}
    scores = {name: {n: uncertainty(c) for n, c in layers.items()} for name, layers in handed.items()}
    worst = max(scores["previous"], key=scores["previous"].get)
    look = np.stack([f["lookback"] for f in features])
    return {
        "lookback": look.mean((0, 1)),
        "lookback_heads": look.mean(2),
        "prompt_mass": np.stack([f["prompt_mass"] for f in features]).mean((0, 1)),
        "scores": np.array([max(scores[name].values()) for name in AGGREGATIONS]),
        "aggregations": np.array(AGGREGATIONS),
        "confidence": handed["previous"][worst],
        "heads": np.array(heads),
    }
