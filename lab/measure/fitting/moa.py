"""Spans of MoA: what each head loses under each rule, from gradients, and a plan for every density.

arXiv 2406.14909: E_ij = -A_ij (g_ij - sum_l A_il g_il) / (1 - A_ij), g = dLoss/dA, is the first-order effect of deleting
entry j from row i. Since o_i = sum_j A_ij v_j, g_ij = (dLoss/do_i).v_j, so no T x N gradient is stored."""

from __future__ import annotations

import torch

from kernels.cpu_attention import softmax
from lab.measure.fitting.common import forward, frozen, samples, sizes
from lab.techniques.moa import LEAST, plan

GRADIENTS = True
LENGTHS = (256, 512)
ALPHAS = (-128.0, 0.0, 64.0, 128.0)
BETAS = tuple(i / 8 for i in range(9))
DENSITIES = (25, 50, 75)


def fit(technique, model, tokenizer, progress, *, sequences: int = 3, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """{"alpha_D", "beta_D": [L, Hk] for D in 25, 50, 75 percent, "loss": [L, Hk, rules], "rules": [rules, 2]}."""
    layers, _, kv_heads, _ = sizes(model)
    rules = torch.tensor([(a, b) for a in ALPHAS for b in BETAS])
    total, cost = torch.zeros(layers, kv_heads, len(rules)), torch.zeros(len(rules), len(lengths))
    for at, length in enumerate(lengths):
        ids = samples(model, tokenizer, sequences, length)
        span = (rules[:, 0] + rules[:, 1] * length).round().clamp(LEAST, length).long()
        cost[:, at] = ((span + technique.first).clamp_max(length) / length)
        for n, row in enumerate(ids):
            lost = influence(model, row, technique.first)  # [L, Hk, T]: by distance
            beyond = torch.cat([lost.flip(-1).cumsum(-1).flip(-1), lost.new_zeros(*lost.shape[:2], 1)], -1)
            total += beyond[:, :, span.clamp_max(length)]
            progress((at + (n + 1) / len(ids)) / len(lengths), f"What distant attention is worth, {length} tokens")
    out = {"loss": total / (sequences * len(lengths)), "rules": rules}
    cheapest_last = cost.sum(-1).argsort(descending=True, stable=True)
    for density in DENSITIES:
        chosen = cheapest_last[plan(out["loss"].flatten(0, 1)[:, cheapest_last], cost[cheapest_last], density / 100)]
        out[f"alpha_{density}"], out[f"beta_{density}"] = (rules[chosen, i].view(layers, kv_heads).contiguous() for i in (0, 1))
    return out


def influence(model, row: torch.Tensor, first: int) -> torch.Tensor:
    """float32 [L, Hk, T]: sum of |E_ij| at each distance i - j, columns j < first left out, mean over a head's group.

    The loss is that of the model's own likeliest next tokens.
    """
    layers, _, kv_heads, _ = sizes(model)
    kept = {}

    def probe(ctx, out):
        out = out.detach().requires_grad_() if not out.requires_grad else out
        out.retain_grad()
        kept[ctx.layer] = (ctx, out)
        return out

    with frozen(model):
        logits = forward(model, row, probe=probe)
        torch.nn.functional.cross_entropy(logits[0, :-1], logits[0, :-1].detach().argmax(-1)).backward()
    result = torch.zeros(layers, kv_heads, row.numel())
    with torch.no_grad():
        for layer, (ctx, out) in kept.items():
            result[layer] = by_distance(ctx, out.grad, first)
    return result


def by_distance(ctx, grad: torch.Tensor, first: int, block: int = 64) -> torch.Tensor:
    """[Hk, T] sums of |E_ij| by distance for one layer, from dLoss/do grad [1,Hq,T,d], a block of rows at a time."""
    keys, values = ctx.store.exact_k.decode().detach(), ctx.store.exact_v.decode().detach()
    length, groups = ctx.q.shape[2], ctx.groups
    out = torch.zeros(ctx.kv_heads, length)
    j = torch.arange(length, device=keys.device)
    for r0 in range(0, length, block):
        q, g = (x[:, :, r0 : r0 + block].detach().unflatten(1, (ctx.kv_heads, groups)) for x in (ctx.q, grad))
        i = torch.arange(r0, r0 + q.shape[3], device=keys.device)[:, None]
        s = (q @ keys.unsqueeze(2).mT).float() * ctx.scale
        a, _ = softmax(s.masked_fill(j > i, -torch.inf))
        e = effect(a, (g @ values.unsqueeze(2).mT).float()).abs().masked_fill((j > i) | (j < first), 0).mean(2)[0]
        distance = (i - j).clamp_min(0).flatten().expand(ctx.kv_heads, -1).cpu()
        out.scatter_add_(1, distance, e.flatten(1).cpu())
    return out


def effect(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """E of weights a and their gradients g [..., N]; a row of one entry keeps -A*g."""
    inner = (a * g).sum(-1, keepdim=True)
    return torch.where(a < 1 - 1e-6, -a * (g - inner) / (1 - a).clamp_min(1e-6), -a * g)
