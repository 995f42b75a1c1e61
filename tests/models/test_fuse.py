"""Fusing for a GPU gives the model's own numbers; it only needs a device to be worth it."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lab.models.fuse import fuse


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "gemma2", "gpt2", "phi3"])
def test_logits_stay(name):
    model = tiny_models.build(name)
    ids = tiny_models.tokens(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        saved, norms = fuse(model)
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert str(model)
    if name in ("llama", "qwen2"):
        assert saved == 3 * 3 and norms == 3 * 2 + 1  # q,k,v and gate,up of three layers; two norms each and the last
    if name == "gemma2":
        assert norms == 0
