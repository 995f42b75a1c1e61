"""Text that comes with Python, split once and for all into a part to learn from and a part to measure on."""

from __future__ import annotations

from functools import cache

import torch

SHARE = 4  # every fourth topic is for learning


@cache
def prose(part: str) -> str:
    """The prose of the Python reference (`pydoc_data.topics`): part "learn" (a quarter of it) or "measure" (the rest)."""
    from pydoc_data import topics

    names = sorted(topics.topics)
    chosen = [n for i, n in enumerate(names) if (i % SHARE == 0) == (part == "learn")]
    return "\n\n".join(topics.topics[n].strip() for n in chosen)


def sample_ids(model: torch.nn.Module, tokenizer, sequences: int, length: int) -> torch.Tensor:
    """int64 [sequences, length] tokens of the "learn" prose, spread evenly over it; without a tokenizer, random tokens."""
    device = model.get_input_embeddings().weight.device
    if tokenizer is None:
        vocab = model.get_input_embeddings().weight.shape[0]
        return torch.randint(vocab, (sequences, length), generator=torch.Generator().manual_seed(0)).to(device)
    ids = tokenizer(prose("learn")[: 40 * sequences * length], add_special_tokens=False)["input_ids"]
    step = max(1, (len(ids) - length) // max(1, sequences - 1))
    rows = [ids[i * step : i * step + length] for i in range(sequences)]
    return torch.tensor([row for row in rows if len(row) == length], device=device)
