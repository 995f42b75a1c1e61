"""CLAA: rank prompt tokens by several layers' attention, and let only the best go deeper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import Paper, Technique, param
from lab.techniques.snapkv import pooled


@dataclass(frozen=True)
class CLAA(Technique):
    """Cross-layer attention aggregation for prompt token dropping, with its single-layer baselines (arXiv 2602.16054)."""

    name: ClassVar[str] = "claa"
    title: ClassVar[str] = "CLAA"
    paper: ClassVar[Paper] = Paper("CLAA: Cross-Layer Attention Aggregation for Accelerating LLM Prefill", "2602.16054", 2026)
    slots: ClassVar[tuple[str, ...]] = ("trim", "observe")
    help: ClassVar[str] = (
        "After some layers, the attention of the last tokens shows which prompt tokens matter; only those go on to deeper "
        "layers. One layer's ranking is shaky, so CLAA takes the best score a token got in several. The baselines rank by "
        "one layer (FastKV), by raw scores of the last token (GemFilter), or not at all (random). Dropped tokens are gone "
        "for later questions, in the deeper layers."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = (
        "Layers before the cut see and store the whole prompt. Generated tokens pass through all "
        "layers."
    )

    rate: float = param(0.3, "Share of the prompt that goes on.", min=0.01, max=1)
    at: float = param(0.5, "Depth of the cut, as a share of the layers.", min=0.05, max=0.99)
    layers: int = param(4, "Layers before the cut whose rankings are combined.", min=1, max=64, unit="layers")
    window: int = param(32, "Last prompt rows whose attention is asked; they always go on.", min=1, max=1024, unit="rows")
    kernel: int = param(7, "Width of the pooling over neighbouring tokens (odd).", min=1, max=63)
    method: str = param("claa", "How tokens are ranked.", choices=("claa", "fastkv", "gemfilter", "random"))

    @property
    def observation_window(self) -> int:
        return self.window

    def depth(self, layers: int) -> int:
        return min(layers - 1, max(1, round(self.at * layers)))

    def observe(self, ctx: LayerContext) -> None:
        count = self.layers if self.method == "claa" else 1
        cut = self.depth(ctx.layers)
        if ctx.phase != "prefill" or self.rate == 1 or not cut - count <= ctx.layer < cut or self.method == "random":
            return
        if ctx.layer == max(0, cut - count):
            ctx.shared["claa/scores"] = []
        ctx.shared["claa/scores"].append(self.rank(ctx))

    def rank(self, ctx: LayerContext) -> torch.Tensor:
        """float32 [N]: this layer's score of every prompt token (of the first sequence)."""
        if self.method == "gemfilter":
            q = ctx.store.queries[:1, :, -1:].unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3)
            raw = (q @ ctx.store.all_keys()[:1].mT).float().sum((1, 2))
        else:
            raw = ctx.window_weights(self.window)[0][:1].sum((1, 2))
            raw[..., max(0, raw.shape[-1] - self.window) :] = 0  # the window itself always goes on
        return pooled(raw.unsqueeze(1), self.kernel)[0, 0]

    def trim(self, policy: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        rows = hidden.shape[1]
        scores = policy.shared.pop("claa/scores", None)
        if self.rate == 1 or (scores is None and self.method != "random") or policy.stores[0].seen != rows:
            return None
        if self.method == "random":
            total = torch.rand(rows, generator=torch.Generator().manual_seed(1000 * policy.seed + 11))
        else:
            total = torch.stack(scores).amax(0)
        return chosen(total, self.kept(rows), self.window).to(hidden.device)

    def kept(self, prompt: int) -> int:
        return min(prompt, max(self.window + 1, round(self.rate * prompt)))

    def planned_rows(self, prompt: int, layer: int, layers: int) -> int:
        return self.kept(prompt) if layer >= self.depth(layers) and self.rate < 1 else prompt


def chosen(scores: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """Ascending positions of the `count` best of scores [N]; token 0 and the last `window` always belong to them."""
    ranked = scores.clone().float()
    ranked[0] = torch.inf
    ranked[max(0, len(ranked) - window) :] = torch.inf
    return ranked.argsort(descending=True, stable=True)[:count].sort().values
