"""Head importance: the gradient of the loss at each head's gate, and the loss without the head.

Michel et al., arXiv 1905.10650: I_h = E|dLoss/dgate_h| at gate 1, divided by the layer's L2 norm; and Loss(gate_h = 0)."""

from __future__ import annotations

import torch

from lab.measure.fitting.common import forward, frozen, loss, samples, sizes

GRADIENTS = True


def fit(
    technique, model, tokenizer, progress, *, sequences: int = 10, length: int = 128, ablate: bool = True
) -> dict[str, torch.Tensor]:
    """{"gradient": [L, Hq] normalised importance, "raw": the same before normalising, "ablation": [L, Hq] loss increase}."""
    ids = samples(model, tokenizer, sequences, length)
    raw = gradients(model, ids, lambda f: progress(0.2 * f, "Gradients of the heads' gates"))
    out = {"raw": raw, "gradient": raw / raw.norm(dim=1, keepdim=True).clamp_min(1e-12)}
    if ablate:
        few = ids[: max(1, sequences // 10)]
        out["ablation"] = ablation(model, few, lambda f: progress(0.2 + 0.8 * f, "Loss without each head"))
    return out


def gradients(model, ids: torch.Tensor, progress=lambda f: None) -> torch.Tensor:
    """float32 [L, Hq]: mean over sequences of |dLoss/dgate_h|."""
    layers, heads = sizes(model)[:2]
    total = torch.zeros(layers, heads)
    with frozen(model):
        for n, row in enumerate(ids):
            gates: dict[int, torch.Tensor] = {}

            def probe(ctx, out):
                gates[ctx.layer] = torch.ones(1, heads, 1, 1, device=out.device, requires_grad=True)
                return out * gates[ctx.layer]

            loss(forward(model, row, probe=probe), row).backward()
            total += torch.stack([gates[i].grad.flatten().abs().cpu() for i in range(layers)])
            progress((n + 1) / len(ids))
    return total / len(ids)


@torch.no_grad()
def ablation(model, ids: torch.Tensor, progress=lambda f: None) -> torch.Tensor:
    """float32 [L, Hq]: mean loss increase when one head's output is zero."""
    layers, heads = sizes(model)[:2]
    base = sum(float(loss(forward(model, row), row)) for row in ids) / len(ids)
    out = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            def probe(ctx, x):
                if ctx.layer != layer:
                    return x
                x = x.clone()
                x[:, head] = 0
                return x

            out[layer, head] = sum(float(loss(forward(model, row, probe=probe), row)) for row in ids) / len(ids) - base
        progress((layer + 1) / layers)
    return out
