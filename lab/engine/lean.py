"""A captured decode step in about six launches a layer, for decoders built like Llama, Mistral, Qwen2 and Qwen3.

A small model's step is bound by how many kernels it launches. Where a model has the familiar shape (norm, q/k/v, rotary
embedding, attention, output; norm, gate and up, silu, down) its step is done by `kernels.step` instead of by its modules.
The shape is looked for, then checked: every part of every layer must give what the model's own module gives for the model's
own input, else the modules run as before.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

import torch

from kernels import step
from kernels.step.api import WIDEST

if TYPE_CHECKING:
    from lab.engine.layer import LabLayer

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 8e-3, torch.float32: 2e-3}  # of a part's norm; a wrong structure is off by 1
_CHANGING = {"dynamic", "longrope"}


class NotLean(Exception):
    """Why a model's step cannot be done this way; the text completes 'the model's own modules run, because ...'."""


@dataclass
class _Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class _Norm:
    weight: torch.Tensor
    eps: float


@dataclass
class _Layer:
    module: torch.nn.Module
    enter: _Norm
    qkv: _Linear
    heads: tuple[_Norm, _Norm] | None
    out: _Linear
    middle: _Norm
    gate_up: _Linear
    down: _Linear
    scale: float


@dataclass
class Place:
    """Where a step's new rows go: row slot[b*Hk + h] of k, v [slots,d], and the position to tag[tag_slot] where positions are
    kept."""

    k: torch.Tensor
    v: torch.Tensor
    slot: torch.Tensor
    tag: torch.Tensor | None = None
    tag_slot: torch.Tensor | None = None


@dataclass
class Seen:
    """What the model's own step did in one layer, for comparison. `note` is called by the attention function."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    enter: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    mlp: torch.Tensor | None = None
    leave: torch.Tensor | None = None

    def note(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.q, self.k, self.v = q.clone(), k.clone(), v.clone()


@dataclass
class Lean:
    """The parts of a model and the buffers of one captured step.

    place(store) says where a layer's new rows go; read(store, q, scale) -> [B,1,Hq,d] attends with a layer's stored rows, the
    newest included.
    """

    layers: list[_Layer]
    table: torch.Tensor
    last: _Norm
    head: _Linear
    kv_heads: int
    stores: list["LabLayer"]
    position: torch.Tensor
    first: int
    cos: torch.Tensor
    sin: torch.Tensor
    h: torch.Tensor
    q: torch.Tensor
    act: torch.Tensor
    place: Callable[["LabLayer"], Place]
    read: Callable[["LabLayer", torch.Tensor, float], torch.Tensor]
    impl: str = "auto"
    errors: dict[str, float] = field(default_factory=dict)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B,1] -> logits float32 [B,V]; stores the new keys and values."""
        step.embed(ids, self.table, self.h, self.impl)
        for layer, store in zip(self.layers, self.stores):
            self._project(layer, store)
            self._attended(layer, store)
            self._mlp(layer)
        return self._logits()

    def _project(self, layer: _Layer, store: "LabLayer") -> None:
        at = self.place(store)
        norms = None if layer.heads is None else (layer.heads[0].weight, layer.heads[1].weight, layer.heads[0].eps)
        target = step.Heads(
            self.q, at.k, at.v, at.slot, self.cos, self.sin, self.position, self.first, self.kv_heads, norms, at.tag, at.tag_slot
        )
        step.project(self.h, layer.enter.weight, layer.enter.eps, layer.qkv.weight, layer.qkv.bias, target, self.impl)

    def _give(self, own: Seen, at: Place) -> None:
        """The model's own query, key and value in place of the short step's: where a stack chooses what to read, a rounding of
        the query may choose another page, and attention would differ though nothing is wrong with it."""
        self.q.copy_(own.q.view_as(self.q))
        for rows, x in ((at.k, own.k), (at.v, own.v)):
            rows.index_copy_(0, at.slot, x.reshape(len(at.slot), -1))

    def _attended(self, layer: _Layer, store: "LabLayer") -> None:
        out = self.read(store, self.q, layer.scale)
        step.add_product(out.reshape(self.h.shape[0], -1), layer.out.weight, layer.out.bias, self.h, self.impl)

    def _mlp(self, layer: _Layer) -> None:
        step.gated(self.h, layer.middle.weight, layer.middle.eps, layer.gate_up.weight, layer.gate_up.bias, self.act, self.impl)
        step.add_product(self.act, layer.down.weight, layer.down.bias, self.h, self.impl)

    def _logits(self) -> torch.Tensor:
        return step.logits(self.h, self.last.weight, self.last.eps, self.head.weight, self.head.bias, self.impl)

    # -- checking --------------------------------------------------------------------------------------------------
    def check(self, model: torch.nn.Module, forward: Callable[[], torch.Tensor], ids: torch.Tensor) -> None:
        """Compare with one step of the model itself, part by part on the model's own inputs; the step's row is written
        to where the next step writes it again. Raises NotLean with the worst part."""
        with _watched(self) as seen:
            logits = forward()
        found: list[tuple[str, torch.Tensor]] = []
        step.embed(ids, self.table, self.h, self.impl)
        found.append(("embedding", _off(self.h, seen[0].enter)))
        for i, (layer, store, own) in enumerate(zip(self.layers, self.stores, seen)):
            enter, attention = _flat(own.enter), _flat(own.attention)
            self.h.copy_(enter)
            self._project(layer, store)
            at = self.place(store)
            found.append((f"queries of layer {i}", _off(self.q, own.q)))
            found.append((f"keys of layer {i}", _off(at.k[at.slot], own.k)))
            found.append((f"values of layer {i}", _off(at.v[at.slot], own.v)))
            self._give(own, at)
            self.h.zero_()
            self._attended(layer, store)
            found.append((f"attention of layer {i}", _off(self.h, attention)))
            self.h.copy_(enter + attention)
            before = self.h.clone()
            self._mlp(layer)
            found.append((f"mlp of layer {i}", _off(self.h - before, own.mlp)))
            found.append((f"sum of layer {i}", _unequal(enter, attention, _flat(own.mlp), _flat(own.leave))))
        self.h.copy_(_flat(seen[-1].leave))
        found.append(("logits", _off(self._logits(), logits)))
        self.errors = dict(zip((name for name, _ in found), torch.stack([x for _, x in found]).tolist()))
        worst = max(self.errors, key=lambda name: self.errors[name] if self.errors[name] == self.errors[name] else float("inf"))
        if not self.errors[worst] < TOLERANCE[self.q.dtype]:
            raise NotLean(f"the {worst} came out {self.errors[worst]:.2g} away from the model's own")


def prepare(
    model: torch.nn.Module, stores: list["LabLayer"], position: torch.Tensor, room: int, batch: int,
    place: Callable[["LabLayer"], Place], read: Callable[["LabLayer", torch.Tensor, float], torch.Tensor],
) -> Lean:
    """The lean step of a model over `stores` (each with its place in the graph), for positions from `position` on.

    Raises NotLean for a model of another shape.
    """
    base, head = model.base_model, model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    _demand(batch <= WIDEST, f"it serves at most {WIDEST} sequences at once")
    _demand(_children(base) == {"embed_tokens", "layers", "norm", "rotary_emb"}, "the model is put together differently")
    _demand(isinstance(head, torch.nn.Linear), "the head is not a linear layer")
    _demand(getattr(config, "hidden_act", None) in ("silu", "swish"), "the activation is not silu")
    layers = [_layer(module) for module in base.layers]
    _demand(len(layers) == len(stores), "not every layer stores its own keys")
    dim, kv = stores[0].exact_k.rows.fields["x"].shape[-1], stores[0].heads
    dtype, device = stores[0].exact_k.rows.fields["x"].dtype, stores[0].device
    width = base.embed_tokens.weight.shape[1]
    for layer, store in zip(layers, stores):
        same = layer.qkv.weight.dtype == dtype and store.heads == kv and layer.qkv.weight.shape == layers[0].qkv.weight.shape
        _demand(same and layer.qkv.weight.device == device, "layers differ in shape, dtype or device")
    heads = layers[0].qkv.weight.shape[0] // dim - 2 * kv
    _demand(layers[0].out.weight.shape == (width, heads * dim), "heads do not fit the output matrix")
    first = int(position)
    cos, sin = _angles(base.rotary_emb, base.embed_tokens.weight, first, room)
    _demand(cos.shape[-1] == dim and dim % 2 == 0, "only part of each head is turned")
    made = lambda *shape, kind=dtype: torch.empty(shape, dtype=kind, device=device)  # noqa: E731
    return Lean(
        layers, base.embed_tokens.weight, _norm(base.norm), _Linear(head.weight, head.bias), kv, stores, position, first,
        cos, sin, made(batch, width, kind=torch.float32), made(batch, heads, dim),
        made(batch, layers[0].gate_up.weight.shape[0] // 2), place, read,
    )


def _layer(module: torch.nn.Module) -> _Layer:
    _demand(_children(module) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
            "its layers are put together differently")
    attention, mlp = module.self_attn, module.mlp
    parts = _children(attention) - {"q_norm", "k_norm"}
    _demand(parts == {"q_proj", "k_proj", "v_proj", "o_proj"}, "its attention is put together differently")
    _demand(not list(attention.parameters(recurse=False)), "its attention has parameters of its own")
    # queries that grow with the position (Ministral 3) may begin to long after the step that is compared
    _demand("position_ids" not in inspect.signature(attention.forward).parameters, "its attention looks at positions itself")
    _demand(_children(mlp) - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"}, "its layers have another kind of mlp")
    norms = None
    if hasattr(attention, "q_norm"):
        norms = _norm(attention.q_norm), _norm(attention.k_norm)
        _demand(norms[0].weight.shape == norms[1].weight.shape and norms[0].eps == norms[1].eps,
                "queries and keys are normed differently")
        _demand(norms[0].weight.shape[0] == attention.head_dim, "whole rows of queries are normed, not heads")
    return _Layer(
        module, _norm(module.input_layernorm), _joined([attention.q_proj, attention.k_proj, attention.v_proj]), norms,
        _linear(attention.o_proj), _norm(module.post_attention_layernorm), _joined([mlp.gate_proj, mlp.up_proj]),
        _linear(mlp.down_proj), float(attention.scaling),
    )


def _joined(modules: list[torch.nn.Module]) -> _Linear:
    """The one matrix that sibling layers share after `lab.models.fuse`."""
    found = [getattr(m, "siblings", None) for m in modules]
    _demand(found[0] is not None and all(x is found[0] for x in found), "its sibling products are not fused")
    _demand([m.index for m in modules] == list(range(len(modules))) == list(range(len(found[0].widths))),
            "its products are fused in another order")
    return _linear(found[0].linear)


def _linear(module: torch.nn.Module) -> _Linear:
    _demand(isinstance(module, torch.nn.Linear) and module.weight.is_contiguous(), "its products are not plain linear layers")
    return _Linear(module.weight, module.bias)


def _norm(module: torch.nn.Module) -> _Norm:
    """A norm that `lab.models.norms` has found to be a plain RMS norm."""
    _demand(type(module).__name__ == "FastRMSNorm", "its norms are of another kind")
    return _Norm(module.weight, float(module.variance_epsilon))


def _angles(rotary: torch.nn.Module, like: torch.Tensor, first: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [room, d] from position `first` on, as the model itself makes them."""
    _demand(len(inspect.signature(rotary.forward).parameters) == 2, "its rotary embedding differs between layers")
    _demand(getattr(rotary, "rope_type", "default") not in _CHANGING, "its rotary embedding changes with the length of the text")
    positions = torch.arange(first, first + room, device=like.device)[None]
    cos, sin = rotary(like[:1, None], positions)
    return cos[0].contiguous(), sin[0].contiguous()


