"""An experiment: a request run on a loaded model, as a stream of events and, at the end, a run record."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any, Iterator

import numpy as np
import torch

from lab.engine.events import Event, Failed, Fidelity, Finished, Progress, Token
from lab.engine.session import Session
from lab.errors import LabError, out_of_memory
from lab.measure import record as rec
from lab.measure.completed import completed
from lab.measure.request import LETTERS, RunRequest, tokenise
from lab.measure.stream import COMPILING, Reference, Stream
from lab.measure.text import token_strings

log = logging.getLogger("lab")


class Experiment:
    """Runs a request. Iterate `events()`; read `record` and `arrays` at any time, whole once the iterator ends.

    Args:
        loaded: a LoadedModel. request: what to run.

    Raises LabError from the constructor for a request this model cannot run; later failures are Failed events.
    """

    def __init__(self, loaded: Any, request: RunRequest) -> None:
        self.loaded, self.request = loaded, request
        self.ids = tokenise(loaded.tokenizer, request, loaded.facts.context)
        facts = loaded.facts.to_dict()
        self.record = rec.base_record(request, facts, self.ids, token_strings(loaded.tokenizer, self.ids))
        self.arrays: dict[str, np.ndarray] = {}
        self.replay_needed = False
        self._cancel = threading.Event()
        self._streams: list[Stream | None] = []

    def cancel(self) -> None:
        """Stop within one step; what was generated stays in the record."""
        self._cancel.set()

    def events(self) -> Iterator[Event]:
        """Run. Closing the iterator frees every cache."""
        try:
            self._prepare()
            walk = self._clean() if self.request.timing == "clean" else self._interleaved()
            for event in walk:
                self._note(event)
                yield event
            self._finish()
        finally:
            self.close()

    def snapshot(self) -> dict[str, Any]:
        """The record as it stands: what a variant that goes on has written so far, marked interrupted."""
        variants = [dict(v) for v in self.record["variants"]]
        for variant, stream in zip(variants, self._streams):
            if stream is not None and variant["finish"] is None and variant["error"] is None:
                variant.update(text=stream.text, token_ids=list(stream.token_ids[0]), ttft_ms=stream.ttft_ms,
                               finish="interrupted", **rec.so_far(variant["tokens"]))
        return completed({**self.record, "status": "interrupted", "variants": variants})

    def close(self) -> None:
        """Free the caches."""
        for stream in self._streams:
            if stream is not None:
                stream.session.close()
                stream.forced = None
        self._streams = []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- the walk ------------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        request, loaded = self.request, self.loaded
        stacks = request.stacks()
        reference = Reference(len(stacks) - 1 if request.fidelity else 0)
        stop = stop_tokens(loaded)
        # Watching every step would keep a GPU from running captured graphs: there, maps are replayed when asked for.
        self.replay_needed = request.capture and (not self._captures_fit() or loaded.facts.device.startswith("cuda"))
        for i, stack in enumerate(stacks):
            session = Session(
                loaded.model, stack, new_tokens=request.max_new_tokens, seed=request.sampling.seed, record=True,
                capture=request.capture and not self.replay_needed,
            )
            self._streams.append(Stream(
                i, session, loaded.tokenizer, self.ids, request.sampling, request.max_new_tokens, stop, reference,
                samples=request.samples, fidelity=request.fidelity, cancelled=self._cancel.is_set,
            ))

    def _interleaved(self) -> Iterator[Event]:
        open_walks = [(s.index, s.events()) for s in self._streams]
        while open_walks:
            still = []
            for index, walk in open_walks:
                alive = yield from self._one_step(index, walk)
                if alive:
                    still.append((index, walk))
            open_walks = still

    def _clean(self) -> Iterator[Event]:
        for stream in self._streams:
            if not self._cancel.is_set():
                yield Progress(stream.index, 0.0, COMPILING if stream.session.compiles else "Warming up")
                self._warm_up(stream)
            walk = stream.events()
            while (yield from self._one_step(stream.index, walk)):
                pass

    def _one_step(self, index: int, walk: Iterator) -> Iterator[Event]:
        """Events of one variant up to the end of its step; returns whether it goes on."""
        try:
            for event in walk:
                if event is None:
                    return True
                yield event
        except Exception as error:  # whatever a variant does, the others and the app go on
            yield Failed(index, explain(error))
            if index == 0:
                self._streams[0].reference.ended = True
        return False

    def _warm_up(self, stream: Stream) -> None:
        session = Session(self.loaded.model, stream.session.stack, new_tokens=4)
        try:
            logits = session.prefill(self.ids[-64:])
            for _ in range(3):
                logits = session.step(logits.argmax(-1))
        except LabError:  # a budget too small for a short warm-up prompt says nothing about the run
            pass
        session.close()

    # -- the record ----------------------------------------------------------------------------------------------
    def _note(self, event: Event) -> None:
        if isinstance(event, Token) and event.sample == 0:
            self.record["variants"][event.variant]["tokens"].append(rec.token_row(event))
        elif isinstance(event, Fidelity):
            self.record["variants"][event.variant]["fidelity"].append(rec.fidelity_row(event))
        elif isinstance(event, Failed) and event.variant is not None:
            self.record["variants"][event.variant]["error"] = event.message
            self._fill(event.variant)
        elif isinstance(event, Finished):
            self._fill(event.variant)

    def _fill(self, index: int) -> None:
        stream, variants = self._streams[index], self.record["variants"]
        rec.fill_variant(variants[index], stream, variants[0])
        cache = stream.session.cache
        if cache is not None:
            self.arrays.update(rec.cache_arrays(LETTERS[index], cache))
            if stream.session.capture:
                self.arrays.update(rec.capture_arrays(LETTERS[index], cache))
            stream.session.close()

    def _finish(self) -> None:
        errors = [v["error"] for v in self.record["variants"]]
        if all(errors):
            self.record["status"] = "failed"
        elif any(v["finish"] == "cancelled" for v in self.record["variants"]):
            self.record["status"] = "cancelled"
        else:
            self.record["status"] = "partial" if any(errors) else "complete"
        # variants that noticed the stop before the reference did were filled without its text
        for variant, whole in zip(self.record["variants"], completed(self.record)["variants"], strict=True):
            variant.update(whole)

    def _captures_fit(self) -> bool:
        facts = self.loaded.facts
        rows = len(self.ids) + self.request.max_new_tokens
        size = facts.layers * (facts.heads + facts.kv_heads) * facts.head_dim * rows * 2
        return size * len(self.request.variants) <= rec.CAPTURE_LIMIT


def stop_tokens(loaded: Any) -> frozenset[int]:
    """Every id that ends a text for this model."""
    found: set[int] = set()
    config = getattr(loaded.model, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), loaded.tokenizer.eos_token_id):
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(found)


def explain(error: Exception) -> str:
    """One sentence for the user; the details go to the log."""
    if isinstance(error, LabError):
        return str(error)
    if out_of_memory(error):
        return "There is not enough memory for this run. Use a shorter prompt, fewer variants or a smaller model."
    log.exception("a variant failed", exc_info=error)
    return f"This variant stopped with an unexpected error ({type(error).__name__}: {str(error)[:160]}). Please report it."
