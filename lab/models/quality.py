"""What packed weights cost in fidelity and gain in time, measured on the model itself."""

from __future__ import annotations

import pydoc_data.topics
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.models.packed import find_siblings, pack
from lab.models.stores import kernels_only

KL_LIMIT = 0.02

_MOST_TOKENS, _FEWEST_TOKENS = 384, 64
_REFERENCE_BYTES = 160_000_000
_TOPICS = ("objects", "execmodel", "exceptions", "typesmethods", "import", "assert")
_ROWS = 32
_STEPS = 5


def sample_ids(tokenizer: PreTrainedTokenizerBase, vocab: int) -> torch.Tensor:
    """Token ids [1, N] of English prose that every Python carries; N is a few hundred, fewer for huge vocabularies."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in _TOPICS if name in topics) or "\n\n".join(topics.values())
    count = max(_FEWEST_TOKENS, min(_MOST_TOKENS, _REFERENCE_BYTES // (4 * vocab)))
    ids = tokenizer(text[:count * 12], return_tensors="pt").input_ids[:, :count]
    return ids.clamp(max=vocab - 1)


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities float32 [N, V] for ids [1, N], with packed weights in their decode kernels."""
    with torch.inference_mode(), kernels_only():
        return model(ids, use_cache=False).logits[0].float().log_softmax(-1)


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over rows of KL(reference || other) in nats, from log-probabilities [N, V] each."""
    total = 0.0
    for ours, theirs in zip(reference.split(_ROWS), other.split(_ROWS), strict=True):
        total += float((ours.exp() * (ours - theirs)).sum(-1, dtype=torch.float64).sum())
    return max(total / len(reference), 0.0)


def measure_weights_kl(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str, groups: list[list[str]] | None = None,
) -> float:
    """Mean KL(float32 || mode) per token of a float32 model that is not packed, in nats; the model is left as it was.

    Teacher-forced on a few hundred tokens of ``pydoc_data.topics``, with the kernels that decoding uses.

    Args:
        mode: one of ``stores.MODES``.
        groups: from ``find_siblings``; found when None.
    """
    ids = sample_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
    reference = log_probabilities(model, ids)
    packing = pack(model, mode, groups or find_siblings(model), keep=True)
    try:
        return mean_kl(reference, log_probabilities(model, ids))
    finally:
        packing.undo()


def step_ms(model: PreTrainedModel) -> float:
    """Milliseconds of a forward over one token without a cache: the least of a few, as other programs only add."""
    ids = torch.tensor([[1]])
    times = []
    with torch.inference_mode():
        for _ in range(_STEPS):
            start = time.perf_counter()
            model(ids, use_cache=False)
            times.append(time.perf_counter() - start)
    return min(times) * 1e3
