"""Replacing RMS norms on the CPU by torch's single operation, where that gives the same numbers."""

from __future__ import annotations

import inspect

import torch
from torch import nn

_TOLERANCE = 1e-6
_NAMES_OF_EPS = ("variance_epsilon", "eps", "epsilon")


class FastRMSNorm(nn.Module):
    """x [..., D] -> x / sqrt(mean(x^2) + eps) * weight, in one call instead of six."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps
        self.register_buffer("nothing", torch.zeros_like(weight), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = x.numel() == self.weight.numel() and x.device.type == "cpu" and x.dtype == torch.float32
        if one and not (x.requires_grad and torch.is_grad_enabled()):
            return self.rows(x.view(1, -1)).view(x.shape)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The same for float32 rows [B, D] on a CPU, without a module's attribute look-ups and without a derivative.

        On a CPU torch's operation is a chain of eight; for one row a dot product and one sum are enough.
        """
        weight = self._parameters["weight"]
        if x.shape[0] != 1:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)
        row = x.view(-1)
        scale = (torch.dot(row, row).item() / row.shape[0] + self.variance_epsilon) ** -0.5
        return torch.addcmul(self._buffers["nothing"], x, weight, value=scale)


def replace_norms(model: nn.Module) -> int:
    """Swap every RMS norm whose output torch's operation reproduces; returns how many.

    Candidates are found by class name and by their one input; whether the weight multiplies as w or as 1 + w (Gemma)
    is decided by comparing outputs on random rows, and a norm that matches neither is left alone.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        if not type(module).__name__.endswith("RMSNorm") or isinstance(module, FastRMSNorm):
            continue
        fast = equivalent(module)
        if fast is not None:
            parent_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent_name), leaf, fast)
            replaced += 1
    return replaced


def equivalent(module: nn.Module) -> FastRMSNorm | None:
    """The fast norm that gives what ``module`` gives, or None."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _NAMES_OF_EPS if isinstance(getattr(module, name, None), float)), None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or eps is None or weight.dtype != torch.float32:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None  # gated norms take a second input
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, weight.shape[0], generator=generator) * torch.tensor([[1e-3], [1.0], [30.0], [1e4]])
    with torch.no_grad():
        wanted = module(rows)
        for candidate in (weight.detach(), 1 + weight.detach()):
            fast = FastRMSNorm(candidate.clone(), eps)
            error = (fast(rows) - wanted).abs().amax(1) / wanted.abs().amax(1).clamp_min(1e-30)
            if wanted.dtype == torch.float32 and float(error.max()) <= _TOLERANCE:
                return fast
    return None
