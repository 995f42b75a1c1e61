"""What an answer looks at: generate a few tokens, and see which prompt tokens they attend to."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from lab.engine.depth import shallow


@torch.inference_mode()
def answer_importance(model: torch.nn.Module, ids: list[int], new_tokens: int, depth: int | None = None) -> torch.Tensor:
    """float32 [T]: how much each prompt token matters to the greedy answer of `new_tokens` tokens.

    depth: let only the first `depth` layers answer (a draft made of the model's own lower half); None for all of it.
    """
    from lab.engine.cache import LabCache

    cache = LabCache(model, prompt=len(ids), reserve=len(ids) + new_tokens)
    device = model.get_input_embeddings().weight.device

    def feed(tokens: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=tokens.view(1, -1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    with nullcontext() if depth is None else shallow(model, depth):
        token = feed(torch.tensor(ids, device=device))
        layers = [layer for layer in cache.lab_layers if layer.is_initialized]
        queries: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
        scale = {}

        def probe(ctx, out):
            queries[ctx.layer].append(ctx.q[0, :, -1:].clone())
            scale[ctx.layer] = ctx.scale
            return out

        cache.policy.probe = probe
        for _ in range(new_tokens):
            token = feed(token)
    parts = [(torch.cat(queries[layer.index], 1), layer.all_keys()[0, :, : len(ids)]) for layer in layers]
    return answer_scores(parts, next(iter(scale.values())))


def answer_scores(parts: list[tuple[torch.Tensor, torch.Tensor]], scale: float) -> torch.Tensor:
    """[T] from per-layer (q [Hq, answer, d], prompt keys [Hk, T, d]): softmax of q.k over prompt positions only, its maximum
    over layers and heads, the mean over answer tokens."""
    best = None
    for q, k in parts:
        s = q.float() @ k.float().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * scale
        p = s.softmax(-1).amax(0)
        best = p if best is None else torch.maximum(best, p)
    return best.mean(0)
