"""ARKV: three states per entry, original, quantised, evicted, in shares that each layer decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.segments import Exact
from lab.engine.slots import Forward, Paper, Technique, param
from lab.techniques.arkv_score import ArkvScore
from lab.techniques.fp8 import Fp8
from lab.techniques.shares import SHARED_BUDGET_HELP, share_budget

TUNED = (7.77, 5.41, 5.53)
TUNED_GAMMA = 263.8
KEPT = 0.75  # share of the past that survives an overflow while decoding


@dataclass(frozen=True)
class Arkv(Technique):
    """Original, quantised or evicted: layer statistics decide how many entries stay original (arXiv 2603.08727)."""

    name: ClassVar[str] = "arkv"
    title: ClassVar[str] = "ARKV"
    paper: ClassVar[Paper] = Paper("ARKV: Adaptive and Resource-Efficient KV Cache Management", "2603.08727", 2026)
    slots: ClassVar[tuple[str, ...]] = ("observe", "allocate")
    help: ClassVar[str] = (
        "Every stored entry is original, quantised or gone. Layers whose attention is spread out, uneven in time and spiky "
        "keep more originals. After the prompt the best entries stay; whenever decoding exceeds the budget, a quarter of the "
        "past is dropped and most of the rest is quantised. It ranks with its own score and 8-bit floats unless the stack "
        "names others. The claim is about 97% of the quality at a quarter of the memory; test it against integer codes."
    )
    does_not_save: ClassVar[str] = (
        "Until the budget is exceeded nothing is quantised, and the whole prompt is held until it ends."
    )
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    sets_tiers: ClassVar[bool] = True

    budget: float = param(0, SHARED_BUDGET_HELP, min=0, max=1_000_000)
    window: int = param(32, "Recent tokens that stay original, and prompt rows whose attention is measured.", min=1, max=1024,
                        unit="tokens")
    tuned: bool = param(False, "The paper's tuned constants: tau 7.77, 5.41, 5.53 and gamma 263.8 instead of 1, 1, 1 and 200.")
    tau1: float = param(1.0, "Temper of the entropy: larger counts less.", min=0.1, max=100)
    tau2: float = param(1.0, "Temper of the variance over rows: larger counts less.", min=0.1, max=100)
    tau3: float = param(1.0, "Temper of the spikiness over rows: larger counts less.", min=0.1, max=100)

    @property
    def observation_window(self) -> int:
        return self.window

    def budget_entries(self, prompt: int) -> int | None:
        return share_budget(self, prompt)

    def default_scorer(self) -> Technique:
        more = {"gamma": TUNED_GAMMA} if self.tuned else {}
        return ArkvScore(budget=self.budget or 0.25, window=self.window, **more)

    def default_encoder(self) -> Technique:
        return Fp8()

    def watch(self, step: Forward) -> None:
        if not step.complete:
            return
        ratios = self.ratios(torch.stack([self.quality(ctx).to(step.hidden.device) for ctx in step.contexts]))
        for ctx, ratio in zip(step.contexts, ratios):
            ctx.state["arkv_ratio"] = ratio.to(ctx.store.device)

    def quality(self, ctx: LayerContext) -> torch.Tensor:
        """log OQ of one layer, float32 [B]: entropy, variance and kurtosis over rows of the window's view of the past."""
        weights = ctx.window_weights(self.window)[0]
        w = weights.shape[2]
        past = (ctx.positions() <= ctx.newest - w).repeat_interleave(ctx.groups, 1).unsqueeze(2)
        a = (weights * past).double()
        entropy = -(a * a.clamp_min(1e-30).log()).sum((1, 2, 3))
        centred = a - a.mean(2, keepdim=True)
        m2 = centred.square().mean(2)
        spiky = torch.where(m2 > 1e-24, centred.pow(4).mean(2) / m2.square().clamp_min(1e-48), 0.0)
        parts = (entropy, m2.sum((1, 2)), spiky.sum((1, 2)))
        taus = TUNED if self.tuned else (self.tau1, self.tau2, self.tau3)
        return sum(x.clamp_min(1e-30).log() / tau for x, tau in zip(parts, taus)).float()

    @staticmethod
    def ratios(log_quality: torch.Tensor) -> torch.Tensor:
        """OQ over its maximum over layers, [L,B] from log OQ [L,B]; the largest is exactly 1."""
        return torch.exp(log_quality - log_quality.amax(0, keepdim=True))

    def widths(self, encoder: Technique) -> tuple[int, ...]:
        return (getattr(encoder, "bits", 8),)

    def leave(self, ctx: LayerContext, entries: int, budget: int) -> int:
        """An overflow drops a quarter of the past at once, so that the next steps are free."""
        past = max(0, entries - self.window)
        return min(budget, self.window + int(KEPT * past))

    def tiers(
        self, ctx: LayerContext, scores: torch.Tensor | None, keep: torch.Tensor | None
    ) -> torch.Tensor | None:
        if keep is None or (ctx.phase == "prefill" and ctx.scorer.evicts_in_decode):
            return None  # a score that cannot work while decoding splits once, after the prompt
        recent = ctx.positions() > ctx.newest - self.window
        budget = ctx.store.budget
        mean = budget if isinstance(budget, int) else int(budget.float().mean())
        origin = torch.round(ctx.state["arkv_ratio"] * max(0, mean - self.window)).long().view(-1, 1, 1)
        originals = (origin - self.window).clamp_min(0) if ctx.phase == "decode" else origin
        ranked = scores.float().masked_fill(~keep | recent, -torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(2, order, place)
        narrow = keep & ~recent & (rank >= originals)
        return torch.where(narrow, self._width(ctx), Exact.bits)

    @staticmethod
    def _width(ctx: LayerContext) -> int:
        return ctx.encoder.codecs(ctx)[0].bits
