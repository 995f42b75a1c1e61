"""Running a model so that something can be learnt from it: sample tokens, probes on every layer, losses."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterator

import torch

from lab.engine.cache import LabCache
from lab.engine.context import LayerContext
from lab.engine.sample_text import sample_ids
from lab.engine.stack import Stack

Probe = Callable[[LayerContext, torch.Tensor], torch.Tensor]


def samples(model: torch.nn.Module, tokenizer, sequences: int, length: int) -> torch.Tensor:
    """int64 [sequences, length] of sample text, no longer than the model's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or length
    return sample_ids(model, tokenizer, sequences, min(length, limit))


def forward(
    model: torch.nn.Module, ids: torch.Tensor, stack: Stack | None = None, probe: Probe | None = None, *, keep: int = 0
) -> torch.Tensor:
    """Logits float32 [B, T, V] of ids [T] or [B, T] under a stack, of the last `keep` rows only where that is not 0;
    probe sees and may replace each layer's output."""
    cache = LabCache(model, stack if stack is not None else Stack())
    cache.policy.probe = probe
    ids = ids.view(-1, ids.shape[-1])
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()


def loss(logits: torch.Tensor, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Mean next-token cross entropy from row `first` on."""
    return torch.nn.functional.cross_entropy(logits[0, first:-1], ids[first + 1 :])


def entropy(logits: torch.Tensor) -> float:
    """Mean entropy in nats of the next-token distributions."""
    logp = logits.log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) in nats of rows of logits."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def sizes(model: torch.nn.Module) -> tuple[int, int, int, int]:
    """(layers, query heads, KV heads, head_dim)."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return (config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights take no gradient inside; afterwards everything is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def spread(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat KV heads [B, Hk, ...] for the query heads of their groups, [B, Hk*groups, ...]."""
    return x.repeat_interleave(groups, 1)
