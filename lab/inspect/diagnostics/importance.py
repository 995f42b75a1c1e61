"""Which heads matter: gradient of the loss with respect to head gates, checked by leaving heads out."""

from __future__ import annotations

import numpy as np
import torch

from lab.inspect.diagnostics.base import Arrays, Figure, Number, Paper, Session, diagnostic, part, to_numpy
from lab.inspect.diagnostics.measures import spearman
from lab.inspect.diagnostics.probe import ModelProbe
from lab.inspect.scores import Progress

TOKENS, STEPS = 128, 10


def loss(probe: ModelProbe, ids: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, nats; differentiable in ``gates`` [L, Hq]."""
    logits = probe.logits(probe.embed(ids[None]), gates)[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:])


def gate_gradients(
    probe: ModelProbe, ids: torch.Tensor, piece: int = 64, progress: Progress | None = None
) -> torch.Tensor:
    """float32 [L, Hq] mean over pieces of the text of |dL / d gate| at gate 1."""
    total, count = torch.zeros(probe.layers, probe.heads), 0
    for a in range(0, max(1, len(ids) - 1), piece):
        part = ids[a : a + piece + 1]
        if len(part) < 2:
            continue
        gates = torch.ones(probe.layers, probe.heads, device=ids.device, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(probe, part, gates), gates)
        total += grad.abs().float().cpu()
        count += 1
        if progress:
            progress(min(1.0, (a + piece) / len(ids)))
    return total / max(1, count)


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Each layer's scores divided by their l2 norm, so that layers can be compared."""
    return scores / scores.norm(dim=1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def leave_one_out(probe: ModelProbe, ids: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
    """float32 [L, Hq] rise of the loss when one head's output is set to zero."""
    base = float(loss(probe, ids))
    out = torch.zeros(probe.layers, probe.heads)
    for layer in range(probe.layers):
        for head in range(probe.heads):
            gates = torch.ones(probe.layers, probe.heads, device=ids.device)
            gates[layer, head] = 0
            out[layer, head] = float(loss(probe, ids, gates)) - base
            if progress:
                progress((layer * probe.heads + head + 1) / out.numel())
    return out


@torch.no_grad()
def pruning_curve(
    probe: ModelProbe, ids: torch.Tensor, order: np.ndarray, steps: int = STEPS, progress: Progress | None = None
) -> np.ndarray:
    """float32 [steps + 1] loss after removing 0, 1/steps, ... of all heads, ``order`` giving flat indices,
    first out first."""
    out = []
    for n in range(steps + 1):
        gates = torch.ones(probe.layers * probe.heads, device=ids.device)
        gates[torch.as_tensor(order[: round(n * len(order) / steps)].copy())] = 0
        out.append(float(loss(probe, ids, gates.view(probe.layers, probe.heads))))
        if progress:
            progress((n + 1) / (steps + 1))
    return np.array(out, dtype=np.float32)


@diagnostic(
    name="head_importance",
    title="Head importance",
    paper=Paper("Are Sixteen Heads Really Better than One?", "1905.10650", 2019),
    needs=("probe", "token_ids"),
    help="Many heads can be removed with little harm. The gradient with respect to a gate on each "
    "head predicts, in one backward pass, how much the loss would rise without it; leaving "
    "heads out one by one checks the prediction.",
    explanation="Bright heads matter for this text, and the curve shows the loss when the least important "
    "are removed first, against a random order. Importance holds for one text and one head "
    "at a time: two heads that do the same job both look unimportant until both are gone.",
    figures=(
        Figure("importance", "matrix", ("layer", "head"), "Gradient importance, each layer normalised",
               "|gradient|, each layer's l2 norm is 1"),
        Figure("leave_one_out", "matrix", ("layer", "head"), "Loss increase without the head", "nats per token",
               absent="Leaving heads out one by one was skipped."),
        Figure(
            "curve",
            "lines",
            ("order", "share removed"),
            "Loss as heads are removed",
            "loss, nats per token",
            {"order": ("least important first", "in random order"), "share removed": [n / STEPS for n in range(STEPS + 1)]},
        ),
    ),
    numbers=(Number("agreement", "gradient and leaving out agree with a rank correlation of {} (1: the same order)"),),
    before=f"Reads the last {TOKENS} tokens, once for every head of the model: minutes on a processor.",
)
def compute(session: Session, progress: Progress) -> Arrays:
    """Uses the last ``TOKENS`` tokens; ``options["leave_one_out"]`` False skips the slow check (then NaN)."""
    probe = session.probe
    ids = torch.as_tensor(list(session.token_ids)[-TOKENS:], device=probe.device)
    raw = gate_gradients(probe, ids, progress=part(progress, 0, 0.2))
    importance = normalised(raw)
    progress(0.2)
    left = torch.full_like(raw, torch.nan)
    if session.options.get("leave_one_out", True):
        left = leave_one_out(probe, ids, part(progress, 0.2, 0.8))
    order = importance.flatten().argsort().numpy()
    random = np.random.default_rng(0).permutation(order)
    orders = (order, random)
    curve = np.stack([pruning_curve(probe, ids, o, progress=part(progress, 0.8 + 0.1 * n, 0.9 + 0.1 * n))
                      for n, o in enumerate(orders)])
    progress(1.0)
    agreement = (
        spearman(raw.flatten().numpy(), left.flatten().numpy()) if torch.isfinite(left).all() else np.nan
    )
    return {
        "importance": to_numpy(importance),
        "raw": to_numpy(raw),
        "leave_one_out": to_numpy(left),
        "curve": curve,
        "agreement": np.array(agreement),
    }
