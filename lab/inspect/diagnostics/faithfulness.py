"""Does attention say what mattered? Twelve importance measures of one predicted token, compared with leaving
tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect.diagnostics.base import MARKED, OUTPUT, Arrays, Figure, Number, Paper, Session, diagnostic, part, to_numpy
from lab.inspect.diagnostics.measures import kendall, overlap, spearman
from lab.inspect.scores import Progress, weights

TOKENS = 128
PERMUTATIONS = 64
WORK = 60_000
"""Tokens run through the model for Shapley values at most; longer contexts get fewer permutations."""
METHODS = tuple(
    f"{name}, {part}"
    for name in ("first layer", "last layer", "mean layer", "saliency", "input x gradient")
    for part in ("prompt", "whole")
) + ("mask one", "Shapley")


def target_logprob(probe, embeddings: torch.Tensor, target: int) -> torch.Tensor:
    """[B] log-probability of ``target`` as the next token after embeddings [B, T, D]."""
    return torch.log_softmax(probe.logits(embeddings, last=True)[:, -1].float(), -1)[:, target]


def gradients(probe, ids: torch.Tensor, target: int) -> tuple[np.ndarray, np.ndarray]:
    """(saliency, input x gradient) [T] of the target's log-probability: l1 of the gradient, and |sum of x *
    gradient|."""
    x = probe.embed(ids[None]).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(target_logprob(probe, x, target).sum(), x)
    return to_numpy(g[0].abs().sum(-1)), to_numpy((x * g)[0].sum(-1).abs())


@torch.no_grad()
def replaced(
    probe, ids: torch.Tensor, target: int, kept: torch.Tensor, batch: int = 16, progress: Progress | None = None
) -> np.ndarray:
    """float64 [n] log-probability of the target with tokens replaced by the neutral one where ``kept`` [n,
    T] is False."""
    x = probe.embed(ids[None])
    blank = probe.embed(torch.full_like(ids, probe.neutral_id)[None])
    out = []
    for n, some in enumerate(kept.split(batch)):
        out.append(target_logprob(probe, torch.where(some[..., None].to(x.device), x, blank), target))
        if progress:
            progress(min(1.0, (n + 1) * batch / len(kept)))
    return torch.cat(out).double().cpu().numpy()


def leave_one_out(probe, ids: torch.Tensor, target: int, progress: Progress | None = None) -> np.ndarray:
    """float64 [T] fall of the target's log-probability when each token is replaced by the neutral one."""
    t = len(ids)
    kept = torch.cat([torch.ones(1, t, dtype=torch.bool), ~torch.eye(t, dtype=torch.bool)])
    p = replaced(probe, ids, target, kept, progress=progress)
    return p[0] - p[1:]


