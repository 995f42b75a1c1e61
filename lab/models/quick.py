"""One-token steps of packed attention blocks and MLPs on the CPU, with a third of the calls.

At this size a decode step spends a tenth of its time between operations: three projections handed out of one product,
queries and keys rotated apart, a cache that returns what it was given. An attention block of the common kind (one product
for q, k and v, plain rotary over the whole head, nothing between the projections and the attention function) is served by
one short function instead, which calls the lab's pipeline directly. Which blocks are of that kind is observed, not known:
one step of the model is recorded, and a block is replaced only where the short way gives the queries, keys, values and
output that were seen, at a near and a far position and on ordinary and very large inputs. Prompts, gradients, other caches,
and blocks whose projections somebody listens to or has replaced take the model's own way.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from lab.engine import attach
from lab.engine.layer import LabLayer
from lab.engine.pipeline import Call, run
from lab.models.packed import FusedLinear, PackedLinear, Siblings

_OBSERVE = "lab-observe"
_TOLERANCE = 1e-5
_LOUD = 1e3  # inputs this much larger than a model's own reach what it clips its numbers at
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class Seen:
    """What one attention block was given and gave during the observed step."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.qkv: tuple[torch.Tensor, ...] = ()
        self.options: dict[str, Any] = {}
        self.inside: torch.Tensor | None = None
        self.output: torch.Tensor | None = None


