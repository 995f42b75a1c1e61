"""Routers of Flux: a layer is sparse for a prompt when forcing it costs less than a small KL; small networks learn to tell.

arXiv 2604.07394 trains routers end to end; here they are fitted to these labels by cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.slots import Band, Paper, Technique
from lab.engine.stack import Stack
from lab.measure.fitting.common import forward, kl, samples, sizes
from lab.measure.fitting.prompts import passkey
from lab.measure.fitting.replay import Trials
from lab.techniques.flux import ENDS

TOLERANCE = 0.003  # nats on the last rows; more than most layers cost on plain prose, less than losing a fact costs
RIDGE = 8.0  # price of a router's weights, in misses: a handful of prompts must not outvote the layer's usual answer
ROWS = 32  # last rows on which the cost is measured


def fit(
    technique, model, tokenizer, progress, *, prompts: int = 8, length: int = 384, hidden: int = 16, steps: int = 100,
    tolerance: float = TOLERANCE,
) -> dict[str, torch.Tensor]:
    """Router weights per layer, {"mean", "std": [L, d], "in_weight": [L, h, d], ...}, "cost" [L, prompts]: KL in nats when the
    layer alone is sparse, "labels" [L, prompts]: cost below tolerance, and "held_out" [2]: share of decisions that are right,
    for a prompt that was left out of fitting, by its router and by each layer's usual answer."""
    layers, _, _, d = sizes(model)
    prose = samples(model, tokenizer, prompts // 2, length)
    tasks = [row for row in prose] + [passkey(model, tokenizer, length, seed=900 + i).ids for i in range(prompts - len(prose))]
    features, cost = torch.zeros(layers, len(tasks), d), torch.zeros(layers, len(tasks))
    for n, ids in enumerate(tasks):
        def probe(ctx, out):
            ends = torch.stack([ctx.q[:, :, :ENDS].float().mean(2), ctx.q[:, :, -ENDS:].float().mean(2)], 1)
            features[ctx.layer, n] = ends.mean((0, 1, 2)).cpu()
            return out

        with torch.no_grad():
            forward(model, ids, probe=probe)
        trials = Trials(model, [ids], keep=ROWS)
        for layer in range(layers):
            forced = next(trials.under(Stack((_Only(layer, technique.sinks, technique.window),)), layer))
            cost[layer, n] = kl(trials.base[0][0], forced[0])
        progress(0.9 * (n + 1) / len(tasks), "Forcing each layer to be sparse")
    progress(0.95, "Fitting routers, each prompt left out once")
    return {**routers(features, (cost < tolerance).long(), hidden, steps), "cost": cost}


def routers(features: torch.Tensor, labels: torch.Tensor, hidden: int, steps: int) -> dict[str, torch.Tensor]:
    """What `fit` returns but "cost", from features [L, n, d] and labels [L, n] of n prompts."""
    def normal(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return of.mean(1), of.std(1).clamp_min(1e-3)

    right, usual, count = 0.0, 0.0, labels.shape[1]
    for n in range(count):
        rest = [i for i in range(count) if i != n]
        mean, std = normal(features[:, rest])
        x = (features - mean[:, None]) / std[:, None]
        said = scores(x[:, n : n + 1], train(x[:, rest], labels[:, rest], hidden, steps))[:, 0].argmax(-1)
        right += float((said == labels[:, n]).float().mean()) / count
        usual += float(((labels[:, rest].float().mean(1) > 0.5) == (labels[:, n] == 1)).float().mean()) / count
    mean, std = normal(features)
    weights = train((features - mean[:, None]) / std[:, None], labels, hidden, steps)
    return {"mean": mean, "std": std, **weights, "labels": labels, "held_out": torch.tensor([right, usual])}


def train(x: torch.Tensor, labels: torch.Tensor, hidden: int, steps: int) -> dict[str, torch.Tensor]:
    """One router per layer, by cross entropy: normalised features x [L, n, d], labels [L, n] of 0 (full) and 1 (sparse).

    It starts from the layer's usual answer and pays for leaving it (a ridge on its weights): prompts are few.
    """
    layers, n, d = x.shape
    usual = (labels.float().sum(1) + 0.5) / (n + 1)
    generator = torch.Generator().manual_seed(0)
    w = {
        "in_weight": torch.randn(layers, hidden, d, generator=generator) * d**-0.5, "in_bias": torch.zeros(layers, hidden),
        "out_weight": torch.zeros(layers, 2, hidden),
        "out_bias": torch.stack([torch.zeros(layers), torch.logit(usual)], 1),
    }
    with torch.enable_grad():
        for t in w.values():
            t.requires_grad_()
        adam = torch.optim.Adam(list(w.values()), lr=0.01)
        for _ in range(steps):
            adam.zero_grad()
            misses = torch.nn.functional.cross_entropy(scores(x, w).flatten(0, 1), labels.flatten(), reduction="sum")
            (misses + RIDGE * (w["out_weight"].pow(2).sum() + 0.1 * w["in_weight"].pow(2).sum())).backward()
            adam.step()
    return {n: t.detach() for n, t in w.items()}


def scores(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """All layers' routers at once: x [L, n, d], already normalised -> [L, n, 2]."""
    inner = torch.nn.functional.silu(x @ w["in_weight"].mT + w["in_bias"].unsqueeze(1))
    return inner @ w["out_weight"].mT + w["out_bias"].unsqueeze(1)


@dataclass(frozen=True)
class _Only(Technique):
    """Sinks and window in one layer alone."""

    name: ClassVar[str] = "flux_probe"
    title: ClassVar[str] = "One sparse layer"
    paper: ClassVar[Paper] = Paper("probe", "probe", 2026)
    slots: ClassVar[tuple[str, ...]] = ("select",)
    help: ClassVar[str] = ""

    layer: int
    sinks: int
    window: int

    def select(self, ctx) -> Band | None:
        return Band(self.sinks, self.window) if ctx.layer == self.layer else None