def shapley(
    probe,
    ids: torch.Tensor,
    target: int,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """float64 [T] mean contribution of each token over random orders in which tokens are filled in."""
    t, rng = len(ids), np.random.default_rng(seed)
    total = np.zeros(t)
    for n in range(permutations):
        order = rng.permutation(t)
        kept = torch.zeros(t + 1, t, dtype=torch.bool)
        for step, token in enumerate(order):
            kept[step + 1 :, token] = True
        told = part(progress, n / permutations, (n + 1) / permutations) if progress else None
        total[order] += np.diff(replaced(probe, ids, target, kept, progress=told))
    return total / permutations


def attention_importance(captures, row: int, first: int = 0) -> dict[str, np.ndarray]:
    """{"first layer", "last layer", "mean layer"} float32 [row + 1 - first] head-mean attention of one row to ``first`` on."""
    per_layer = []
    for c in captures:
        w = torch.stack([weights(c, h, (row, row + 1), (first, row + 1))[0] for h in range(c.heads)])
        per_layer.append(to_numpy(w.mean(0)))
    return {
        "first layer": per_layer[0],
        "last layer": per_layer[-1],
        "mean layer": np.mean(per_layer, axis=0),
    }


def agreement(scores: dict[str, np.ndarray], reference: np.ndarray, k: int = 5) -> np.ndarray:
    """float64 [methods, 3] Kendall's tau-b, Spearman and top-k overlap of each method with |reference|.

    Tokens where a method is NaN (not part of it) are left out of its comparison.
    """
    rows = []
    for s in scores.values():
        ok = np.isfinite(s)
        a, b = np.abs(s[ok]), np.abs(reference[ok])
        rows.append((kendall(a, b), spearman(a, b), overlap(a, b, k)) if ok.sum() > 1 else (np.nan,) * 3)
    return np.array(rows)


def marked_overlap(scores: dict[str, np.ndarray], marked: Sequence[int]) -> tuple[np.ndarray, float]:
    """(share of the marked tokens among each method's top |marked|, NaN where a method says nothing, the level chance would
    give)."""
    t = len(next(iter(scores.values())))
    truth = np.zeros(t)
    truth[list(marked)] = 1
    hits = []
    for s in scores.values():
        if not np.isfinite(s).any():  # a method of the prompt, none of which is in the window
            hits.append(np.nan)
            continue
        top = np.argsort(-np.nan_to_num(np.abs(s), nan=-1.0), kind="stable")[: len(set(marked))]
        hits.append(truth[top].mean())
    return np.array(hits), len(set(marked)) / t


@diagnostic(
    name="faithfulness",
    title="Is attention an explanation?",
    paper=Paper("Attention is not Explanation", "1902.10186", 2019),
    needs=("captures", "probe", "token_ids"),
    help="Twelve ways to say which words a prediction came from: attention of the first, last or "
    "all layers, gradients, and replacing words. They are compared with leaving one word out, "
    "the plainest test of what mattered.",
    explanation="Each line of the first figure is the rank agreement of one method with leaving words out; attention usually "
    "agrees less than replacing words does. Agreement is no proof of faithfulness: leaving "
    "out one word misses words that stand in for each other, and its own bar is 1 by "
    "definition.",
    figures=(
        Figure(
            "agreement",
            "matrix",
            ("method", "measure"),
            "Agreement with leaving one out",
            "1: the same order, 0: none",
        ),
        Figure("scores", "matrix", ("method", "token read"), "Importance of each token", "over the method's largest"),
        Figure("overlap", "bars", ("method",), "Your words among the most important", "share of your words",
               absent="Type words that matter above to see which methods find them."),
    ),
    numbers=(
        Number("explained", "explains why token {} was predicted"),
        Number("first", "from what stands before it, token {} onwards"),
        Number("permutations", "Shapley values are means of {} random orders"),
        Number("chance", "chance alone would find {} of your words", share=True),
    ),
    before=f"Reads the {TOKENS} tokens before the explained one, as if the text began there, and replaces them one by one: "
    "minutes on a processor.",
    inputs=(OUTPUT, MARKED),
)
def compute(session: Session, progress: Progress) -> Arrays:
    """``options``: "output" position whose token is explained (default the last), "permutations" for
    Shapley. Of a longer context only the last ``TOKENS`` tokens are read, from ``first`` on."""
    captures, probe, ids = session.captures, session.probe, list(session.token_ids)
    output = session.options.get("output", len(ids) - 1)
    if not 2 <= output < len(ids) or output > captures[0].tokens:
        raise LabError(f"Position {output} cannot be explained", f"Choose a token from 2 to {len(ids) - 1}")
    first = max(0, output - TOKENS)
    tokens = torch.as_tensor(ids[first:output], device=probe.device)
    target, length = ids[output], output - first
    prompt = max(0, min(session.prompt_tokens or output, output) - first)
    whole = attention_importance(captures, output - 1, first)
    whole["saliency"], whole["input x gradient"] = gradients(probe, tokens, target)
    progress(0.1)
    scores = {}
    for name, s in whole.items():
        scores[f"{name}, prompt"] = np.where(np.arange(length) < prompt, s, np.nan)
        scores[f"{name}, whole"] = s
    loo = leave_one_out(probe, tokens, target, part(progress, 0.1, 0.2))
    scores["mask one"] = loo
    affordable = max(2, min(PERMUTATIONS, WORK // (length * (length + 1))))
    permutations = session.options.get("permutations", affordable)
    scores["Shapley"] = shapley(
        probe, tokens, target, permutations, progress=part(progress, 0.2, 1)
    )
    stacked = np.stack([np.abs(scores[m]) for m in METHODS])
    largest = np.nan_to_num(stacked).max(axis=1, keepdims=True)  # a window without prompt tokens has nothing but NaN
    out = {
        "scores": stacked / np.maximum(largest, 1e-30),
        "methods": np.array(METHODS),
        "measures": np.array(("Kendall's tau", "Spearman", "top 5")),
        "agreement": agreement({m: scores[m] for m in METHODS}, loo),
        "leave_one_out": loo,
        "permutations": np.array(permutations),
        "token read": np.arange(first, output),
        "first": np.array(first),
        "explained": np.array(output),
    }
    marked = [m - first for m in session.marked or () if first <= m < output]
    if marked:
        out["overlap"], chance = marked_overlap({m: scores[m] for m in METHODS}, marked)
        out["chance"] = np.array(chance)
    return out
