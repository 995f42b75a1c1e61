"""The answer-informed oracle of prompt token dropping: which prompt tokens the model's own answer attends to.

CLAA (arXiv 2602.16054): generate densely; for every answer token softmax q.k over prompt positions only; maximum over
layers and heads; mean over answer tokens."""

from __future__ import annotations

import torch

from lab.engine.session import Session
from lab.techniques.snapkv import pooled


@torch.inference_mode()
def oracle(model: torch.nn.Module, ids: list[int], *, new_tokens: int = 16, kernel: int = 1) -> torch.Tensor:
    """float32 [T]: each prompt token's importance for the answer of `new_tokens` tokens, average-pooled over `kernel`."""
    session = Session(model, "dense", new_tokens=new_tokens)
    logits = session.prefill(ids)
    layers = session.cache.lab_layers
    queries: list[list[torch.Tensor]] = [[] for _ in layers]
    scale = {}

    def probe(ctx, out):
        queries[ctx.layer].append(ctx.q[0, :, -1:].clone())
        scale[ctx.layer] = ctx.scale
        return out

    session.cache.policy.probe = probe
    for _ in range(new_tokens):
        logits = session.step(logits.argmax(-1))
    parts = [(torch.cat(queries[i], 1), layer.all_keys()[0, :, : len(ids)]) for i, layer in enumerate(layers)]
    scores = answer_scores(parts, next(iter(scale.values())))
    return pooled(scores.view(1, 1, -1), kernel)[0, 0]


def answer_scores(parts: list[tuple[torch.Tensor, torch.Tensor]], scale: float) -> torch.Tensor:
    """[T] from per-layer (q [Hq, answer, d], prompt keys [Hk, T, d])."""
    best = None
    for q, k in parts:
        s = q.float() @ k.float().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * scale
        p = s.softmax(-1).amax(0)
        best = p if best is None else torch.maximum(best, p)
    return best.mean(0)


def overlap(a: torch.Tensor, b: torch.Tensor, rate: float) -> float:
    """Share of the top `rate` of a that is also in the top `rate` of b."""
    count = max(1, round(rate * len(a)))
    top = [set(x.argsort(descending=True, stable=True)[:count].tolist()) for x in (a, b)]
    return len(top[0] & top[1]) / count


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation; ties share their mean rank."""
    ra, rb = _ranks(a), _ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    return float((ra * rb).sum() / (ra.norm() * rb.norm()).clamp_min(1e-12))


def _ranks(x: torch.Tensor) -> torch.Tensor:
    _, inverse, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
