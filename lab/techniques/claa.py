"""CLAA: rank prompt tokens by several layers' attention, and let only the best go deeper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.depth import shallow
from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.techniques.answers import answer_importance
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
        "layers. One layer's ranking is shaky, so CLAA takes the best score a token got in several. Baselines rank by one layer "
        "(FastKV), by raw scores of the last token (GemFilter), or by what a draft answer looks at (speculative prefill; the "
        "draft is the model's own lower layers). Controls: the oracle looks at the model's real answer first, random does "
        "not look. Dropped tokens are gone for later questions."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = (
        "Layers before the cut see and store the whole prompt. Generated tokens pass through all layers. The oracle takes "
        "longer than a dense prompt."
    )

    rate: float = param(0.3, "Share of the prompt that goes on.", min=0.01, max=1)
    at: float = param(0.5, "Depth of the cut, as a share of the layers; of the draft, for speculative.", min=0.05, max=0.99)
    layers: int = param(4, "Layers before the cut whose rankings are combined.", min=1, max=64, unit="layers")
    window: int = param(32, "Last prompt rows whose attention is asked; they always go on.", min=1, max=1024, unit="rows")
    kernel: int = param(7, "Width of the pooling over neighbouring tokens (odd).", min=1, max=63)
    method: str = param("claa", "How tokens are ranked.",
                        choices=("claa", "fastkv", "gemfilter", "speculative", "oracle", "random"))
    heads: str = param("sum", "How the heads of a layer are combined: their sum, or the largest.", choices=("sum", "max"))
    rerun: str = param("auto", "Read the chosen tokens again from the first layer, so that all layers store only them: auto "
                       "does so for gemfilter and speculative, as they do.", choices=("auto", "yes", "no"))
    answer: int = param(8, "Tokens that the draft or the oracle answers with.", min=1, max=256, unit="tokens")

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def again(self) -> bool:
        """Whether the chosen tokens are read from the first layer on."""
        return self.rerun == "yes" or (self.rerun == "auto" and self.method in ("gemfilter", "speculative"))

    def cut(self, layers: int) -> int:
        """The layer before which tokens are ranked."""
        return min(layers - 1, max(1, round(self.at * layers)))

    def depth(self, layers: int) -> int:
        return 0 if self.again else self.cut(layers)

    def asks(self, layer: int, layers: int) -> bool:
        """Whether this layer's attention counts."""
        cut, count = self.cut(layers), self.layers if self.method == "claa" else 1
        return self.method in ("claa", "fastkv", "gemfilter") and cut - count <= layer < cut

    def observe(self, ctx: LayerContext) -> None:
        if ctx.phase != "prefill" or self.rate == 1 or self.again or not self.asks(ctx.layer, ctx.layers):
            return
        ctx.shared.setdefault("claa/scores", []).append(self.rank(ctx))

    def rank(self, ctx: LayerContext) -> torch.Tensor:
        """float32 [N]: this layer's score of every prompt token (of the first sequence)."""
        if self.method == "gemfilter":
            q = ctx.store.queries[:1, :, -1:].unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3)
            raw = (q @ ctx.store.all_keys()[:1].mT).float().flatten(1, 2)
            raw = raw.amax(1) if self.heads == "max" else raw.sum(1)
        else:
            weights = ctx.window_weights(self.window)[0][:1].sum(2)
            raw = weights.amax(1) if self.heads == "max" else weights.sum(1)
            raw[..., max(0, raw.shape[-1] - self.window) :] = 0  # the window itself always goes on
        return pooled(raw.unsqueeze(1), self.kernel)[0, 0]

    def trim(self, policy: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        rows = hidden.shape[1]
        found = policy.shared.pop("claa/scores", None)
        if self.rate == 1 or policy.stores[0].seen != (0 if self.again else rows):
            return None  # a later turn: what it adds is read in full
        scores = torch.stack([x.to(hidden.device) for x in found]).amax(0) if found else self._asked(policy, rows)
        return chosen(scores, self.kept(rows), self.window).to(hidden.device)

    def _asked(self, policy: Any, rows: int) -> torch.Tensor:
        """float32 [N]: scores that are not a by-product of reading the prompt."""
        if self.method == "random":
            return torch.rand(rows, generator=torch.Generator().manual_seed(1000 * policy.seed + 11))
        ids = policy.shared.get("ids")
        if ids is None:
            raise LabError(
                "CLAA reads the prompt's tokens once more for this ranking", "The model is called with input_ids, not embeddings"
            )
        if self.method in ("speculative", "oracle"):
            depth = self.cut(policy.layers) if self.method == "speculative" else None
            found = answer_importance(policy.model, ids[0].tolist(), self.answer, depth)
            return pooled(found.view(1, 1, -1), self.kernel)[0, 0]
        return self._first_reading(policy, ids[:1])

    def _first_reading(self, policy: Any, ids: torch.Tensor) -> torch.Tensor:
        """Ranks of the prompt ids [1, T] read densely up to the cut, into a cache that is then thrown away."""
        from lab.engine.cache import LabCache

        found, reading = [], LabCache(policy.model)

        def probe(ctx: LayerContext, out: torch.Tensor) -> torch.Tensor:
            if self.asks(ctx.layer, ctx.layers):
                ctx.store.queries = ctx.q[:, :, -self.window :]
                found.append(self.rank(ctx))
                ctx.store.queries = None
            return out

        reading.policy.probe = probe
        with shallow(policy.model, self.cut(policy.layers)):
            policy.model.base_model(input_ids=ids, past_key_values=reading, use_cache=True)
        return torch.stack(found).amax(0)

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
