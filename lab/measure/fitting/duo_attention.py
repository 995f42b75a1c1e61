"""Gates of DuoAttention: trained so that hidden passkeys are still answered with streaming heads, and the quick score.

arXiv 2410.10819: o = a*full + (1-a)*streaming, minimising the change of the last hidden state at the answer + L1 of a."""

from __future__ import annotations

import torch

from kernels import cpu_attention as core
from lab.engine.cache import LabCache
from lab.engine.rope import rope_of
from lab.measure.fitting.common import forward, frozen, samples, sizes
from lab.measure.fitting.prompts import passkey

GRADIENTS = True
SINKS, WINDOW = 8, 48  # shorter than at use, so that short passkey prompts already need their retrieval heads


def fit(
    technique, model, tokenizer, progress, *, steps: int = 40, length: int = 320, rate: float = 0.05, weight: float = 0.05
) -> dict[str, torch.Tensor]:
    """{"trained", "quick": [L, Hk]}; larger means retrieval."""
    layers, heads, kv_heads, _ = sizes(model)
    gates = torch.ones(layers, kv_heads, requires_grad=True)
    adam = torch.optim.Adam([gates], lr=rate)
    with frozen(model):
        for step in range(steps):
            task = passkey(model, tokenizer, length, seed=step)
            with torch.no_grad():
                full = _answer(model, task)
            adam.zero_grad()
            mixed = _answer(model, task, gates)
            distance = (mixed - full).pow(2).sum(-1).mean() / full.pow(2).sum(-1).mean()
            (distance + weight * gates.abs().mean()).backward()
            adam.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            progress(0.9 * (step + 1) / steps, "Training gates on passkeys")
    return {"trained": gates.detach().clone(), "quick": quick(model, samples(model, tokenizer, 2, 256))}


def _answer(model, task, gates: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states float32 at the answer tokens, heads mixed by gates [L, Hk]."""
    cache = LabCache(model)

    def probe(ctx, out):
        k, v = ctx.store.exact_k.decode(), ctx.store.exact_v.decode()
        near, _ = core.band(ctx.q, k, v, ctx.scale, sinks=SINKS, window=WINDOW)
        a = gates[ctx.layer].repeat_interleave(ctx.groups).view(1, -1, 1, 1).to(out)
        return a * out + (1 - a) * near

    cache.policy.probe = probe if gates is not None else None
    out = model.base_model(input_ids=task.ids.view(1, -1), past_key_values=cache, use_cache=True)
    return out.last_hidden_state[0, task.answer - 1 : -1].float()


@torch.no_grad()
def quick(model, ids: torch.Tensor, span: int = 500) -> torch.Tensor:
    """float32 [L, Hk]: where the mean query would look on `span` copies of the mean key; higher is farther away."""
    layers, heads, kv_heads, d = sizes(model)
    q_sum, k_sum = torch.zeros(layers, heads, d), torch.zeros(layers, kv_heads, d)
    scale = {}

    def probe(ctx, out):
        rope = rope_of(model, ctx.layer)
        back = -torch.arange(ctx.q.shape[2], device=ctx.q.device)
        q_sum[ctx.layer] += rope.rotate(ctx.q, back).float().mean((0, 2)).cpu()
        k_sum[ctx.layer] += rope.rotate(ctx.store.exact_k.decode(), back).float().mean((0, 2)).cpu()
        scale[ctx.layer] = ctx.scale
        return out

    for row in ids:
        forward(model, row, probe=probe)
    scores = torch.zeros(layers, kv_heads)
    for layer in range(layers):
        rope = rope_of(model, layer)
        place = torch.arange(span)
        keys = rope.rotate((k_sum[layer] / len(ids))[:, None].expand(-1, span, -1), place)
        query = rope.rotate((q_sum[layer] / len(ids))[:, None], torch.tensor([span - 1]))
        s = (query.view(kv_heads, -1, d) @ keys.mT * scale[layer]).softmax(-1)
        scores[layer] = s.cumsum(-1).mean((-1, -2))
    return scores
