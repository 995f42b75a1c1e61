"""What a stack does to the caches of all layers: budgets and eviction, coding, and the bookkeeping they need."""

from __future__ import annotations

import math

import torch

from lab.engine.attend import Result
from lab.engine.context import LayerContext
from lab.engine.layer import LabLayer
from lab.engine.reads import Paging
from lab.engine.rope import Rope, rope_of
from lab.engine.slots import UNLIMITED, Forward
from lab.engine.stack import Stack
from lab.engine.steady.plan import not_in_place
from lab.engine.tiers import narrow
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
        self.calibration: list[dict[str, torch.Tensor]] = []  # per layer, where a technique of the stack calibrates
        self.selects, self.edits = stack.filling("select"), stack.filling("edit")
        self.choosers = [t for t in self.selects if "decode" in t.select_phases]
        self.routes, self.combine = stack.filling("route"), stack.one("combine")
        self.allocator, self.reducer = stack.one("allocate"), stack.one("reduce")
        self.encoder = stack.one("encode")
        self.scorer, self.weigher = stack.one("score"), stack.one("weigh")
        self.probe = None  # (ctx, out) -> out: what a calibration looks at
        self.movers = [t for t in self.edits if t.moves]
        self.trimmer = stack.one("trim")
        self.enterers = [t for t in stack.techniques if t.enters]
        self.stores: list[LabLayer] = []  # the cache's layers, for techniques that look at several
        self.trimmed: torch.Tensor | None = None  # int64 [T'], the rows of this forward that reached this depth
        self.skipped = 0  # how many did not
        if self.scorer is None and self.allocator is not None:
            self.scorer = self.allocator.default_scorer()
        if self.allocator is None and self.scorer is not None:
            self.allocator = self.scorer.default_allocator()
        if self.encoder is None and self.allocator is not None:
            self.encoder = self.allocator.default_encoder()
        implied = (self.scorer, self.allocator, self.encoder)
        self.members = tuple(dict.fromkeys((*stack.techniques, *(t for t in implied if t is not None))))
        self.observers = [t for t in self.members if hasattr(t, "observe")]
        self.watchers = [t for t in self.members if t.watches]
        self.waits = any(t.whole_cache for t in self.members)
        self.tiered = self.allocator is not None and self.allocator.sets_tiers
        self._contexts: list[LayerContext] = []
        needs = frozenset().union(*(t.needs for t in self.members))
        self.want_mass, self.want_last, self.want_queries = "mass" in needs, "last" in needs, "queries" in needs
        self.want_now, self.want_rope = "now" in needs, "rope" in needs
        self.window_rows = max([t.observation_window for t in self.members], default=0)
        self.bare = not stack.techniques  # dense attention: nothing to ask, nothing to change
        self._ropes: dict[int, Rope] = {}
        self.not_in_place = not_in_place(self)  # why decode steps cannot change the cache in place, or None

    @classmethod
    def dense(cls) -> "Policy":
        return cls(Stack(), 1)

    @property
    def tracks(self) -> bool:
        """Positions stop being a plain range, so they are stored with the entries (rule R1)."""
        return self.scorer is not None or self.tiered or (self.encoder is not None and not self.encoder.keeps_order)

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

    def paging(self, layer: int) -> Paging | None:
        """What decode rows of this layer choose among in place; None where they read everything."""
        return self.choosers[0].paging(layer) if self.choosers else None

    def weigh(self, ctx: LayerContext):
        """The function that turns this step's logits into weights; None for the softmax."""
        return self.weigher.weigh if self.weigher is not None and self.weigher.weighs(ctx) else None

    def wants_mass(self, ctx: LayerContext) -> bool:
        """Whether these rows' attention has to come back per entry."""
        return self.want_mass or (self.want_now and ctx.phase == "decode")

    def early(self, ctx: LayerContext) -> Result | None:
        """An output that stands for this step's attention, where a technique has one; nothing is then read."""
        for technique in self.routes:
            out = technique.replace(ctx)
            if out is not None:
                store = ctx.store
                store.last_read = store.last_probe = 0
                wanted = self.wants_mass(ctx)
                mass = torch.zeros(store.positions().shape, device=out.device) if wanted else None
                last = torch.zeros(*ctx.q.shape[:2], store.longest, device=out.device) if self.want_last else None
                return Result(out, None, mass, last)
        return None

    def check(self, prompt: int) -> None:
        """Refuse a budget that cannot hold what it must protect, before anything runs; cards ask the same before Run.

        Protected entries count against the budget (rule R5), whether it is a count or a share of this prompt: a share that a
        short prompt makes too small is refused too, since keeping more than was asked for would show another setting's figures.
        A budget that holds the whole prompt is never refused. Raises LabError with the numbers.
        """
        total = self.total(prompt)
        if total is None or total >= prompt:
            return
        first, last = self.scorer.protected(total, prompt)
        needed = max(first + last, last + 1 if self.scorer.observation_window else 0)  # witnesses alone would choose nothing
        if total < needed:
            longer = ", or give a longer prompt" if self.total(2 * prompt) > total else ""
            raise LabError(
                f"{self.scorer.title} would keep {total} of {prompt} entries but must protect {first + last} "
                f"({first} first, {last} last)",
                "The budget has to be larger than the entries that are always kept",
                f"Raise the budget to {needed} entries ({math.ceil(100 * needed / prompt) / 100:.2f} of the prompt), "
                f"protect fewer{longer}"
                if needed < prompt
                else "A prompt this short fits whole: give a longer one, lower the protected window, or set budget=1",
                self._remedy(prompt, float(needed) if needed < prompt else 1.0),
            )

    def _remedy(self, prompt: int, budget: float) -> dict | None:
        """The technique among those the user chose whose budget is the one to set."""
        counts = [t for t in (self.allocator, self.scorer) if t is not None and t.budget_entries(prompt) is not None]
        for owner in (*counts, self.allocator):  # an allocator without a budget of its own takes one
            if any(t is owner for t in self.stack.techniques) and any(p.name == "budget" for p in owner.parameters()):
                return {"technique": owner.name, "parameter": "budget", "value": budget}
        return None

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
            if self.watchers or self.waits:
                self._contexts.append(ctx)
            if ctx.phase == "prefill":
                if self.prompt and store.seen < self.prompt:
                    if self.scorer is not None and self.scorer.prompt_block:
                        self._squeeze(ctx)
                    return
                ctx.prompt = self.prompt or store.seen
                if not self.waits:
                    self._finish_prompt(ctx)
                return
            if self.scorer is not None and self.scorer.evicts_in_decode and store.budget is not None:
                self._evict(ctx)
            if self.tiered:
                self._narrow(ctx, self.allocator.tiers(ctx, None, None))
            elif self.encoder is not None:
                self._encode(ctx)

    def forward_done(self, ids: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """Every layer has attended: let techniques look at the whole, and do what waited for it.

        ids int64 [B,T] or None, hidden [B,T,D]: the last hidden states of this forward.
        """
        contexts, self._contexts = self._contexts, []
        if not contexts:
            return
        first = contexts[0]
        complete = first.phase == "prefill" and not (self.prompt and first.store.seen < self.prompt)
        with torch.no_grad():
            for technique in self.watchers:
                technique.watch(Forward(self.model, ids, hidden, contexts, complete))
            if complete and self.waits:
                for ctx in contexts:
                    self._finish_prompt(ctx)

    def _finish_prompt(self, ctx: LayerContext) -> None:
        self._compress_prompt(ctx)
        ctx.store.prompt_done = True
        ctx.store.queries = None
        if self.encoder is not None and not self.tiered:
            self._encode(ctx)
        for technique in self.members:
            technique.forget(ctx)

    def _observe(self, ctx: LayerContext, result) -> None:
        store = ctx.store
        ctx.out, ctx.scorer, ctx.encoder = result.out, self.scorer, self.encoder
        ctx.model, ctx.calibrated = self.model, self.calibrated_for(ctx.layer)
        if self.want_mass:
            store.set_attribute("mass", ctx.mass() + result.mass)
        ctx.last_p = result.last
        ctx.now = result.mass if ctx.phase == "decode" else None
        if ctx.phase == "prefill" and (self.window_rows or self.want_queries):
            rows = ctx.q if store.queries is None else torch.cat([store.queries, ctx.q], 2)
            store.queries = rows if self.want_queries else rows[:, :, -self.window_rows :].clone()
        for technique in self.observers:
            technique.observe(ctx)

    def calibrated_for(self, layer: int) -> dict[str, torch.Tensor]:
        return self.calibration[layer] if self.calibration else {}

    def _squeeze(self, ctx: LayerContext) -> None:
        """Keep a long prompt within its budget while it is still being read, a block at a time."""
        total = self.total(self.prompt)
        if total is not None and ctx.store.longest > total:
            ctx.prompt = self.prompt
            ctx.store.keep(self._chosen(ctx, self.scorer.score(ctx), total), ctx.row)

    def _narrow(self, ctx: LayerContext, bits: torch.Tensor | None) -> None:
        if bits is not None:
            narrow(ctx.store, bits, lambda width: self.encoder.at(width).codecs(ctx), ctx.row)

    def _drop(self, ctx: LayerContext, keep: torch.Tensor, scores: torch.Tensor) -> None:
        """Merge and free the entries that leave, and set the bits of those that stay."""
        bits = self.allocator.tiers(ctx, scores, keep) if self.tiered else None
        if self.reducer is not None:
            self.reducer.reduce(ctx, keep, scores)
        ctx.store.keep(keep, ctx.row)
        if bits is not None:
            order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, : ctx.store.longest]
            self._narrow(ctx, bits.gather(2, order))

    def _compress_prompt(self, ctx: LayerContext) -> None:
        total, store = self.total(ctx.prompt), ctx.store
        if total is None:
            if self.tiered:
                self._narrow(ctx, self.allocator.tiers(ctx, None, None))
            return
        self.check(ctx.prompt)
        longest = store.longest
        scores = self.scorer.score(ctx) if total < longest else None
        budget = self.allocator.allocate(ctx, total, scores) if self.allocator is not None else total
        if isinstance(budget, int) and budget < total:  # an allocation never takes what its scorer protects (rule R5)
            budget = max(budget, min(total, sum(self.scorer.protected(budget, ctx.prompt))))
        store.budget = budget
        if isinstance(budget, int) and budget >= longest:
            if self.tiered:
                self._narrow(ctx, self.allocator.tiers(ctx, scores, None))
            return
        scores = scores if scores is not None else self.scorer.score(ctx)
        self._drop(ctx, self._chosen(ctx, scores, budget), scores)

    def _evict(self, ctx: LayerContext) -> None:
        """Bring every lane back to its budget after a decode step."""
        store, budget = ctx.store, ctx.store.budget
        counts = store.counts
        wanted = [budget] * len(counts) if isinstance(budget, int) else budget.flatten().tolist()
        over = [n - b for n, b in zip(counts, wanted)]
        if max(over) <= 0:
            return
        scores = self.scorer.score(ctx)
        leave = budget
        if self.allocator is not None and isinstance(budget, int):
            leave = self.allocator.leave(ctx, max(counts), budget)
        uneven = min(over) != 1  # heads without a budget, or not yet full
        if leave is not budget and leave != budget or self.tiered or max(over) != 1 or uneven and self.reducer is not None:
            self._drop(ctx, self._chosen(ctx, scores, leave), scores)
            return
        guarded = scores.masked_fill(self._protected(ctx, min(wanted)), torch.inf)
        valid = store.valid()
        if valid is not None:
            guarded = guarded.masked_fill(~valid, torch.inf)
        slot = guarded.shape[-1] - 1 - guarded.flip(-1).argmin(-1)  # of equals, the later one goes (rule R4)
        if self.reducer is not None:
            keep = torch.ones_like(guarded, dtype=torch.bool) if valid is None else valid.clone()
            self.reducer.reduce(ctx, keep.scatter_(2, slot.unsqueeze(-1), False), scores)
        store.drop_one(slot, ctx.row, [i for i, n in enumerate(over) if n == 1] if uneven else None)

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

    def part_exact(self, store: LabLayer) -> None:
        """Give samples their own copies of the exact rows that this stack codes sooner or later."""
        for side in ("key", "value"):
            if self.encoder.due(side, UNLIMITED)[1]:
                store.part_exact(side)

    def _encode(self, ctx: LayerContext) -> None:
        store = ctx.store
        key_codec, value_codec = self.encoder.codecs(ctx)
        first, moved = 0, 0
        for side, codec in (("key", key_codec), ("value", value_codec)):
            lens = store.exact_lens(side)
            dues = [self.encoder.due(side, n) for n in dict.fromkeys(lens)]
            by_length = dict(zip(dict.fromkeys(lens), dues))
            counts = [by_length[n][1] - by_length[n][1] % codec.block for n in lens]
            if max(counts) > 0:
                if store.common is not None:
                    self.part_exact(store)
                first = dues[0][0]
                even = counts.count(counts[0]) == len(counts)
                store.code(side, codec, first, counts[0] if even else counts, ctx.row)
                moved = (counts[0] if even else counts) if first else 0
        if moved:
            store.reorder_after_code(first, moved)
