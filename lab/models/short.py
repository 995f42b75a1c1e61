"""A decode step of a quick model without the modules around its blocks.

Between its blocks a transformers model hands keyword arguments down, builds masks that one row does not need, and calls
eight modules a layer: a tenth of a small model's step on a CPU. Where every attention block and MLP of a model has its
short way (`quick`) and its layers are put together as Llama's are, a step of one row runs here instead: embedding, then per
layer norm, attention through the lab's pipeline, sum, norm, MLP, sum, and the head. Whether a model is of that kind is
checked when it is loaded: the short step must give the logits of the model's own.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from lab.engine.cache import LabCache
from lab.engine.handle import Handle
from lab.engine.layer import LabLayer
from lab.engine.pipeline import dense_fits, dense_row, run
from lab.engine.policy import Policy
from lab.models.norms import FastRMSNorm
from lab.models.packed import PackedLinear
from lab.models.quick import Found, QuickAttention, QuickMLP, turning

_TOLERANCE = 1e-5
_PROMPT = (1, 2, 3)


class _Block:
    """One decoder layer: its norms, its four products and its attention block's short way."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn.forward, layer.mlp.forward
        self.enter, self.middle = layer.input_layernorm.rows, layer.post_attention_layernorm.rows
        self.qkv, self.out = attention.linear.rows_of(), attention.output.rows_of()
        self.gate_up, self.down = mlp.linear.rows_of(), mlp.down.rows_of()
        self.attention, self.split, self.scale, self.gated = attention, attention.split, attention.scale, mlp.gated

    def step(self, x: torch.Tensor, turn: torch.Tensor, layer: LabLayer, policy: Policy | None) -> torch.Tensor:
        """x [B,D] -> [B,D]; the layer's new keys and values are stored. Without a policy the layer is one that `dense_fits`."""
        q, k, v = self.split(self.qkv(self.enter(x)), turn)
        if policy is None:
            out = dense_row(layer, q, k, v, self.scale)
        else:
            out = run(policy, Handle(layer, k, v), q, self.attention.call())
        x = x + self.out(out.reshape(x.shape[0], -1))
        return x + self.down(self.gated(self.gate_up(self.middle(x))))


class ShortStep:
    """One-row steps of a packed float32 CPU model; ``None`` where the model's own forward has to run.

    The model keeps it as ``lab_short``, where ``lab.engine.session`` finds it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base = model.base_model
        self.model, self.base, self.head = model, base, model.get_output_embeddings()
        self.blocks, self.last = [_Block(layer) for layer in base.layers], base.norm.rows
        self.own = [base, *base.layers]  # where the lab's own hooks may be: `attach`, `depth.install`
        every = list(model.modules())
        self.found = Found([m for m in every if m not in self.own], every)
        self.empty = [layer._forward_hooks for layer in base.layers]
        self.few = [m._forward_pre_hooks for m in self.own]

    def __call__(self, ids: torch.Tensor, cache: LabCache) -> torch.Tensor | None:
        """ids int64 [B,1] -> logits float32 [B,V], the new keys and values stored; None, and nothing done, where a technique
        looks at hidden states, somebody has hung a hook on a module or replaced one, or a layer is not the lab's."""
        policy, layers = cache.policy, cache.layers
        if policy.enterers or policy.trimmer is not None or len(layers) != len(self.blocks) or self._changed():
            return None
        if not all(isinstance(layer, LabLayer) and layer.is_initialized for layer in layers):
            return None
        x = self.base.embed_tokens(ids)
        if x.dtype != torch.float32:  # the model was cast after it was loaded
            return None
        positions = self.base.rotary_emb(x, torch.full((1, 1), layers[0].seen))
        x, turn = x.view(len(ids), -1), turning(positions)
        dense = policy.bare and policy.probe is None and all(dense_fits(layer) for layer in layers)
        for block, layer in zip(self.blocks, layers):
            x = block.step(x, turn, layer, None if dense else policy)
        x = self.last(x)
        if policy.watchers or policy.waits:
            policy.forward_done(ids, x.view(len(ids), 1, -1))
        return self.head(x).float()

    def _changed(self) -> bool:
        """Whether anything but the lab itself listens to a module, or something stands for one that did not at first."""
        own = 1 if getattr(self.model, "_lab_depth", False) else 0
        if any(self.empty) or len(self.base._forward_hooks) > 1 or any(len(hooks) > own for hooks in self.few):
            return True
        return any("forward" in m.__dict__ for m in self.own) or not self.found.still()


@torch.no_grad()
def shorten(model: PreTrainedModel) -> bool:
    """Give `model` its short step where it is of that kind and the step gives the model's own logits."""
    model.lab_short = None
    base = model.base_model
    if {name for name, _ in base.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    if not all(_served(layer) for layer in base.layers) or not isinstance(base.norm, FastRMSNorm):
        return False
    short = ShortStep(model)
    with torch.inference_mode():
        ours, theirs = LabCache(model), LabCache(model)
        for cache in (ours, theirs):
            model(torch.tensor([_PROMPT]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for token in (4, 5):
            row = torch.tensor([[token]])
            got = short(row, ours)
            want = model(row, past_key_values=theirs, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            if got is None or got.shape != want.shape or not bool((got - want).abs().max() <= _TOLERANCE * want.abs().max()):
                return False
    model.lab_short = short
    return True


def _served(layer: nn.Module) -> bool:
    names = {name for name, _ in layer.named_children()}
    if names != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn.__dict__.get("forward"), layer.mlp.__dict__.get("forward")
    if not isinstance(attention, QuickAttention) or not isinstance(mlp, QuickMLP):
        return False
    plain = isinstance(attention.output, PackedLinear) and isinstance(mlp.down, PackedLinear)
    return plain and isinstance(layer.input_layernorm, FastRMSNorm) and isinstance(layer.post_attention_layernorm, FastRMSNorm)
