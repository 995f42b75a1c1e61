"""Gates of All-or-Here: logistic gates on the query, fitted to outputs with and without the window (output matching)."""

from __future__ import annotations

import torch

from kernels import cpu_attention as core
from lab.measure.fitting.common import forward, samples, sizes


def fit(
    technique, model, tokenizer, progress, *, sequences: int = 3, length: int = 768, steps: int = 200, weight: float = 0.1
) -> dict[str, torch.Tensor]:
    """{"weight": [L, Hq, d], "bias": [L, Hq], "open": [L, Hq] share of calibration rows whose gate is open}."""
    layers, heads, _, d = sizes(model)
    ids = samples(model, tokenizer, sequences, length)
    queries: list[list] = [[] for _ in range(layers)]
    errors: list[list] = [[] for _ in range(layers)]

    def probe(ctx, out):
        k, v = ctx.store.exact_k.decode(), ctx.store.exact_v.decode()
        near, _ = core.band(ctx.q, k, v, ctx.scale, sinks=0, window=technique.window)
        error = (out - near).float().pow(2).sum(-1) / out.float().pow(2).sum(-1).clamp_min(1e-12)
        rows = torch.arange(technique.window, ctx.q.shape[2], 4)  # rows that see beyond the window
        queries[ctx.layer].append(ctx.q[0][:, rows].float().cpu())
        errors[ctx.layer].append(error[0][:, rows].cpu())
        return out

    with torch.no_grad():
        for n, row in enumerate(ids):
            forward(model, row, probe=probe)
            progress(0.6 * (n + 1) / len(ids), "Outputs with and without the window")
    out = {"weight": torch.zeros(layers, heads, d), "bias": torch.full((layers, heads), 2.0), "open": torch.ones(layers, heads)}
    for layer in range(layers):
        q, e = torch.cat(queries[layer], 1), torch.cat(errors[layer], 1)
        if q.shape[1]:
            w, b = gate(q, e, steps, weight)
            out["weight"][layer], out["bias"][layer] = w, b
            out["open"][layer] = ((q * w[:, None]).sum(-1) + b[:, None] > 0).float().mean(-1)
        progress(0.6 + 0.4 * (layer + 1) / layers, "Fitting gates")
    return out


def gate(q: torch.Tensor, error: torch.Tensor, steps: int, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(w [H, d], b [H]) minimising mean((1-g)^2 * error + weight * g), g = sigmoid(w.q + b); q [H,n,d], error [H,n]."""
    with torch.enable_grad():
        size = q.norm(dim=-1).mean(-1, keepdim=True).clamp_min(1e-6)
        x = q / size.unsqueeze(-1)
        w = torch.zeros(q.shape[0], q.shape[2], requires_grad=True)
        b = torch.full((q.shape[0],), 2.0, requires_grad=True)
        adam = torch.optim.Adam([w, b], lr=0.1)
        for _ in range(steps):
            adam.zero_grad()
            g = torch.sigmoid((x * w[:, None]).sum(-1) + b[:, None])
            ((1 - g) ** 2 * error + weight * g).mean(-1).sum().backward()
            adam.step()
    return (w / size).detach(), b.detach()
