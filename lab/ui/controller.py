"""The only door from the browser to the engine: models, techniques, experiments and predicted cost.

Every method is narrow and returns plain values or the engine's events; tabs never import lab.engine themselves.
"""
from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lab.errors import LabError, out_of_memory

from . import recorded
from .format import ratio, size
from .opened import OpenRun, Shelf
from .state import MOST_SAMPLES

log = logging.getLogger("lab.ui")

SLOT_IDENTITY = {"trim": "whole prompt", "select": "all entries", "edit": "–", "weigh": "softmax", "combine": "exact merge",
                 "route": "–", "observe": "–", "score": "–", "allocate": "all at 16 bit", "reduce": "–",
                 "encode": "16 bit", "calibrate": "–"}
CACHE_SIDE = ("observe", "score", "allocate", "reduce", "encode")
MOST_VARIANTS = 4
ABOUT_TO_RUN_S = 5.0  # where nothing is under way, a press that long ago has begun, or its page is closed
MOST_NAME = 120  # characters
REPLAY_ALL_BYTES = 1 * 2**30  # below this, and a sixth of the free memory, a replay captures every layer at once
Report = Callable[[float, str], None]


@dataclass
class Outcome:
    """What an experiment leaves: the record of the contract and its arrays."""

    record: dict[str, Any]
    arrays: dict[str, Any] = field(default_factory=dict)


class Job:
    """One visitor's run under way: a stop that reaches the engine as soon as there is one."""

    def __init__(self) -> None:
        self._event, self.run_id = threading.Event(), ""
        self._reach: Callable[[], None] | None = None

    def attach(self, cancel: Callable[[], None]) -> None:
        """What to call when the run is to stop."""
        self._reach = cancel
        if self._event.is_set():
            cancel()

    def stop(self) -> None:
        """Stop within a step."""
        self._event.set()
        if self._reach is not None:
            self._reach()

    @property
    def stopped(self) -> bool:
        """True once a stop was asked for."""
        return self._event.is_set()


