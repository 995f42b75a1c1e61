"""Fewer, larger launches on a GPU: sibling linear layers in one product, RMS norms in one operation.

A small model's decode step is bound by its number of kernels, not by its arithmetic. The numbers stay those of the
model's dtype; nothing in a forward is changed.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from lab.models.norms import FastRMSNorm, equivalent
from lab.models.packed import FusedLinear, Siblings, find_siblings


def fuse(model: PreTrainedModel) -> tuple[int, int]:
    """Fuse a model on one CUDA device in place; returns (products saved, norms replaced)."""
    return _fuse_siblings(model), _fuse_norms(model)


class _Joined(nn.Linear):
    """One matrix for several layers; reads as a plain linear layer."""


def _fuse_siblings(model: PreTrainedModel) -> int:
    saved = 0
    for names in find_siblings(model):
        modules = [model.get_submodule(name) for name in names]
        if len(modules) < 2 or any(type(m) is not nn.Linear for m in modules):
            continue
        if any((m.bias is None) != (modules[0].bias is None) for m in modules):
            continue
        weight = torch.cat([m.weight.detach() for m in modules])
        joined = _Joined(weight.shape[1], weight.shape[0], bias=modules[0].bias is not None, device="meta")
        joined.weight = nn.Parameter(weight, requires_grad=False)
        if modules[0].bias is not None:
            joined.bias = nn.Parameter(torch.cat([m.bias.detach() for m in modules]), requires_grad=False)
        siblings = Siblings(joined, [m.weight.shape[0] for m in modules])
        for index, name in enumerate(names):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FusedLinear(siblings, index))
        saved += len(names) - 1
    return saved


def _fuse_norms(model: nn.Module) -> int:
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if (not type(module).__name__.endswith("RMSNorm") or isinstance(module, FastRMSNorm)
                or not isinstance(weight, torch.Tensor)):
            continue
        probe = equivalent(copy.deepcopy(module).float().cpu())
        if probe is None or not torch.equal(probe.weight, weight.detach().float().cpu()):
            continue  # a norm that scales by 1 + w would round its weight in half precision
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FastRMSNorm(weight.detach(), probe.variance_epsilon))
        replaced += 1
    return replaced
