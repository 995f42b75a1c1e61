"""Massive activations: intervene on the huge hidden values behind the sink, or keep the sink as a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kernels.cpu_attention import softmax
from lab.engine.context import LayerContext
from lab.engine.reads import Place, Weighed
from lab.engine.slots import Paper, Technique, param


@dataclass(frozen=True)
class MassiveActivations(Technique):
    """Zero or fix massive activations at the layer where they appear, or add a KV bias (arXiv 2503.22329)."""

    name: ClassVar[str] = "massive_activations"
    title: ClassVar[str] = "Massive activations"
    paper: ClassVar[Paper] = Paper("A Refined Analysis of Massive Activations in LLMs", "2503.22329", 2025)
    slots: ClassVar[tuple[str, ...]] = ("edit", "weigh", "calibrate")
    help: ClassVar[str] = (
        "A few hidden values, thousands of times larger than the rest, sit at the first token and make it the attention "
        "sink. Set them to zero or to their usual value where they first appear and watch what breaks. The KV bias puts "
        "the sink's usual key and value into every softmax, so that the first token may leave the cache."
    )
    saves: ClassVar[str] = "nothing"
    does_not_save: ClassVar[str] = (
        "An experiment on what sinks are for; with the KV bias, an eviction technique may drop the first "
        "token."
    )
    enters: ClassVar[bool] = True

    mode: str = param("zero", "zero or mean: overwrite massive values with 0 or their calibrated mean. bias: add the sink's "
                      "calibrated key and value to every softmax.", choices=("zero", "mean", "bias"))
    threshold: float = param(100.0, "A value is massive when it is larger than this ...", min=0, max=1e9)
    ratio: float = param(1000.0, "... and than this many times the median magnitude of the layer.", min=1, max=1e9)
    calibration: str = param("auto", "Calibration file for mean and bias; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.mode != "zero"

    def enter(self, policy: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Overwrite the spikes the first time a forward meets them; above that layer they are the model's own."""
        if self.mode == "bias" or hidden.shape[1] < 2:
            return hidden
        if layer == 0:
            policy.shared["massive/met"] = False
        if policy.shared["massive/met"]:
            return hidden
        found = massive(hidden, self.threshold, self.ratio)
        if not bool(found.any()):
            return hidden
        policy.shared["massive/met"] = True
        if self.mode == "zero":
            return hidden.masked_fill(found, 0)
        usual = policy.shared[f"learnt/{self.name}"]["hidden"][layer].to(hidden)
        return torch.where(found, usual, hidden)

    def weighs(self, ctx: LayerContext) -> bool:
        return self.mode == "bias"

    def weigh(self, ctx: LayerContext, s: torch.Tensor, place: Place) -> Weighed:
        """Softmax with one more key and value per head; while token 0 itself is stored it stands for them."""
        learnt = ctx.learnt(self)
        key, value = (learnt[n][ctx.layer].to(ctx.q) for n in ("key", "value"))  # [Hk, d]
        q = ctx.q[:, :, place.row : place.row + s.shape[3]].unflatten(1, (ctx.kv_heads, ctx.groups))
        bias = (q @ key[None, :, None, :, None]).squeeze(-1).float() * ctx.scale
        present = (place.pos == 0).any(-1)[:, :, None, None]
        bias = bias.masked_fill(present, -torch.inf)
        p, lse = softmax(s)
        total = torch.logaddexp(lse, bias)
        share = torch.exp(bias - total)
        p = p * torch.exp(lse - total).unsqueeze(-1)
        return Weighed(p, total, (share.unsqueeze(-1) * value[None, :, None, None]).to(ctx.q.dtype))


def massive(hidden: torch.Tensor, threshold: float = 100.0, ratio: float = 1000.0) -> torch.Tensor:
    """bool [B,T,D]: |x| > threshold and |x| > ratio times the median |x| of the layer."""
    size = hidden.abs().float()
    return (size > threshold) & (size > ratio * size.flatten(1).median(-1).values.view(-1, 1, 1))