def _children(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _demand(truth: bool, reason: str) -> None:
    if not truth:
        raise NotLean(reason)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _off(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative distance of two tensors of the same numbers, whatever their shapes; a tensor, so that nothing waits."""
    want = want.float().flatten()
    return (got.float().flatten() - want).norm() / want.norm().clamp_min(1e-20)


def _unequal(x: torch.Tensor, attention: torch.Tensor, mlp: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The share of channels whose sum x + attention + mlp is not y to a half-precision rounding: scaled residuals."""
    bound = (x.abs() + attention.abs() + mlp.abs()) * 2**-6 + 1e-20
    return ((y - (x + attention + mlp)).abs() > bound).float().mean()


class _watched:
    """Notes what the model's layers are given and give, during one forward."""

    def __init__(self, lean: Lean) -> None:
        self.lean, self.seen, self.hooks = lean, [Seen() for _ in lean.layers], []

    def __enter__(self) -> list[Seen]:
        for layer, store, seen in zip(self.lean.layers, self.lean.stores, self.seen):
            store.witness = seen
            module = layer.module
            self.hooks.append(module.register_forward_hook(_layer_hook(seen), with_kwargs=True))
            self.hooks.append(module.self_attn.register_forward_hook(_part_hook(seen, "attention")))
            self.hooks.append(module.mlp.register_forward_hook(_part_hook(seen, "mlp")))
        return self.seen

    def __exit__(self, *_) -> None:
        for store in self.lean.stores:
            store.witness = None
        for hook in self.hooks:
            hook.remove()


def _layer_hook(seen: Seen):
    def hook(module, args, kwargs, output) -> None:
        seen.enter = (args[0] if args else kwargs["hidden_states"]).clone()
        seen.leave = (output[0] if isinstance(output, tuple) else output).clone()

    return hook


def _part_hook(seen: Seen, name: str):
    def hook(module, args, output) -> None:
        setattr(seen, name, (output[0] if isinstance(output, tuple) else output).clone())

    return hook
