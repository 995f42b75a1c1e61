"""Usual hidden state of the first token before every layer, and its usual key and value."""

from __future__ import annotations

import torch

from lab.engine.cache import LabCache
from lab.measure.fitting.common import samples
from lab.techniques.massive_activations import massive


@torch.no_grad()
def fit(technique, model, tokenizer, progress, *, sequences: int = 20, length: int = 64) -> dict[str, torch.Tensor]:
    """{"hidden": [L+1, D], "key", "value": [L, Hk, d] means over samples, "massive": [L+1] share of samples in which token 0
    is flagged}."""
    ids = samples(model, tokenizer, sequences, length)
    hidden, keys, values, flagged = 0, 0, 0, 0
    for n, row in enumerate(ids):
        cache = LabCache(model)
        out = model(input_ids=row.view(1, -1), past_key_values=cache, use_cache=True, output_hidden_states=True)
        hidden = hidden + torch.stack([h[0, 0].float() for h in out.hidden_states])
        found = [massive(h, technique.threshold, technique.ratio)[0, 0].any().float() for h in out.hidden_states]
        flagged = flagged + torch.stack(found)
        keys = keys + torch.stack([layer.all_keys()[0, :, 0].float() for layer in cache.lab_layers])
        values = values + torch.stack([layer.all_values()[0, :, 0].float() for layer in cache.lab_layers])
        progress((n + 1) / len(ids), "First tokens of sample texts")
    found = {"hidden": hidden, "key": keys, "value": values, "massive": flagged}
    return {name: (x / len(ids)).cpu() for name, x in found.items()}
