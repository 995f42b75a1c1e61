"""Focus directions: contextual heads found on passkey prompts, and the shifts that raise their attention on the passkey.

arXiv 2503.23306. Activations are those of the unshifted model, so every head is learnt by itself."""

from __future__ import annotations

import torch

from lab.engine.rope import rope_of
from lab.measure.fitting.common import forward, sizes
from lab.measure.fitting.prompts import passkey

HEADS = 20


def fit(
    technique, model, tokenizer, progress, *, prompts: int = 8, length: int = 256, steps: int = 200, rate: float = 1e-2
) -> dict[str, torch.Tensor]:
    """{"query": [L, Hq, d], "key": [L, Hk, d] directions before rotation, "score": [L, Hq] contextual score, "gain": [L, Hq]
    change of ln(mass on the relevant span) at alpha 1}. Directions of other heads are 0."""
    layers, heads, kv_heads, d = sizes(model)
    tasks = [passkey(model, tokenizer, length, seed=500 + i) for i in range(prompts)]
    taken: list[list] = [[] for _ in range(layers)]
    score = torch.zeros(layers, heads)
    with torch.no_grad():
        for n, task in enumerate(tasks):
            rows = slice(task.answer - 1, task.ids.numel() - 1)

            def probe(ctx, out):
                q, k = ctx.q[0, :, rows].float().cpu(), ctx.store.exact_k.decode()[0].float().cpu()
                taken[ctx.layer].append((q, k, task, ctx.scale))
                score[ctx.layer] += mass(q, k.repeat_interleave(ctx.groups, 0), task, ctx.scale).exp().mean(-1) / prompts
                return out

            forward(model, task.ids, probe=probe)
            progress(0.3 * (n + 1) / prompts, "Looking for contextual heads")
    out = {"query": torch.zeros(layers, heads, d), "key": torch.zeros(layers, kv_heads, d), "score": score,
           "gain": torch.zeros(layers, heads)}
    chosen = score.flatten().argsort(descending=True, stable=True)[:HEADS]
    for layer in sorted({int(c) // heads for c in chosen}):
        own = [int(c) % heads for c in chosen if int(c) // heads == layer]
        dq, dk, gain = learn(taken[layer], own, rope_of(model, layer), heads, kv_heads, steps, rate)
        out["query"][layer], out["key"][layer], out["gain"][layer] = dq, dk, gain
        progress(0.3 + 0.7 * (layer + 1) / layers, "Learning directions")
    return out


def mass(q: torch.Tensor, k: torch.Tensor, task, scale: float) -> torch.Tensor:
    """ln of the attention of the answer rows on the relevant span: q [H,R,d], k [H,N,d] -> [H, R]."""
    first, last = task.relevant
    rows = torch.arange(task.answer - 1, task.ids.numel() - 1)[:, None]
    s = (q @ k.mT * scale).masked_fill(torch.arange(k.shape[1]) > rows, -torch.inf)
    return s[..., first : last + 1].logsumexp(-1) - s.logsumexp(-1)


def learn(taken, own: list[int], rope, heads: int, kv_heads: int, steps: int, rate: float):
    """(dq [Hq, d], dk [Hk, d], gain [Hq]) for the heads `own` of one layer; others stay 0."""
    groups, d = heads // kv_heads, taken[0][0].shape[-1]
    dq, dk = torch.zeros(heads, d, requires_grad=True), torch.zeros(kv_heads, d, requires_grad=True)
    flag_q = torch.zeros(heads, 1)
    flag_q[own] = 1
    flag_k = torch.zeros(kv_heads, 1)
    flag_k[[h // groups for h in own]] = 1

    def objective(alpha: float) -> torch.Tensor:
        total = 0
        for q, k, task, scale in taken:
            rows = torch.arange(task.answer - 1, task.ids.numel() - 1)
            qs = q + alpha * rope.rotate((dq * flag_q)[:, None].expand(-1, len(rows), -1), rows)
            ks = k + alpha * rope.rotate((dk * flag_k)[:, None].expand(-1, k.shape[1], -1), torch.arange(k.shape[1]))
            total = total + mass(qs, ks.repeat_interleave(groups, 0), task, scale).mean(-1)
        return total / len(taken)

    with torch.enable_grad():
        before = objective(0.0).detach()
        adam = torch.optim.AdamW([dq, dk], lr=rate)
        for _ in range(steps):
            adam.zero_grad()
            (-objective(1.0)[own].mean()).backward()
            adam.step()
        gain = (objective(1.0).detach() - before) * flag_q.squeeze(-1)
    return (dq * flag_q).detach(), (dk * flag_k).detach(), gain