class Found:
    """Modules as they were found: nobody listens to or stands for one of `heard`, or has replaced a part of `whole`."""

    def __init__(self, heard: list[nn.Module], whole: list[nn.Module]) -> None:
        self._hooks = [hooks for m in heard for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._parts = [(m._modules, dict(m._modules)) for m in whole if m._modules]
        ours = [(m, m.__dict__.get("forward")) for m in heard]
        self._forwards = [(m, own if isinstance(own, (QuickAttention, QuickMLP)) else None) for m, own in ours]

    def still(self) -> bool:
        if any(self._hooks) or every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
            return False
        if any(held != parts for held, parts in self._parts):
            return False
        return all(m.__dict__.get("forward") is own for m, own in self._forwards)


class QuickAttention:
    """The short way of one attention block.

    Attributes:
        linear: the product of q, k and v. turned: how many query and key heads. parts: how many heads are turned, and are not.
    """

    def __init__(self, module: nn.Module, turns: "Turns", options: dict[str, Any]) -> None:
        self.linear: PackedLinear = module.q_proj.siblings.linear
        self.output = module.o_proj
        self.original = module.forward
        self.found = Found([module.q_proj, module.k_proj, module.v_proj], [module])
        self.index, self.width = module.layer_idx, module.head_dim
        widths = module.q_proj.siblings.widths
        queries, keys = widths[0] // self.width, widths[1] // self.width
        self.turned, self.parts = (queries, keys), (queries + keys, keys)
        self.turns = turns
        self.scale, self.window = options["scaling"], options.get("sliding_window")

    def __call__(self, hidden_states=None, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        layer = self._layer(hidden_states, position_embeddings, attention_mask, past_key_values)
        if layer is None:
            return self.original(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs)
        q, k, v = self.qkv(hidden_states.view(hidden_states.shape[0], -1), position_embeddings)
        handle, _ = layer.update(k, v)
        out = run(layer.policy, handle, q, self.call())
        return self.output(out.reshape(hidden_states.shape[0], 1, -1)), None

    def _layer(self, hidden, positions, mask, cache) -> LabLayer | None:
        """The lab's layer when this step may take the short way."""
        if mask is not None or hidden is None or hidden.shape[1] != 1 or positions is None or torch.is_grad_enabled():
            return None
        policy = getattr(cache, "policy", None)
        if policy is None or hidden.dtype != torch.float32 or not self.found.still():
            return None
        layer = cache.layers[self.index]
        return layer if isinstance(layer, LabLayer) else None

    def call(self) -> Call:
        """What the pipeline is told of this block."""
        return Call(self.scale, None, self.window)

    def qkv(self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Rotated q [B,Hq,1,d] and k, and v [B,Hk,1,d], of hidden [B,D]."""
        return self.split(self.linear.rows(hidden), self.turns.of(positions))

    def split(self, rows: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same of the product [B,(Hq+2Hk)*d], with `turning` of the positions."""
        plain, v = rows.view(rows.shape[0], -1, 1, self.width).split(self.parts, 1)
        if rows.shape[0] == 1:
            turned = torch.mm(plain.view(-1, self.width), turn[0]).view(plain.shape)
        else:
            turned = plain @ turn.unsqueeze(1)
        q, k = turned.split(self.turned, 1)
        return q, k, v


def turning(positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rotary embedding of one row's position as a matrix [B or 1, d, d]: heads [..., d] @ matrix are the turned heads.

    A head's rotation is x cos + rotated(x) sin, linear in x, so that one product does in one call what takes five; its other
    terms are products with zeros. positions: cos and sin, each [B or 1, 1, d].
    """
    cos, sin = positions
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return (torch.diag_embed(cos) + torch.diag_embed(signed).roll(-half, -2)).squeeze(1)


class Turns:
    """`turning` of a step's positions, made once for all layers."""

    def __init__(self) -> None:
        self._sin: torch.Tensor | None = None
        self._matrix: torch.Tensor | None = None

    def of(self, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if positions[1] is not self._sin:
            self._sin, self._matrix = positions[1], turning(positions)
        return self._matrix


class QuickMLP:
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, module: nn.Module) -> None:
        self.linear: PackedLinear = module.gate_proj.siblings.linear
        self.down, self.act, self.original = module.down_proj, module.act_fn, module.forward
        self.found = Found([module.gate_proj, module.up_proj], [module])
        self.middle = module.gate_proj.siblings.widths[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 1 or x.dtype != torch.float32 or torch.is_grad_enabled() or not self.found.still():
            return self.original(x)
        rows = self.linear.rows(x.view(x.shape[0], -1))
        return self.down(self.gated(rows).unsqueeze(1))

    def gated(self, rows: torch.Tensor) -> torch.Tensor:
        """act(gate) * up [B,I] of their product [B,2I]."""
        gate, up = rows.split(self.middle, -1)
        return self.act(gate).mul_(up)


@torch.no_grad()
def quicken(model: PreTrainedModel) -> int:
    """Replace the forwards of what qualifies in a packed float32 CPU model, in place; returns how many blocks."""
    attentions = {name: m for name, m in model.named_modules() if _attention_like(m)}
    mlps = {name: m for name, m in model.named_modules() if _mlp_like(m)}
    if not attentions:
        return 0
    far = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rounds = [_observe(model, attentions, mlps, None, 1.0), _observe(model, attentions, mlps, far, _LOUD)]
    turns, replaced = Turns(), 0
    for name, module in attentions.items():
        quick = [_same_attention(module, seen[name], turns) for seen in rounds]
        if all(quick):
            module.forward = quick[0]
            replaced += 1
    for name, module in mlps.items():
        quick, found = QuickMLP(module), [seen[name] for seen in rounds]
        if all(x.output is not None and "x" in x.inputs and _close(quick(x.inputs["x"]), x.output) for x in found):
            module.forward = quick
            replaced += 1
    return replaced


def _siblings(modules: list[nn.Module]) -> Siblings | None:
    """The one product that serves exactly these modules, in this order."""
    if not all(isinstance(m, FusedLinear) for m in modules):
        return None
    first = modules[0].siblings
    same = all(m.siblings is first and m.index == i for i, m in enumerate(modules)) and len(first.widths) == len(modules)
    return first if same and isinstance(first.linear, PackedLinear) else None


def _attention_like(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != _ATTENTION or not isinstance(getattr(module, "layer_idx", None), int):
        return False
    if not isinstance(getattr(module, "head_dim", None), int) or isinstance(module.__dict__.get("forward"), QuickAttention):
        return False
    return _siblings([module.q_proj, module.k_proj, module.v_proj]) is not None


def _mlp_like(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= names or not names <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    return hasattr(module, "act_fn") and _siblings([module.gate_proj, module.up_proj]) is not None


def _observe(
    model: PreTrainedModel, attentions: dict[str, nn.Module], mlps: dict[str, nn.Module], positions: int | None, gain: float
) -> dict[str, Seen]:
    """One decode step after a two-token prompt, recorded under an attention function that answers noise.

    positions: put the step at the last of so many, where a model's forward takes positions. gain: multiplies what enters every
    block.
    """
    seen = {name: Seen() for name in (*attentions, *mlps)}
    by_module = {id(module): seen[name] for name, module in attentions.items()}

    def function(module, query, key, value, attention_mask=None, **options):
        out = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[-1], generator=noise)
        found = by_module.get(id(module))
        if found is not None:
            found.qkv, found.options = (query.clone(), key[:, :, -1:].clone(), value[:, :, -1:].clone()), options
            found.inside = out
        return out, None

    def before(found: Seen):
        def hook(module, args, kwargs):
            if args:
                args = (args[0] * gain, *args[1:])
                found.inputs = {**kwargs, "hidden_states": args[0], "x": args[0]}
            else:
                found.inputs = kwargs = {name: x * gain if name in ("hidden_states", "x") else x for name, x in kwargs.items()}
            return args, kwargs
        return hook

    def after(found: Seen):
        def hook(module, args, output):
            found.output = output[0] if isinstance(output, tuple) else output
        return hook

    noise = torch.Generator().manual_seed(0)
    AttentionInterface.register(_OBSERVE, function)
    attach.AttentionMaskInterface.register(_OBSERVE, attach.mask)
    hooks = []
    for name, module in (*attentions.items(), *mlps.items()):
        hooks += [module.register_forward_pre_hook(before(seen[name]), with_kwargs=True),
                  module.register_forward_hook(after(seen[name]))]
    previous = model.config._attn_implementation
    try:
        model.set_attn_implementation(_OBSERVE)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True)
        takes = positions is not None and "position_ids" in inspect.signature(model.forward).parameters
        where = {"position_ids": torch.tensor([[positions - 1]])} if takes else {}
        model(torch.tensor([[3]]), past_key_values=cache, use_cache=True, **where)
    finally:
        model.set_attn_implementation(previous)
        for hook in hooks:
            hook.remove()
    return seen


def _same_attention(module: nn.Module, seen: Seen, turns: Turns) -> QuickAttention | None:
    """The short way of `module` where it gives what was seen, else None."""
    known = {"scaling", "dropout", "sliding_window", "softcap", "s_aux", "position_ids", "cache_position", "use_cache",
             "is_causal", "output_attentions"}
    options, positions = seen.options, seen.inputs.get("position_embeddings")
    if not seen.qkv or seen.output is None or not isinstance(positions, tuple) or len(positions) != 2:
        return None
    odd = [k for k, v in options.items() if v is not None and (k in ("softcap", "s_aux") or k not in known)]
    hidden = seen.inputs.get("hidden_states")
    if odd or hidden is None or options.get("scaling") is None or positions[0].shape[-1] != module.head_dim:
        return None
    quick = QuickAttention(module, turns, options)
    mine = quick.qkv(hidden.view(hidden.shape[0], -1), positions)
    if any(a.shape != b.shape or not _close(a, b) for a, b in zip(mine, seen.qkv)):
        return None
    out = quick.output(seen.inside.reshape(hidden.shape[0], 1, -1))
    return quick if _close(out, seen.output) else None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp_min(1e-30))
