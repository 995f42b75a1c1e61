"""RMS norms are replaced only where one operation gives the same numbers."""

from __future__ import annotations

import copy
from typing import Callable

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


def _assigned(norm: FastRMSNorm, weight: torch.Tensor) -> None:
    norm.load_state_dict({"weight": weight}, assign=True)


def _swapped(norm: FastRMSNorm, weight: torch.Tensor) -> None:
    norm.weight.data = weight


def _in_place(norm: FastRMSNorm, weight: torch.Tensor) -> None:
    norm.weight.copy_(weight)


@pytest.mark.parametrize("change", [_assigned, _swapped, _in_place])
def test_weights_that_come_later_are_used_for_one_row_as_for_many(change: Callable[[FastRMSNorm, torch.Tensor], None]) -> None:
    norm, weight, x = FastRMSNorm(torch.ones(8), 1e-6), torch.rand(8) + 0.5, torch.randn(3, 8)
    twin = copy.deepcopy(norm)
    change(norm, weight)
    wanted = nn.functional.rms_norm(x, (8,), weight, 1e-6)
    assert torch.allclose(norm(x), wanted)
    assert torch.allclose(norm(x[:1]), wanted[:1]) and torch.allclose(norm.rows(x[:1]), wanted[:1])
    assert torch.allclose(twin(x[:1]), nn.functional.rms_norm(x[:1], (8,), None, 1e-6)), "a copy keeps its own"


def test_the_derivative_of_one_row_is_that_of_many() -> None:
    norm, x = FastRMSNorm(torch.rand(8) + 0.5, 1e-6), torch.randn(2, 8)
    found = []
    for rows in (x, x[:1]):
        rows = rows.clone().requires_grad_()
        found.append(torch.autograd.grad(norm(rows)[0, 0], rows)[0][0])
    assert torch.allclose(*found, atol=1e-6)
