"""Spans of MoA: what each head loses under each rule, from gradients, and a plan for every density.

arXiv 2406.14909: E_ij = -A_ij (g_ij - sum_l A_il g_il) / (1 - A_ij), g = dLoss/dA, is the first-order effect of deleting
entry j from row i. Since o_i = sum_j A_ij v_j, g_ij = (dLoss/do_i).v_j, so no T x N gradient is stored."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.cpu_attention import softmax
from lab.engine.stack import Stack
from lab.measure.fitting.common import forward, frozen, loss, samples, sizes
from lab.techniques.moa import LEAST, MoA, plan, spans

GRADIENTS = True
LENGTHS = (512, 1024)
ALPHAS = (-128.0, 0.0, 128.0, 256.0)
BETAS = tuple(i / 8 for i in range(9))
DENSITIES = (25, 50, 75)


def fit(
    technique, model, tokenizer, progress, *, sequences: int = 2, lengths=LENGTHS, longer: int = 1536
) -> dict[str, torch.Tensor]:
    """{"alpha_D", "beta_D": [L, Hk] for D in 25, 50, 75 percent, "loss": [profiles, L, Hk, rules], "rules": [rules, 2],
    "plans": [plans, 4] of (D, largest density at the profiled lengths, predicted loss, measured loss)}.

    Every density is planned from several profiles (each length alone, all, and signed sums, which let gains offset losses);
    of the plans no other one beats in both density and prediction, the one with the least loss on text of `longer` tokens,
    a length no profile has seen, is taken.
    """
    layers, _, kv_heads, _ = sizes(model)
    rules = torch.tensor([(a, b) for a in ALPHAS for b in BETAS])
    lost, cost = torch.zeros(2, len(lengths), layers, kv_heads, len(rules)), torch.zeros(len(rules), len(lengths))
    for at, length in enumerate(lengths):
        ids = samples(model, tokenizer, sequences, length)
        span = (rules[:, 0] + rules[:, 1] * ids.shape[1]).round().clamp(LEAST, ids.shape[1]).long()
        cost[:, at] = (span + technique.first).clamp_max(ids.shape[1]) / ids.shape[1]
        for n, row in enumerate(ids):
            found = influence(model, row, technique.first)  # [2, L, Hk, T]: by distance
            beyond = torch.nn.functional.pad(found.flip(-1).cumsum(-1).flip(-1), (0, 1))
            lost[:, at] += beyond[..., span] / len(ids)
            progress(0.6 * (at + (n + 1) / len(ids)) / len(lengths), f"What distant attention is worth, {length} tokens")
    profiles = torch.stack([*lost[0], lost[0].mean(0), lost[1].mean(0)])
    out = {"loss": profiles, "rules": rules}
    rows, unseen = [], samples(model, tokenizer, 2, longer)[-1]
    for at, density in enumerate(DENSITIES):
        plans = [plan(profile, cost, density / 100) for profile in profiles]
        plans = [p for i, p in enumerate(plans) if not any(torch.equal(p, q) for q in plans[:i])]
        table = [(float(cost[p].mean((0, 1)).max()), predicted(profiles[-2], p)) for p in plans]
        plans = [p for p, mine in zip(plans, table) if not any(beats(other, mine) for other in table)]
        table = [mine for mine in table if not any(beats(other, mine) for other in table)]
        measured = []
        for chosen in plans:
            tables = {f"{n}_{density}": rules[chosen, i].contiguous() for i, n in enumerate(("alpha", "beta"))}
            measured.append(measure(model, replace(technique, density=density / 100), tables, unseen))
            progress(0.6 + 0.4 * (at + len(measured) / len(plans)) / len(DENSITIES), f"Plans on {len(unseen)} unseen tokens")
        best = plans[measured.index(min(measured))]
        out[f"alpha_{density}"], out[f"beta_{density}"] = (rules[best, i].contiguous() for i in (0, 1))
        rows += [(density, *mine, nats) for mine, nats in zip(table, measured)]
    return {**out, "plans": torch.tensor(rows)}


def predicted(profile: torch.Tensor, chosen: torch.Tensor) -> float:
    """Total loss [L, Hk, rules] of the chosen rules [L, Hk]."""
    return float(profile.gather(2, chosen.unsqueeze(-1)).sum())


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """a is no worse than b in density and loss, and better in one."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@torch.no_grad()
def measure(model, technique, tables: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Mean next-token loss in nats of ids [T], read as the plan says."""
    return float(loss(forward(model, ids, Stack((_Planned(technique, tables),))), ids))


class _Planned(MoA):
    """MoA as it reads a prompt, by tables of its own."""

    slots = ("select",)
    learns = False

    def __init__(self, technique: MoA, tables: dict[str, torch.Tensor]) -> None:
        super().__init__(density=technique.density, first=technique.first)
        object.__setattr__(self, "tables", tables)

    def spans(self, ctx, length: int) -> torch.Tensor:
        return spans(self.tables, self.density, ctx.layer, length)

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def influence(model, row: torch.Tensor, first: int) -> torch.Tensor:
    """float32 [2, L, Hk, T]: sums of |E_ij| and of E_ij at each distance i - j, columns j < first left out, mean over a head's
    group.

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
    result = torch.zeros(2, layers, kv_heads, row.numel())
    with torch.no_grad():
        for layer, (ctx, out) in kept.items():
            result[:, layer] = by_distance(ctx, out.grad, first)
    return result


def by_distance(ctx, grad: torch.Tensor, first: int, block: int = 64) -> torch.Tensor:
    """[2, Hk, T] sums of |E_ij| and E_ij by distance for one layer, from dLoss/do grad [1,Hq,T,d], a block of rows at a time."""
    keys, values = ctx.store.exact_k.decode().detach(), ctx.store.exact_v.decode().detach()
    length, groups = ctx.q.shape[2], ctx.groups
    out = torch.zeros(2, ctx.kv_heads, length)
    j = torch.arange(length, device=keys.device)
    for r0 in range(0, length, block):
        q, g = (x[:, :, r0 : r0 + block].detach().unflatten(1, (ctx.kv_heads, groups)) for x in (ctx.q, grad))
        i = torch.arange(r0, r0 + q.shape[3], device=keys.device)[:, None]
        s = (q @ keys.unsqueeze(2).mT).float() * ctx.scale
        a, _ = softmax(s.masked_fill(j > i, -torch.inf))
        e = effect(a, (g @ values.unsqueeze(2).mT).float()).masked_fill((j > i) | (j < first), 0)
        both = torch.stack([e.abs(), e]).mean(3)[:, 0]  # [2, Hk, R, N]
        distance = (i - j).clamp_min(0).flatten().expand(2, ctx.kv_heads, -1).cpu()
        out.scatter_add_(2, distance, both.flatten(2).cpu())
    return out


def effect(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """E of weights a and their gradients g [..., N]; a row of one entry keeps -A*g."""
    inner = (a * g).sum(-1, keepdim=True)
    return torch.where(a < 1 - 1e-6, -a * (g - inner) / (1 - a).clamp_min(1e-6), -a * g)
