"""Replacing a model's linear layers on the CPU by packed ones, sibling matrices fused into one.

Decoding reads every weight once per token, so the bytes of the weights are the speed. Siblings that are given the
very same input (q, k and v; gate and up) become one matrix, because small products are bound by their overhead.
Which layers are siblings is observed, not known: a two-token forward pass records what each layer receives. Nothing
in a model's forward is changed; everything else in it stays float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lab.models.head import PackedHead
from lab.models.stores import Store, make_store

_SMALLEST = 32
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


class PackedLinear(nn.Module):
    """A linear layer [N, K] whose weight lives in a Store: x [..., K] -> [..., N] in x's dtype."""

    def __init__(self, store: Store, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.store = store
        self.in_features, self.out_features = store.columns, store.rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """W [N, K] rebuilt in float32, for the few models that look at a layer's weight; slow."""
        return self.store.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return self.rows(x.reshape(-1, self.in_features).float()).view(*x.shape[:-1], self.out_features).to(x.dtype)
        return self.rows(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [M, K] -> float32 [M, N]."""
        if x.requires_grad and torch.is_grad_enabled():  # the packed products have no derivative; what asks for one is rare
            out = x @ self.store.dense().T
            return out if self.bias is None else out + self.bias
        out = self.store.product(x)
        return out if self.bias is None else out.add_(self.bias)

    def rows_of(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`rows` for callers that need no derivative, without a module's attribute look-ups."""
        return self.store.product if self.bias is None else self.rows

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.store.mode}"


class Siblings:
    """One matrix that serves several layers which are called with the identical input.

    The first layer called with a tensor computes the product for all; each of the others takes its slice when it is
    called with that same object. The input is held by a weak reference and the products are let go as they are
    taken, so nothing outlives the layer's own call.
    """

    def __init__(self, linear: PackedLinear, widths: list[int]) -> None:
        self.linear = linear
        self.widths = widths
        self._input: weakref.ref[torch.Tensor] | None = None
        self._waiting: list[torch.Tensor | None] = [None] * len(widths)

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The product of layer ``index`` with ``x``."""
        if self._input is None or self._input() is not x or self._waiting[index] is None:
            self._waiting = list(self.linear(x).split(self.widths, -1))
            self._input = weakref.ref(x)
        out = self._waiting[index]
        assert out is not None
        self._waiting[index] = None
        if all(item is None for item in self._waiting):
            self._input = None
        return out


class FusedLinear(nn.Module):
    """One layer's share of a ``Siblings`` matrix: x [..., K] -> [..., N]."""

    def __init__(self, siblings: Siblings, index: int) -> None:
        super().__init__()
        self.siblings, self.index = siblings, index
        self.in_features, self.out_features = siblings.linear.in_features, siblings.widths[index]

    @property
    def _rows(self) -> slice:
        start = sum(self.siblings.widths[:self.index])
        return slice(start, start + self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """This layer's W [N, K] rebuilt in float32; slow."""
        return self.siblings.linear.weight[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """This layer's bias [N], or None where no sibling has one."""
        whole = self.siblings.linear.bias
        return None if whole is None else whole[self._rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.take(self.index, x)

    def extra_repr(self) -> str:
        mode = getattr(getattr(self.siblings.linear, "store", None), "mode", "as loaded")
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={mode}, fused"


@dataclass
class Packing:
    """What ``pack`` did to a model.

    Attributes:
        mode: how the weights are held. stores: by the name of each group's first layer. layers: how many were replaced.
    """

    mode: str
    stores: dict[str, Store] = field(default_factory=dict)
    layers: int = 0
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(store.nbytes for store in self.stores.values())

    def settle(self) -> None:
        """Let the original layers go."""
        self._undo.clear()

    def undo(self) -> None:
        """Put the original layers back; only where ``pack`` was told to keep them."""
        for restore in reversed(self._undo):
            restore()
        self._undo.clear()


def find_siblings(model: PreTrainedModel) -> list[list[str]]:
    """Names of packable layers, grouped: those under one parent that receive the identical, unchanged tensor.

    Runs one forward pass over two tokens. A layer called more than once, or not at all, stands alone.
    """
    calls: list[tuple[str, torch.Tensor, int]] = []
    names = [name for name, module in model.named_modules() if _packable(name, module)]

    def recorder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        # Tensors are kept until the end, so that no two of them share an id.
        return lambda module, inputs: calls.append((name, inputs[0], inputs[0]._version))

    hooks = [model.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names]
    try:
        # Not in inference mode, even inside a caller's: only ordinary tensors count their versions.
        with torch.inference_mode(False), torch.no_grad():
            model(torch.tensor([[1, 2]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    times = {name: sum(called == name for called, *_ in calls) for name in names}
    groups: dict[object, list[str]] = {}
    for name, tensor, version in calls:
        if times[name] == 1:
            groups.setdefault((name.rpartition(".")[0], id(tensor), version), []).append(name)
    for name in names:
        if times[name] != 1:
            groups[name] = [name]
    return list(groups.values())


def pack(
    model: PreTrainedModel, mode: str, groups: list[list[str]], *, keep: bool = False,
    made: dict[str, Store] | None = None,
) -> Packing:
    """Replace the linear layers named in ``groups`` by packed ones, in place.

    The head gets a packed copy, and its float32 weights stay: they are the embedding where the two are tied, and the
    likeliest tokens are computed from them (see ``head``). In mode int4 the head is held in int8: in int4 it alone
    would cost more than all other matrices together.

    Args:
        mode: one of ``stores.MODES``.
        groups: from ``find_siblings``.
        keep: hold on to the original layers so that ``Packing.undo`` works; else each is freed as it is replaced.
        made: stores that exist already, by the name of their group's first layer.
    """
    packing = Packing(mode)
    head = model.get_output_embeddings()
    for names in groups:
        modules = [model.get_submodule(name) for name in names]
        store = (made or {}).get(names[0])
        widths = [_shape(module)[0] for module in modules]
        if store is None or (store.rows, store.columns) != (sum(widths), _shape(modules[0])[1]):
            weights = [_weight(module) for module in modules]
            held = "int8" if mode == "int4" and head in modules else mode
            store = make_store(torch.cat(weights) if len(weights) > 1 else weights[0], held)
            del weights
        if modules == [head] and mode != "float32":
            linear: nn.Module = PackedHead(store, _head_weight(head), head.bias)
        else:
            linear = PackedLinear(store, _bias(modules))
        siblings = Siblings(linear, widths) if isinstance(linear, PackedLinear) and len(names) > 1 else None
        for index, name in enumerate(names):
            _swap(model, name, linear if siblings is None else FusedLinear(siblings, index), packing, keep)
        packing.stores[names[0]] = store
        packing.layers += len(names)
        del modules
    return packing


def _packable(name: str, module: nn.Module) -> bool:
    """Plain linear layers of some size; routers decide by small differences and are left alone."""
    if type(module) not in (nn.Linear, Conv1D):
        return False
    return min(module.weight.shape) >= _SMALLEST and name.rpartition(".")[2] not in _ROUTERS


def _shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if type(module) is Conv1D else (rows, columns)


def _weight(module: nn.Module) -> torch.Tensor:
    """W [N, K] of a linear layer; GPT-2's Conv1D holds it transposed."""
    return module.weight.detach().t() if type(module) is Conv1D else module.weight.detach()


def _head_weight(head: nn.Module) -> nn.Parameter:
    """The head's own parameter, not a view of it, so that it stays one with a tied embedding."""
    if type(head) is Conv1D:
        return nn.Parameter(_weight(head).contiguous(), requires_grad=False)
    return head.weight


def _bias(modules: list[nn.Module]) -> torch.Tensor | None:
    """The biases of sibling layers one after another, zeros where one has none; None where none has."""
    if all(module.bias is None for module in modules):
        return None
    return torch.cat([module.bias.detach() if module.bias is not None else torch.zeros(_shape(module)[0])
                      for module in modules])


def _swap(model: nn.Module, name: str, new: nn.Module, packing: Packing, keep: bool) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if keep:
        old = getattr(parent, leaf)
        packing._undo.append(lambda: setattr(parent, leaf, old))
    setattr(parent, leaf, new)
