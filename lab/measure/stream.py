"""One variant of a run: its free-running text, and beside it the stream that is fed the reference's tokens."""

from __future__ import annotations

from typing import Callable, Iterator

import torch

from lab.engine.events import Event, Fidelity, Finished, Prefilled, Progress, Token
from lab.engine.sampling import Sampling
from lab.engine.session import Session
from lab.measure.beliefs import Belief
from lab.measure.text import Detokeniser


COMPILING = "Compiling kernels (first time on this machine, some seconds)"


class Reference:
    """The first variant's tokens and beliefs, by index; beliefs are dropped once every other variant has read them."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.tokens: list[int] = []
        self._beliefs: dict[int, list] = {}

    ended = False

    def publish(self, token: int, belief: Belief) -> None:
        if self.readers:
            self._beliefs[len(self.tokens)] = [belief, self.readers]
        self.tokens.append(token)

    def read(self, index: int) -> Belief:
        slot = self._beliefs[index]
        slot[1] -= 1
        if slot[1] == 0:
            del self._beliefs[index]
        return slot[0]


class Stream:
    """Generates one variant, an event at a time.

    While the variant picks the reference's tokens, one cache serves both streams. At the first other token the cache
    is copied: one copy goes on freely, the other follows the reference, and only steps of the free one are timed.
    """

    def __init__(
        self, index: int, session: Session, tokenizer, ids: list[int], sampling: Sampling, new_tokens: int,
        stop: frozenset[int], reference: Reference, *, samples: int = 1, fidelity: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.index, self.session, self.tokenizer, self.ids = index, session, tokenizer, ids
        self.sampling, self.new_tokens, self.stop = sampling, new_tokens, stop
        self.reference, self.samples, self.fidelity = reference, samples, fidelity
        self.cancelled = cancelled
        self.forced: Session | None = None
        self.reason: str | None = None
        self.ttft_ms: float | None = None
        self.token_ids: list[list[int]] = [[] for _ in range(samples)]

    @property
    def is_reference(self) -> bool:
        return self.index == 0

    def events(self) -> Iterator[Event | None]:
        """Prefilled, then per step a Fidelity and a Token per sample, then Finished; None marks the end of each step,
        so that a runner can take variants in turn. Raises what the engine raises."""
        logits = yield from self._prefill()
        if logits is None:
            yield Finished(self.index, "cancelled", "")
            return
        forced_logits = logits[:1]
        follows = self.fidelity and not self.is_reference
        if self.samples > 1 and self.fidelity:
            self.forced = self._single()
        shared = self.samples == 1  # the free and the forced stream are still the same
        pieces = [Detokeniser(self.tokenizer) for _ in range(self.samples)]
        generator = self.sampling.generator(logits.device)
        step_ms, free_open, step = None, True, 0
        while True:
            if self.cancelled():
                self.reason = self.reason or "cancelled"
                break
            ref_token = None
            if follows and step < len(self.reference.tokens):
                ref_token = self.reference.tokens[step]
                yield self._compare(step, ref_token, forced_logits[0])
            if free_open:
                picked = self.sampling.pick(logits, generator)
                yield from self._tokens(step, picked, logits, step_ms, pieces)
                if self.is_reference:
                    self.reference.publish(int(picked[0]), Belief.of(logits[0]))
                if self.samples == 1 and int(picked[0]) in self.stop:
                    self.reason, free_open = "stop", False
                elif step + 1 >= self.new_tokens:
                    self.reason, free_open = "length", False
            if self.is_reference and not free_open:
                self.reference.ended = True
            step += 1
            more_forced = ref_token is not None and self._follows_on(step)
            if not free_open and not more_forced:
                break
            if shared and ref_token is not None and (not free_open or int(picked[0]) != ref_token):
                shared = False
                if more_forced:
                    self.forced = self.session.fork()
            if free_open:
                if step == 1 and self.session.compiles:
                    yield Progress(self.index, 1.0, COMPILING)
                logits = self.session.step(picked)
                step_ms = self.session.last_ms
            if more_forced:
                if shared:
                    forced_logits = logits[:1]
                else:
                    forced_logits = self.forced.step(torch.tensor([ref_token], device=logits.device))
            yield None
        if self.is_reference:
            self.reference.ended = True
        self.forced = None
        yield Finished(self.index, self.reason or "length", self.text)

    @property
    def text(self) -> str:
        """The free-running text of the first sample, without stop tokens."""
        return self.sample_text(0)

    def sample_text(self, sample: int) -> str:
        return self.tokenizer.decode([i for i in self.token_ids[sample] if i not in self.stop])

    def _prefill(self) -> Iterator[Event | None]:
        """Read the prompt, with progress; returns the logits, or None when cancelled."""
        count = len(self.ids)
        yield Progress(self.index, 0.0, COMPILING if self.session.compiles else f"Reading {count:,} prompt tokens")
        steps = self.session.prefill_steps(self.ids, samples=self.samples)
        while True:
            if self.cancelled():
                self.reason = "cancelled"
                return None
            try:
                fraction = next(steps)
            except StopIteration as done:
                logits = done.value
                break
            yield Progress(self.index, fraction, f"Read {round(fraction * count):,} of {count:,} prompt tokens")
        self.ttft_ms = self.session.last_ms
        cache = self.session.cache
        yield Prefilled(self.index, self.ttft_ms, count, cache.kv_bytes, cache.kept_fraction)
        return logits

    def _tokens(self, step: int, picked: torch.Tensor, logits: torch.Tensor, step_ms, pieces) -> Iterator[Token]:
        cache = self.session.cache
        size, kept = cache.kv_bytes, cache.kept_fraction
        for sample, token in enumerate(picked.tolist()):
            done = self.token_ids[sample] and self.token_ids[sample][-1] in self.stop
            if done:
                continue
            self.token_ids[sample].append(token)
            belief = Belief.of(logits[sample])
            text = "" if token in self.stop else pieces[sample].add(token)
            yield Token(
                self.index, step, token, text, belief.logprob(token), belief.entropy, step_ms, size, kept,
                belief.top(self.tokenizer), sample,
            )

    def _compare(self, step: int, ref_token: int, logits: torch.Tensor) -> Fidelity:
        ours, theirs = Belief.of(logits), self.reference.read(step)
        return Fidelity(
            self.index, step, theirs.kl_to(ours), ours.argmax == theirs.argmax,
            float(theirs.logp[ref_token].exp()), float(ours.logp[ref_token].exp()), ours.top(self.tokenizer),
        )

    def _follows_on(self, step: int) -> bool:
        return step < len(self.reference.tokens) or not self.reference.ended

    def _single(self) -> Session:
        """A one-sequence twin of a session that holds several samples of one prompt."""
        twin = self.session.fork()
        for layer in twin.cache.lab_layers:
            layer.batch_select_indices(torch.tensor([0]))
        return twin
