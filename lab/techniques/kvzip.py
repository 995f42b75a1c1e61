"""KVzip: keep what the model reads when it is asked to repeat its context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lab.engine.context import LayerContext
from lab.engine.slots import BUDGET_HELP, Forward, Paper, Technique, param
from lab.errors import LabError
from lab.techniques.global_top import GlobalTop

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8  # last tokens of the previous chunk that lead into the next one
ROWS = 128  # query rows whose weights exist at once


@dataclass(frozen=True)
class KVzip(Technique):
    """Score = largest attention any row of a repetition of the context pays to an entry (arXiv 2505.23416)."""

    name: ClassVar[str] = "kvzip"
    title: ClassVar[str] = "KVzip"
    paper: ClassVar[Paper] = Paper("KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", "2505.23416", 2025)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = (
        "After the prompt, the model is asked to repeat it, and every stored entry is scored by the strongest attention it "
        "receives while the text is fed once more. What is never read can go. The score does not depend on any question, so "
        "one compressed cache serves many. It keeps the best over all layers and heads together, or per layer."
    )
    does_not_save: ClassVar[str] = (
        "Reading the prompt costs two to three times as much, the whole cache is held until then, and new tokens are all kept."
    )
    watches: ClassVar[bool] = True
    whole_cache: ClassVar[bool] = True

    budget: float = param(0.3, BUDGET_HELP, min=0.001, max=1_000_000)
    sinks: int = param(4, "First tokens that always stay.", min=0, max=1024, unit="tokens")
    chunk: int = param(2048, "Prompt tokens repeated at a time.", min=16, max=65536, unit="tokens")
    scope: str = param("global", "Rank entries over all layers and heads, or give every layer the same number.",
                       choices=("global", "layer"))

    def protected(self, entries: int, prompt: int) -> tuple[int, int]:
        return self.sinks, 0

    def default_allocator(self) -> Technique | None:
        return GlobalTop(budget=self.budget) if self.scope == "global" else None

    def watch(self, step: Forward) -> None:
        first = step.contexts[0]
        if first.phase != "prefill" or self.budget == 1:
            return
        if step.ids is None:
            raise LabError("KVzip repeats the prompt and needs its tokens", "The model is called with input_ids, not embeddings")
        had = first.state.get("kvzip_ids")
        ids = step.ids if had is None else torch.cat([had, step.ids], 1)
        first.state["kvzip_ids"] = ids
        if step.complete:
            del first.state["kvzip_ids"]
            for ctx, scores in zip(step.contexts, self.reconstruct(step.model, step.contexts, ids)):
                ctx.state["kvzip"] = scores

    def forget(self, ctx: LayerContext) -> None:
        ctx.state.pop("kvzip", None)

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return ctx.state["kvzip"]

    def reconstruct(self, model: torch.nn.Module, contexts: list[LayerContext], ids: torch.Tensor) -> list[torch.Tensor]:
        """Score the entries of the prompt `ids` [B,T] that has just been read: one float32 [B,Hk,N] per layer.

        Entries of earlier turns, and the sinks, score 1. The caches in `contexts` are read, never changed.
        """
        from lab.engine.cache import LabCache

        if any("pad" in ctx.state for ctx in contexts):
            raise LabError("KVzip cannot repeat prompts of different lengths at once", "All prompts of a batch have one length")
        seen, count = contexts[0].store.seen, ids.shape[1]
        scores = [torch.ones(ctx.store.batch, ctx.kv_heads, ctx.store.longest, device=ctx.store.device) for ctx in contexts]
        for at in range(0, count, self.chunk):
            end = min(count, at + self.chunk)
            fed = torch.cat([*self._asking(model, ids, at), ids[:, at:end]], 1)
            replay, taps = LabCache(model), []
            if len(replay.lab_layers) != len(replay.layers):
                raise LabError("KVzip repeats the prompt through attention only", "Models without linear-attention layers work")
            for layer, ctx in zip(replay.lab_layers, contexts):
                taps.append(_Peak(ctx, seen - count + at, seen - count + end, self.sinks))
                taps[-1].fill(layer)
            model.base_model(input_ids=fed, past_key_values=replay, use_cache=True)
            for tap, out in zip(taps, scores):
                tap.write(out)
        return scores

    def _asking(self, model: torch.nn.Module, ids: torch.Tensor, at: int) -> list[torch.Tensor]:
        """The instruction before a chunk. A model whose tokenizer is not known is fed the text alone."""
        tokenizer = getattr(model, "lab_tokenizer", None)
        parts = []
        if tokenizer is not None:
            words = tokenizer(FIRST if at == 0 else LATER, add_special_tokens=False)["input_ids"]
            parts.append(torch.tensor([words], device=ids.device).expand(ids.shape[0], -1))
        return parts + ([ids[:, max(0, at - OVERLAP) : at]] if at else [])


class _Peak:
    """A tap on one layer of the replay: the largest weight each entry of the chunk receives."""

    def __init__(self, ctx: LayerContext, first: int, end: int, sinks: int) -> None:
        store, valid = ctx.store, ctx.store.valid()
        pos = ctx.positions() if valid is None else ctx.positions().masked_fill(~valid, torch.iinfo(torch.int64).max)
        order = pos.argsort(dim=-1)  # heads may hold different entries of earlier turns; this turn's are everyone's last
        ends = torch.tensor(store.counts, device=pos.device).view(store.batch, store.heads, 1) - (store.seen - first)
        self.source, self.sinks = ctx, sinks
        self.chunk = order.gather(2, ends + torch.arange(end - first, device=pos.device))
        self.skip = min(sinks, first)
        self.index = torch.cat([order[:, :, : self.skip], self.chunk], 2)
        self.best: torch.Tensor | None = None

    def fill(self, layer) -> None:
        """Give a fresh layer the sinks and the chunk, at their own positions, and this tap."""
        store = self.source.store
        k, v = (x.gather(2, self.index.unsqueeze(-1).expand(*self.index.shape, x.shape[-1]))
                for x in (store.all_keys(), store.all_values()))
        layer.track, layer.tap = True, self
        layer.lazy_initialization(k, v)
        layer.append(k, v, self.source.positions().gather(2, self.index)[:, 0], None)
        layer.seen = store.seen

    def add(self, ctx: LayerContext, handle) -> None:
        rows = ctx.q.shape[2]
        place = torch.arange(ctx.first, ctx.row + 1, device=ctx.q.device).expand(ctx.q.shape[0], -1)
        for r0 in range(0, rows, ROWS):
            block = ctx.q[:, :, r0 : r0 + ROWS]
            ctx.store.queries = block
            p, _ = replace(ctx, pos_q=place[:, r0 : r0 + ROWS]).window_weights(block.shape[2])
            p = p[..., self.skip : self.skip + self.chunk.shape[-1]].amax(2)
            peak = p.unflatten(1, (ctx.kv_heads, ctx.groups)).amax(2)
            self.best = peak if self.best is None else torch.maximum(self.best, peak)
        ctx.store.queries = None

    def write(self, scores: torch.Tensor) -> None:
        """Put the peaks of the chunk's entries, sinks apart, into scores [B,Hk,N]."""
        scores.scatter_(2, self.chunk, self.best)
        scores[self.source.positions() < self.sinks] = 1.0
