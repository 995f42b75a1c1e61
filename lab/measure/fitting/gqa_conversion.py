"""How alike the KV heads of each layer are: mean cosine of their keys before rotation, over sample text."""

from __future__ import annotations

import torch

from lab.engine.cache import LabCache
from lab.engine.rope import rope_of
from lab.errors import LabError
from lab.measure.fitting.common import samples, sizes


@torch.no_grad()
def fit(technique, model, tokenizer, progress, *, sequences: int = 4, length: int = 256) -> dict[str, torch.Tensor]:
    """{"similarity": [L, Hk, Hk]}, 1 on the diagonal."""
    layers, _, kv_heads, _ = sizes(model)
    ids = samples(model, tokenizer, sequences, length)
    total = torch.zeros(layers, kv_heads, kv_heads)
    for n, row in enumerate(ids):
        cache = LabCache(model)
        model.base_model(input_ids=row.view(1, -1), past_key_values=cache, use_cache=True)
        for layer in cache.lab_layers:
            keys = _unrotated(model, layer).float()
            keys = torch.nn.functional.normalize(keys - keys.mean(1, keepdim=True), dim=-1)  # a shared offset says nothing
            total[layer.index] += torch.einsum("atd,btd->ab", keys, keys).cpu() / keys.shape[1]
        progress((n + 1) / len(ids), "Keys of sample text")
    return {"similarity": total / len(ids)}


def _unrotated(model, layer) -> torch.Tensor:
    """Keys [Hk, T, d] of one layer as they were before rotation, or as they are where there is none."""
    keys = layer.all_keys()
    try:
        return rope_of(model, layer.index).rotate(keys, -layer.positions())[0]
    except LabError:
        return keys[0]
