"""Profile of AttnRank: attention from the end of the prompt to each of K exchangeable documents, by place (2508.05128)."""

from __future__ import annotations

import random

import torch

from lab.measure.fitting.common import forward, samples
from lab.techniques.vertical_slash import tail_weights


@torch.no_grad()
def fit(
    technique, model, tokenizer, progress, *, prompts: int = 6,
    counts: tuple[int, ...] = (3, 5, 8), length: int = 48, question: int = 16
) -> dict[str, torch.Tensor]:
    """{"profile_K": [K] attention per token by place, which sums to the attention on documents / length}.

    Documents are pieces of sample text, shuffled from prompt to prompt so that what they say averages out.
    """
    out = {}
    for at, count in enumerate(counts):
        pieces = samples(model, tokenizer, count + 1, length)
        total = torch.zeros(count)
        for n in range(prompts):
            order = random.Random(n).sample(range(count), count)
            ids = torch.cat([pieces[i] for i in order] + [pieces[count % len(pieces), :question]])
            seen: list[torch.Tensor] = []

            def probe(ctx, x):
                p, _ = tail_weights(ctx, question)
                seen.append(p[0, :, :, : count * length].unflatten(-1, (count, length)).sum(-1).mean((0, 1)).cpu() / length)
                return x

            forward(model, ids, probe=probe)
            total += torch.stack(seen).mean(0)
            progress((at + (n + 1) / prompts) / len(counts), f"Attention by place, {count} documents")
        out[f"profile_{count}"] = total / prompts
    return out
