"""RMS norms are replaced only where one operation gives the same numbers."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from lab.models.norms import FastRMSNorm, replace_norms


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt_oss"])
def test_logits_stay_and_norms_are_replaced(kind: str) -> None:
    model = tiny_models.build(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.5, 0.3)
    ids = torch.randint(2, 100, (1, 12))
    with torch.inference_mode():
        wanted = model(ids).logits
        count = replace_norms(model)
        assert count >= 2 * 3 + 1
        assert torch.allclose(model(ids).logits, wanted, atol=2e-4, rtol=1e-4)
    assert replace_norms(model) == 0


@pytest.mark.parametrize("kind", ["gpt2", "cohere"])
def test_layer_norms_are_left_alone(kind: str) -> None:
    assert replace_norms(tiny_models.build(kind)) == 0


def test_norms_that_do_something_else_are_left_alone() -> None:
    class SumRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.square().sum(-1, keepdim=True) + self.eps).sqrt() * self.weight

    class GatedRMSNorm(SumRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x * gate

    class BareRMSNorm(nn.Module):
        pass

    holder = nn.ModuleDict({"sum": SumRMSNorm(), "gated": GatedRMSNorm(), "bare": BareRMSNorm()})
    assert replace_norms(holder) == 0 and not any(isinstance(module, FastRMSNorm) for module in holder.values())
