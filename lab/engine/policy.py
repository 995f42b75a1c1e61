"""What a stack does to the caches of all layers: budgets and eviction, coding, and the bookkeeping they need."""

from __future__ import annotations

import torch

from lab.engine.context import LayerContext
from lab.engine.layer import LabLayer
from lab.engine.rope import Rope, rope_of
from lab.engine.stack import Stack
from lab.errors import LabError


class Policy:
    """The live counterpart of a stack for one cache. Holds no tensors of its own beside what techniques share.

    prompt is the announced prompt length, or 0 when a script feeds the model itself; then every call of more than one
    row counts as a whole prompt.
    """

    def __init__(
        self, stack: Stack, layers: int, model: torch.nn.Module | None = None, *, prompt: int = 0, seed: int = 0,
        record: bool = False,
    ) -> None:
        self.stack, self.layers, self.model = stack, layers, model
        self.prompt, self.seed, self.record = prompt, seed, record
        self.shared: dict = {}
        self.selects, self.edits = stack.filling("select"), stack.filling("edit")
        self.routes, self.combine = stack.filling("route"), stack.one("combine")
        self.allocator, self.reducer = stack.one("allocate"), stack.one("reduce")
        self.encoder = stack.one("encode")
        self.scorer = stack.one("score")
        if self.scorer is None and self.allocator is not None:
            self.scorer = self.allocator.default_scorer()
        needs = frozenset().union(*(t.needs for t in stack.techniques), self.scorer.needs if self.scorer else ())
        self.want_mass, self.want_last, self.want_queries = "mass" in needs, "last" in needs, "queries" in needs
        self.want_rope = "rope" in needs
        self.window_rows = max([t.observation_window for t in (*stack.techniques, *filter(None, [self.scorer]))], default=0)
        self._ropes: dict[int, Rope] = {}

    @classmethod
    def dense(cls) -> "Policy":
        return cls(Stack(), 1)

    @property
    def tracks(self) -> bool:
        """Positions stop being a plain range, so they are stored with the entries (rule R1)."""
        return self.scorer is not None or (self.encoder is not None and not self.encoder.keeps_order)

    @property
    def slack(self) -> int:
        """Entries per lane worth allocating beyond what eviction leaves: one where each step evicts one."""
        return 1 if self.scorer is not None and self.scorer.evicts_in_decode else 32

    def rope(self, layer: int) -> Rope | None:
        if not self.want_rope or self.model is None:
            return None
        if layer not in self._ropes:
            self._ropes[layer] = rope_of(self.model, layer)
        return self._ropes[layer]

    def phase(self, store: LabLayer, rows: int) -> str:
        """Rows belong to the prompt until it is complete; a later call of several rows is a new turn's prompt."""
        return "prefill" if rows > 1 or not store.prompt_done else "decode"

    def check(self, prompt: int) -> None:
        """Refuse a budget that cannot hold what it must protect, before anything runs.

        Raises LabError with the numbers.
        """
        total = self.total(prompt)
        if total is None or total >= prompt:
            return
        first, last = self.scorer.protected(total, prompt)
        if first + last > total or (last >= total and self.scorer.observation_window):
            raise LabError(
                f"{self.scorer.title} would keep {total} of {prompt} entries but must protect {first + last} "
                f"({first} first, {last} last)",
                "The budget has to be larger than the entries that are always kept",
                f"Raise the budget above {(first + last) / prompt:.2f} or lower the protected window",
            )

    def total(self, prompt: int) -> int | None:
        """Mean entries per layer and head that score and allocate aim at; None when nothing is evicted."""
        if self.scorer is None:
            return None
        own = self.allocator.budget_entries(prompt) if self.allocator is not None else None
        return own if own is not None else self.scorer.budget_entries(prompt)

    # -- after attending ---------------------------------------------------------------------------------------
    def after(self, ctx: LayerContext, result) -> None:
        """Observe, then set the dial of this layer: score, allocate, reduce, encode."""
        store = ctx.store
        with torch.no_grad():
            self._observe(ctx, result)
            if ctx.phase == "prefill":
                if self.prompt and store.seen < self.prompt:
                    return
                ctx.prompt = self.prompt or store.seen
                self._compress_prompt(ctx)
                store.prompt_done = True
                store.queries = None
            elif self.scorer is not None and self.scorer.evicts_in_decode and store.budget is not None:
                self._evict(ctx)
            if self.encoder is not None:
                self._encode(ctx)

    def _observe(self, ctx: LayerContext, result) -> None:
        store = ctx.store
        if self.want_mass:
            store.set_attribute("mass", ctx.mass() + result.mass)
        ctx.last_p = result.last
        if ctx.phase == "prefill" and (self.window_rows or self.want_queries):
            rows = ctx.q if store.queries is None else torch.cat([store.queries, ctx.q], 2)
            store.queries = rows if self.want_queries else rows[:, :, -self.window_rows :].clone()
        for technique in self.stack.filling("observe"):
            observe = getattr(technique, "observe", None)
            if observe is not None:
                observe(ctx)

    def _compress_prompt(self, ctx: LayerContext) -> None:
        total = self.total(ctx.prompt)
        if total is None:
            return
        store = ctx.store
        self.check(ctx.prompt)
        longest = store.longest
        scores = self.scorer.score(ctx) if total < longest or self.allocator is not None else None
        budget = self.allocator.allocate(ctx, total, scores) if self.allocator is not None else total
        if isinstance(budget, int) and budget < total:  # an allocation never takes what its scorer protects (rule R5)
            budget = max(budget, min(total, sum(self.scorer.protected(budget, ctx.prompt))))
        store.budget = budget
        if isinstance(budget, int) and budget >= longest:
            return
        keep = self._chosen(ctx, scores if scores is not None else self.scorer.score(ctx), budget)
        if self.reducer is not None:
            self.reducer.reduce(ctx, keep, scores)
        store.keep(keep, ctx.row)

    def _evict(self, ctx: LayerContext) -> None:
        store = ctx.store
        counts, budget = store.counts, store.budget
        over = max(counts) - budget if isinstance(budget, int) else max(
            n - b for n, b in zip(counts, budget.flatten().tolist())
        )
        if over <= 0:
            return
        scores = self.scorer.score(ctx)
        if over == 1 and isinstance(budget, int) and self.reducer is None and counts.count(counts[0]) == len(counts):
            guarded = scores.masked_fill(self._protected(ctx, budget), torch.inf)
            slot = guarded.shape[-1] - 1 - guarded.flip(-1).argmin(-1)  # of equals, the later one goes (rule R4)
            store.drop_one(slot, ctx.row)
            return
        keep = self._chosen(ctx, scores, budget)
        if self.reducer is not None:
            self.reducer.reduce(ctx, keep, scores)
        store.keep(keep, ctx.row)

    def _protected(self, ctx: LayerContext, budget: int) -> torch.Tensor:
        """bool [B, Hk, N] of the entries that always stay (rule R5)."""
        first, last = self.scorer.protected(budget, ctx.prompt)
        pos = ctx.positions()
        return (pos < first) | (pos > ctx.newest - last)

    def _chosen(self, ctx: LayerContext, scores: torch.Tensor, budget: int | torch.Tensor) -> torch.Tensor:
        """Protected entries and the best of the rest, bool [B, Hk, N], `budget` of them per lane."""
        store = ctx.store
        size = budget if isinstance(budget, int) else int(budget.min())
        ranked = scores.float().masked_fill(self._protected(ctx, size), torch.inf)
        valid = store.valid()
        if valid is not None:
            ranked = ranked.masked_fill(~valid, -torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(2, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        limit = budget if isinstance(budget, int) else budget.to(order.device).unsqueeze(-1)
        keep = rank < limit
        return keep if valid is None else keep & valid

    def _encode(self, ctx: LayerContext) -> None:
        store = ctx.store
        key_codec, value_codec = self.encoder.codecs(ctx)
        moved = 0
        for side, codec, segment in (("key", key_codec, store.exact_k), ("value", value_codec, store.exact_v)):
            first, count = self.encoder.due(side, min(segment.rows.lens))
            count -= count % codec.block
            if count > 0:
                store.code(side, codec, first, count, ctx.row)
                moved = count if first else 0
        if moved:
            store.reorder_after_code(first, moved)
