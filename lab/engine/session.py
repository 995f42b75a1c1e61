"""A session: one model, one stack, one cache; prefill a prompt and take decode steps, each timed alone."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import Iterator

import torch

from kernels import first_use
from lab.engine.cache import LabCache
from lab.engine.graph import GraphedDecode, why_not
from lab.engine.rope import forget_growth
from lab.engine.stack import Stack
from lab.engine.steady import FILLING, Unfit
from lab.engine.tap import Tap
from lab.errors import LabError

log = logging.getLogger("lab")


class Session:
    """Feeds tokens to a model through the lab's cache.

    Args:
        model: a causal LM `attach` accepts. stack: what to do with attention and cache.
        new_tokens: decode steps to make room for. chunk: prompt rows per forward; None feeds the prompt at once.
        record: keep the life of every position for the cache map. capture: keep queries and keys for the attention map.

    shorten: whether captured steps may use `lean`'s few launches; own: why the model's modules run instead, or None.
    """

    shorten = True

    def __init__(
        self, model: torch.nn.Module, stack: Stack | str = "dense", *, new_tokens: int = 64, chunk: int | None = 512,
        seed: int = 0, record: bool = False, capture: bool = False,
    ) -> None:
        self.model = model
        self.stack = Stack.parse(stack) if isinstance(stack, str) else stack
        self.new_tokens, self.chunk, self.seed, self.record, self.capture = new_tokens, chunk, seed, record, capture
        self.cache: LabCache | None = None
        self.last_ms = 0.0
        self.path: str | None = None  # how decode steps run on CUDA, once known: "CUDA graph" or "step by step: why"
        self.own: str | None = None
        self._compiled = False
        self._graph: GraphedDecode | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def _cards(self) -> set[torch.device]:
        """Every GPU the model lies on: what a timed step has to wait for."""
        return {p.device for p in self.model.parameters() if p.device.type == "cuda"}

    @property
    def compiles(self) -> bool:
        """Whether this session's first launches will compile kernels: the first of its kind on this machine, on CUDA."""
        return self.device.type == "cuda" and not self._compiled and first_use.is_first(self._use, self.device)

    @property
    def _use(self) -> str:
        config = self.model.config.get_text_config(decoder=True)
        return f"{self.stack.spec} {config.model_type} {config.hidden_size} {config.num_attention_heads} {self.model.dtype}"

    def prefill(self, ids: list[int], *, samples: int = 1) -> torch.Tensor:
        """Feed the prompt and return the last row's logits float32 [samples, V]; last_ms is the time it took.

        Raises LabError for an empty prompt or an impossible budget.
        """
        steps = self.prefill_steps(ids, samples=samples)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return done.value

    def prefill_steps(self, ids: list[int], *, samples: int = 1, taps: set[int] | None = None) -> Iterator[float]:
        """As `prefill`, yielding the fraction done after each chunk; the caller may stop between chunks. `taps` names
        layers whose queries and keys to keep when not all are captured."""
        self._graph = self.path = None
        if not ids:
            raise LabError("The prompt is empty", "A prompt has at least one token", "Type a prompt, or choose a preset")
        self.cache = LabCache(
            self.model, self.stack, prompt=len(ids), reserve=len(ids) + self.new_tokens, seed=self.seed, record=self.record
        )
        for layer in self.cache.lab_layers:
            layer.tap = Tap() if self.capture or layer.index in (taps or ()) else None
        tokens = torch.tensor([ids], device=self.device)
        grows = forget_growth(self.model)
        whole = grows or self.stack.one("trim") is not None  # trim chooses from all of the prompt
        size = len(ids) if whole else self.stack.prompt_block or self.chunk or len(ids)
        spent, logits = 0.0, None
        for at in range(0, len(ids), size):
            start = self._now()
            logits = self._forward(tokens[:, at : at + size])
            spent += self._now() - start
            yield min(1.0, (at + size) / len(ids))
        self.last_ms = spent * 1e3
        with torch.inference_mode():
            self.cache.repeat(samples)
            return logits.expand(samples, -1)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One decode step. ids int64 [B] -> logits float32 [B, V]; last_ms is the time of this step alone.

        On CUDA the first step captures a graph where the stack allows it (not counted in last_ms).
        """
        if self.device.type == "cuda" and self._graph is None and (self.path is None or self.path.endswith(FILLING)):
            self._prepare_graph(ids.shape[0])
        if self._graph is not None and self._graph.left == 0:
            self._leave_graph("the reserved room is used up")
        start = self._now()
        if self._graph is not None:
            with torch.inference_mode(), torch.cuda.device(self.device):
                logits = self._graph.step(ids)
        else:
            logits = self._forward(ids.view(-1, 1))
        self.last_ms = (self._now() - start) * 1e3
        if not self._compiled:
            self._compiled = True
            if self.device.type == "cuda":
                first_use.note(self._use, self.device)
        return logits

    def _prepare_graph(self, batch: int) -> None:
        reason = why_not(self.cache)
        if reason is None:
            try:
                with torch.inference_mode(), torch.cuda.device(self.device):
                    self._graph = GraphedDecode(self.model, self.cache, batch, self.new_tokens + 1, shorten=self.shorten)
                self.path, self.own = "CUDA graph", self._graph.own
                return
            except Unfit as unfit:
                reason = str(unfit)
            except Exception as error:  # a model or kernel that cannot be captured here still runs step by step
                log.warning("capturing the decode step failed: %s", error)
                reason = "this model's step cannot be captured"
        self._leave_graph(reason)

    def _leave_graph(self, reason: str) -> None:
        for layer in self.cache.lab_layers:
            layer.settle()
        self._graph, self.path = None, f"step by step: {reason}"

    def fork(self) -> "Session":
        """A session whose cache continues on its own from here."""
        twin = Session(self.model, self.stack, new_tokens=self.new_tokens, chunk=self.chunk, seed=self.seed)
        with torch.inference_mode():
            twin.cache = self.cache.clone()
        twin.shorten, twin._compiled = self.shorten, self._compiled
        return twin

    def close(self) -> None:
        """Free the cache."""
        self.cache = self._graph = None

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            short = getattr(self.model, "lab_short", None) if ids.shape[1] == 1 else None
            logits = None if short is None else short(ids, self.cache)
            if logits is not None:
                return logits
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float()

    def _now(self) -> float:
        if self.device.type == "cuda":
            for card in self._cards:
                torch.cuda.synchronize(card)
        return time.perf_counter()