class Lab:
    """One per process: the model (loaded once, lazily), the technique registry, open runs and running jobs."""

    def __init__(self, library: Any, *, source: str = "default", device: str = "auto", dtype: str = "auto",
                 weights: str = "auto", public: bool = False, max_new_tokens: int = 1024) -> None:
        self.library, self.public, self.max_new_tokens = library, public, max_new_tokens
        self.source, self.device, self.dtype, self.weights = source, device, dtype, weights
        self.shelf = Shelf()
        self._model: Any = None
        self._loading, self._jobs_lock = threading.Lock(), threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[str, float] = {}  # visitors in the queue, and when they pressed Run
        self._turn = 0.0  # when the visitor whose run began last had pressed it: who pressed before and still waits has gone
        self._given_up: dict[str, int] = {}  # of visitors who left it: their presses that the queue still holds
        example = recorded.load()
        self.has_example = example is not None
        if example is not None:
            self.shelf.put(example, "recorded")

    # -- techniques ---------------------------------------------------------------------------------------------
    def registry(self) -> dict[str, Any]:
        """Technique classes by name."""
        from lab import techniques

        return techniques.registry()

    def catalog(self) -> dict[str, Any]:
        """Slots and techniques as the variant cards need them, from the registry's declarations."""
        from lab.engine.slots import PIPELINE, SLOT_HELP

        return {"slots": [{"name": slot, "question": SLOT_HELP.get(slot, ""), "identity": SLOT_IDENTITY.get(slot, "–"),
                           "side": "cache" if slot in CACHE_SIDE else "attention"} for slot in PIPELINE],
                "techniques": [self._declaration(t) for t in self.registry().values()]}

    @staticmethod
    def _declaration(technique: Any) -> dict[str, Any]:
        paper = technique.paper
        return {"name": technique.name, "title": technique.title, "slots": list(technique.slots), "help": technique.help,
                "saves": technique.saves, "does_not_save": technique.does_not_save,
                "paper": {"title": paper.title, "arxiv": paper.arxiv, "year": paper.year, "url": getattr(paper, "url", None)},
                "parameters": [{"name": p.name, "type": p.type, "default": p.default, "min": p.min, "max": p.max,
                                "choices": list(p.choices) if p.choices else None, "unit": p.unit, "help": p.help}
                               for p in technique.parameters()]}

    def techniques_of(self, variant: dict[str, Any]) -> list[Any]:
        """Technique objects from a card's [{name, params}]. Raises LabError for what is unknown or out of range."""
        known = self.registry()
        built = []
        for item in variant.get("techniques") or []:
            if item.get("name") not in known:
                raise LabError(f'There is no technique called "{item.get("name")}"', fix="Remove it from the variant")
            kind = known[item["name"]]
            names = {p.name for p in kind.parameters()}
            built.append(kind(**{k: v for k, v in (item.get("params") or {}).items() if k in names}))
        return built

    def stack(self, variant: dict[str, Any]) -> Any:
        """The engine's Stack of one card."""
        from lab.engine.stack import Stack

        return Stack.of(self.techniques_of(variant))

    def cards_of(self, spec: str) -> dict[str, Any]:
        """A card's {techniques: [{name, params}]} from a spec such as "h2o(budget=0.25)+kivi"."""
        from lab.engine.stack import Stack

        return {"techniques": Stack.parse(spec, self.registry()).describe()}

    def plan(self, ask: dict[str, Any]) -> dict[str, Any]:
        """What the cards show before a run: title, spec, conflicts, what is blocked and why, predicted KV bytes.

        `ask`: {variants: [{techniques}], prompt_tokens int|None, max_new_tokens int, samples int}.
        """
        from lab.engine.stack import conflicts

        known, answers = self.registry(), []
        for variant in (ask.get("variants") or [])[:MOST_VARIANTS]:
            answer: dict[str, Any] = {"conflicts": [], "blocked": {}}
            answers.append(answer)
            try:
                chosen = self.techniques_of(variant)
            except LabError as problem:
                answer["error"] = str(problem)
                continue
            answer["conflicts"] = conflicts(chosen)
            standing = set(answer["conflicts"])
            for name, kind in known.items():
                if name not in {t.name for t in chosen}:
                    new = [c for c in conflicts([*chosen, kind]) if c not in standing]
                    if new:
                        answer["blocked"][name] = new[0]
            if answer["conflicts"]:
                continue
            stack = self.stack(variant)
            answer.update(spec=stack.spec, title=stack.title, saves=self.saves(stack),
                          **self._predicted(stack, ask.get("prompt_tokens"), int(ask.get("max_new_tokens") or 0),
                                            min(max(1, int(ask.get("samples") or 1)), MOST_SAMPLES)))
        return {"variants": answers}

    @staticmethod
    def saves(stack: Any) -> str:
        """What a stack that frees no memory is said to save; empty when it frees memory, for then bytes tell."""
        words = list(dict.fromkeys(t.saves for t in stack.techniques if t.saves))
        if not words or any(w.startswith("memory") for w in words):
            return ""
        return next((w for w in words if w != "nothing"), "saves nothing")

    def _predicted(self, stack: Any, prompt_tokens: int | None, new_tokens: int, samples: int) -> dict[str, Any]:
        facts = self.facts()
        if not facts:
            return {"pending": "predicted size: once the model is loaded"}
        if not prompt_tokens:
            return {"pending": "predicted size: once the prompt is counted"}
        try:
            mine, dense = self.predict(stack, facts, prompt_tokens, prompt_tokens + max(0, new_tokens - 1), samples)
        except LabError as problem:
            return {"error": str(problem), "remedy": problem.remedy}
        return {"kv": {"text": size(mine), "ratio": ratio(mine, dense) if stack.techniques else "",
                       "at": f"{prompt_tokens + max(0, new_tokens - 1):,} tokens" + (
                           f", {samples} continuations" if samples > 1 else "")}}

    def predict(self, stack: Any, facts: dict[str, Any], prompt: int, total: int, samples: int = 1) -> tuple[float, float]:
        """(bytes of this stack, bytes of the dense cache) once `total` tokens were fed, from lab.measure.cost; of all samples of
        the prompt, which share what the stack lets them share. Raises the LabError that a run of this prompt would end in."""
        from lab.measure import cost

        cost.check(stack, prompt)
        found = cost.predict(facts, stack, prompt, total, cost.ELEMENT.get(str(facts.get("dtype")), 4), trials=samples)
        return found.kv_bytes, found.kv_bytes_dense

    # -- model --------------------------------------------------------------------------------------------------
    @property
    def loaded(self) -> bool:
        """True when the model is in memory."""
        return self._model is not None

    def facts(self) -> dict[str, Any] | None:
        """Facts of the loaded model; of the recorded run's model before that; None when neither is there."""
        if self._model is not None:
            return self._model.facts.to_dict()
        example = self.shelf.get("recorded")
        return example.record.get("model") if example else None

    def ensure_model(self, report: Report | None = None) -> Any:
        """Load the model once; later callers wait for the first. Raises LabError with the reason."""
        with self._loading:
            if self._model is None:
                from lab import models
                from lab.models.environment import check_environment

                check_environment()
                self._model = models.load(self.source, device=self.device, dtype=self.dtype, weights=self.weights,
                                          progress=report)
            return self._model

    def change_model(self, source: str, weights: str = "auto", report: Report | None = None) -> Any:
        """Load another model in place of the current one, which stays if that fails. Raises LabError with the reason."""
        with self._loading:
            from lab import models

            loaded = models.load(source.strip(), device=self.device, dtype=self.dtype, weights=weights, progress=report)
            self._model, self.source, self.weights = loaded, source.strip(), weights
            return loaded

    def preload(self) -> threading.Thread:
        """Load the model in the background; a failure is told at the first Run."""
        def work() -> None:
            try:
                self.ensure_model()
            except Exception as problem:  # told to the person at Run, where something can be done about it
                log.warning("background load failed: %s", problem)
        thread = threading.Thread(target=work, name="preload", daemon=True)
        thread.start()
        return thread

    def count_tokens(self, text: str, chat: bool = False) -> int | None:
        """Tokens of a prompt as the model will read it, its chat template around it; None before the model is loaded."""
        if self._model is None:
            return None
        from lab.measure.request import prompt_ids
        tokenizer = self._model.tokenizer
        return len(prompt_ids(tokenizer, text, chat and bool(getattr(tokenizer, "chat_template", None)))) if text else 0

    def limit(self) -> int | None:
        """The model's context length in tokens."""
        return (self.facts() or {}).get("context")

    # -- runs ---------------------------------------------------------------------------------------------------
    def wait(self, visitor: str) -> int:
        """A visitor pressed Run; how many other visitors' runs are under way or about to be, after which theirs begins."""
        now = time.monotonic()
        with self._jobs_lock:  # who pressed long ago while nothing runs has closed the page
            since = self._turn if self._jobs else now - ABOUT_TO_RUN_S
            before = {*self._jobs, *(other for other, pressed in self._waiting.items() if pressed > since)}
            if visitor not in self._jobs:
                self._waiting[visitor] = now
        return len(before - {visitor})

    def leave(self, visitor: str) -> None:
        """A visitor waits no longer: the queue holds none of their presses."""
        with self._jobs_lock:
            self._waiting.pop(visitor, None)
            self._given_up.pop(visitor, None)

    def passes(self, visitor: str) -> bool:
        """True for a press whose visitor left the queue before its turn came: nothing is to be done."""
        with self._jobs_lock:
            left = self._given_up.pop(visitor, 0)
            if left > 1:
                self._given_up[visitor] = left - 1
        return left > 0

    def begin(self, visitor: str) -> Job | None:
        """Register a visitor's job and return its stop signal; None when one is already under way."""
        with self._jobs_lock:
            if visitor in self._jobs:
                return None
            self._turn = self._waiting.pop(visitor, self._turn)
            job = self._jobs[visitor] = Job()
        return job

    def busy(self) -> bool:
        """True while somebody's generation is under way."""
        return bool(self._jobs)

    def under_way(self) -> set[str]:
        """Ids of the runs that are being generated now."""
        return {job.run_id for job in list(self._jobs.values())}

    def end(self, visitor: str) -> None:
        """The job is over."""
        with self._jobs_lock:
            self._jobs.pop(visitor, None)

    def has(self, visitor: str) -> bool:
        """True while a visitor's job is under way or queueing."""
        with self._jobs_lock:
            return visitor in self._jobs or visitor in self._waiting

    def unqueue(self, visitor: str) -> bool:
        """A visitor whose run has not begun leaves the queue; False when it has, or when there is none."""
        with self._jobs_lock:
            if visitor in self._jobs or visitor not in self._waiting:
                return False
            self._waiting.pop(visitor, None)
            self._given_up[visitor] = self._given_up.get(visitor, 0) + 1
            return True

    def stop(self, visitor: str) -> bool:
        """Ask a visitor's job to stop within a step. False when there is none."""
        with self._jobs_lock:
            job = self._jobs.get(visitor)
        if job is not None:
            job.stop()
        return job is not None

    def run(self, prompt: str, variants: list[dict[str, Any]], settings: dict[str, Any], job: Job,
            owner: str = "") -> Iterator[Any]:
        """Events of one experiment, then one Outcome. The run is noted as begun first, so that a crash leaves a trace."""
        from lab.engine.sampling import Sampling
        from lab.measure.experiment import Experiment
        from lab.measure.keeping import kept
        from lab.measure.request import RunRequest

        request = RunRequest(
            prompt=prompt, variants=tuple(self.stack(v).spec for v in variants), max_new_tokens=settings["max_new_tokens"],
            sampling=Sampling(settings["temperature"], settings["top_k"], settings["top_p"], settings["seed"]),
            timing=settings["timing"], samples=int(settings.get("samples") or 1), chat=bool(settings.get("chat")),
            truncate=bool(settings.get("truncate")))
        experiment = Experiment(self.ensure_model(), request)
        job.attach(experiment.cancel)
        job.run_id = str(experiment.record["run_id"])
        try:
            self.library.begin(experiment.record, owner if self.public else "")
        except Exception as problem:  # the run itself matters more than its place in the table
            log.warning("the run could not be noted before its start: %s", problem)
        checkpoint = lambda record: self.library.checkpoint(record, owner if self.public else "")  # noqa: E731
        yield from kept(experiment, checkpoint)
        yield Outcome(experiment.record, experiment.arrays)

    def replay(self, run: OpenRun, letter: str, layer: int, report: Report | None = None,
               cancelled: Callable[[], bool] = lambda: False) -> None:
        """Feed a saved variant's tokens through the model again to capture every layer's queries and keys, or one layer's."""
        from lab.measure.replay import replay
        from lab.models.devices import available_bytes

        loaded = self.ensure_model(report)
        facts, variant = loaded.facts, run.variant(letter)
        rows = len(run.record["prompt"]["token_ids"]) + len(variant.get("token_ids") or [])
        size = facts.layers * (facts.heads + facts.kv_heads) * facts.head_dim * rows * 2
        every = size <= min(REPLAY_ALL_BYTES, (available_bytes() or float("inf")) / 6)
        run.add(replay(loaded, run.record, letter, layers=None if every else {layer},
                       progress=None if report is None else lambda fraction: report(fraction, "Replaying"),
                       cancelled=cancelled))
        self.shelf.make_room()

    def replays_by_itself(self, run: OpenRun) -> bool:
        """True when the right model is in memory, so that a missing layer can be captured without being asked."""
        return self.loaded and self.replayable(run)

    def replayable(self, run: OpenRun) -> bool:
        """True when the loaded (or loadable) model is the one that made the run."""
        return not self.loaded or (run.record.get("model") or {}).get("id") == (self.facts() or {}).get("id")

    def growth(self, record: dict[str, Any], variant: dict[str, Any], points: int = 24) -> tuple[list[int], list[float]]:
        """Predicted KV bytes from the run's end to the model's full context, as (tokens, bytes)."""
        from lab.measure import cost
        facts = record.get("model") or {}
        prompt = len((record.get("prompt") or {}).get("token_ids") or [])
        start = prompt + max(0, len(variant.get("tokens") or []) - 1)
        end = int(facts.get("context") or 0)
        if end <= start:
            return [], []
        xs = sorted({start + (end - start) * i // (points - 1) for i in range(points)})
        try:
            stack, element = self.stack(variant), cost.ELEMENT.get(str(facts.get("dtype")), 4)
            samples = int((record.get("settings") or {}).get("samples") or 1)
            return xs, [cost.stored(facts, stack, max(1, prompt), x, element, samples) for x in xs]
        except LabError:
            return [], []

    def keep(self, outcome: Outcome, owner: str) -> tuple[str, str | None]:
        """Put a finished run on the shelf and save it. Returns (key, sentence about a failed save or None)."""
        whose = owner if self.public else ""
        key = self.shelf.put(OpenRun(outcome.record, outcome.arrays, save=self._saver(outcome.record, owner), owner=whose))
        try:
            self.library.save(outcome.record, outcome.arrays, owner if self.public else "")
        except Exception as problem:
            log.warning("save failed: %s", problem)
            return key, f"The run is open but not saved: {problem}"
        return key, None

    def open(self, run_id: str, owner: str) -> str:
        """Open a saved run and return its key. Raises LabError when it is not there, not this visitor's, or still goes on."""
        whose = owner if self.public else ""
        record, arrays = self.library.load(run_id, whose)
        if run_id in self.under_way():
            raise LabError("This run is still being generated", fix="Open it once it has ended")
        from lab.measure.completed import completed

        record = completed(record)
        there = self.shelf.find(record, whose)  # so that a reload keeps what was replayed
        return self.shelf.put(there or OpenRun(record, arrays, save=self._saver(record, owner), owner=whose))

    def rename(self, run_id: str, name: str, owner: str) -> None:
        """Give a saved run a name, also where it is open. Raises StorageError when it is not there or not this visitor's."""
        name = name.strip()[:MOST_NAME]
        self.library.rename(run_id, name, owner)
        self.shelf.rename(run_id, name, owner)

    def _saver(self, record: dict[str, Any], owner: str) -> Callable[[str, dict[str, Any]], None]:
        """How what is computed from a run is kept with it."""
        return lambda prefix, arrays: self.library.attach(str(record.get("run_id")), prefix, arrays,
                                                          owner if self.public else "")


def on_space() -> bool:
    """True on a Hugging Face Space, where visitors are strangers to each other."""
    return bool(os.environ.get("SPACE_ID"))


def sentence(problem: BaseException) -> str:
    """What a person reads about a failure. Never a traceback."""
    if isinstance(problem, LabError) or type(problem).__name__ == "StorageError":
        return str(problem)
    if out_of_memory(problem):
        return "The machine ran out of memory. A shorter prompt, fewer variants or fewer new tokens need less."
    log.exception("unexpected failure", exc_info=problem)
    return f"Something unexpected went wrong ({type(problem).__name__}). The details are in the server's log."
