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
from lab.techniques.flux import ENDS, router

TOLERANCE = 0.01  # nats


def fit(
    technique, model, tokenizer, progress, *, prompts: int = 6, length: int = 208, hidden: int = 16, steps: int = 200
) -> dict[str, torch.Tensor]:
    """Router weights per layer, {"mean", "std": [L, d], "in_weight": [L, h, d], ...}, and "labels" [L, prompts]: sparse."""
    layers, _, _, d = sizes(model)
    prose = samples(model, tokenizer, prompts // 2, length)
    tasks = [row for row in prose] + [passkey(model, tokenizer, length, seed=900 + i).ids for i in range(prompts - len(prose))]
    features, labels = torch.zeros(layers, len(tasks), d), torch.zeros(layers, len(tasks), dtype=torch.long)
    with torch.no_grad():
        for n, ids in enumerate(tasks):
            def probe(ctx, out):
                ends = torch.stack([ctx.q[:, :, :ENDS].float().mean(2), ctx.q[:, :, -ENDS:].float().mean(2)], 1)
                features[ctx.layer, n] = ends.mean((0, 1, 2)).cpu()
                return out

            full = forward(model, ids, probe=probe)[0, -32:]
            for layer in range(layers):
                forced = forward(model, ids, Stack((_Only(layer, technique.sinks, technique.window),)))[0, -32:]
                labels[layer, n] = int(kl(full, forced) < TOLERANCE)
            progress(0.9 * (n + 1) / len(tasks), "Forcing each layer to be sparse")
    out = {"mean": features.mean(1), "std": features.std(1).clamp_min(1e-3), "labels": labels}
    generator = torch.Generator().manual_seed(0)
    w = {
        "in_weight": torch.randn(layers, hidden, d, generator=generator) * d**-0.5, "in_bias": torch.zeros(layers, hidden),
        "out_weight": torch.zeros(layers, 2, hidden), "out_bias": torch.zeros(layers, 2),
    }
    with torch.enable_grad():
        for t in w.values():
            t.requires_grad_()
        adam = torch.optim.AdamW(list(w.values()), lr=0.01, weight_decay=0.05)
        for _ in range(steps):
            adam.zero_grad()
            scores = torch.stack([
                router(features[i], {"mean": out["mean"][i], "std": out["std"][i], **{n: t[i] for n, t in w.items()}})
                for i in range(layers)
            ])
            torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()).backward()
            adam.step()
    return {**out, **{n: t.detach() for n, t in w.items()}}


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
