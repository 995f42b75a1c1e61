"""How much each layer's attention output changes from token to token, and the pace that follows (PAB, text form)."""

from __future__ import annotations

import torch

from lab.measure.fitting.common import forward, samples, sizes

PACES = (1, 2, 4, 6)


@torch.no_grad()
def fit(technique, model, tokenizer, progress, *, sequences: int = 4, length: int = 256) -> dict[str, torch.Tensor]:
    """{"change": [L] mean ||o_t - o_{t-1}|| / ||o_t||, "every": int64 [L], the steadiest quarter of the layers gets 6}."""
    change = torch.zeros(sizes(model)[0])
    ids = samples(model, tokenizer, sequences, length)
    for n, row in enumerate(ids):
        def probe(ctx, out):
            flat = out.transpose(1, 2).flatten(2)[0].float()
            change[ctx.layer] += ((flat[1:] - flat[:-1]).norm(dim=-1) / flat[1:].norm(dim=-1).clamp_min(1e-9)).mean().cpu()
            return out

        forward(model, row, probe=probe)
        progress((n + 1) / len(ids), "Change of attention outputs")
    rank = change.argsort(descending=True, stable=True).argsort()
    every = torch.tensor(PACES)[(rank * len(PACES)).div(len(change), rounding_mode="floor")]
    return {"change": change / len(ids), "every": every}
