"""A run that somebody has open: its record, its arrays, and the captures built from them on demand."""
from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from lab.errors import LabError

from . import kept

log = logging.getLogger("lab.ui")

KEEP = 24
REPLAYED_BYTES = 2 * 2**30  # of queries and keys that replays brought, over all open runs
COMBINED = ("mean", "max")  # layers combined
Save = Callable[[str, dict[str, np.ndarray]], None]


class OpenRun:
    """Record and arrays of one run. Captures and head figures are computed once and kept with it."""

    def __init__(self, record: dict[str, Any], arrays: dict[str, np.ndarray] | None, recorded: bool = False,
                 save: Save | None = None, owner: str | None = None) -> None:
        self.record, self.arrays, self.recorded, self._save = record, dict(arrays or {}), recorded, save
        self.owner = owner  # who opened it: what is computed and replayed is shared by one owner's pages, never by two owners'
        self._replayed: set[str] = set()
        self._captures: dict[tuple[str, int], Any] = {}
        self._stats: dict[tuple[str, int], Any] = {}
        self._maps: dict[str, Any] = {}
        self._trimmed: dict[tuple[str, int, int], Any] = {}
        self._surveys: dict[str, Any] = {}
        self._light: dict[str, list[Any]] = {}
        self.tasks: dict[Any, Any] = {}  # long work under way or done, see tasks.py
        self._lock = threading.Lock()

    def variant(self, letter: str) -> dict[str, Any]:
        """The variant of a letter. Raises LabError when the run has none of that name."""
        for variant in self.record.get("variants") or []:
            if variant.get("letter") == letter:
                return variant
        raise LabError(f"This run has no variant {letter}", fix="Choose one of its variants")

    def layers(self, letter: str) -> list[int]:
        """Layers whose queries and keys the run holds."""
        from lab.inspect.capture import captured_layers

        return captured_layers(self.arrays, letter)

    def capture(self, letter: str, layer: int) -> Any:
        """lab.inspect Capture of one layer. Raises LabError when it was not recorded."""
        from lab.inspect.capture import Capture

        with self._lock:
            if (letter, layer) not in self._captures:
                self._captures[letter, layer] = Capture.from_arrays(self.arrays, letter, layer, self._device())
            return self._captures[letter, layer]

    def _device(self) -> str:
        """Where to draw: on the GPU for a run that was made on one, while there is one."""
        import torch

        return "cuda" if str(self.record.get("device") or "").startswith("cuda") and torch.cuda.is_available() else "cpu"

    def lens(self, letter: str, layer: int | str, head: int | str, minus: str | None = None, exact: bool = False) -> Any:
        """lab.inspect Lens: one head, "mean", "max" or "rollout" of a variant, or its difference from variant `minus`.

        `layer` is a number, or "mean" or "max" over all captured layers. A difference covers the tokens that both runs
        have and, over several layers, the layers that both hold. `exact` asks a rollout for a window's own rows. Where
        queries and keys are gone, the overview that was kept answers, see `stored`.
        """
        from lab.inspect.lens import Difference, Heads, Rollout

        other = minus if minus and minus != letter else None
        old = {name: self.stored(name, layer, head) for name in (letter, other) if name}
        if any(x is not None for x in old.values()):
            return self._of_stored(letter, other, old, layer, head)
        both = None if other is None else set(self._needed(letter)) & set(self._needed(other))

        def one(name: str, tokens: int | None = None) -> Any:
            if head != "rollout" and layer not in COMBINED:
                return Heads([self._cut(name, int(layer), tokens)], head)
            every = [self._cut(name, n, tokens) for n in self._needed(name) if both is None or n in both]
            return Rollout(every, exact) if head == "rollout" else Heads(every, head, str(layer))
        if other is None:
            return one(letter)
        if not both and (head == "rollout" or layer in COMBINED):
            raise LabError(f"{letter} and {other} hold no captured layer in common", fix="Replay both to capture attention")
        shared = min(one(letter).tokens, one(other).tokens)
        return Difference(one(other, shared), one(letter, shared))

    def _of_stored(self, letter: str, other: str | None, old: dict[str, Any], layer: int | str, head: int | str) -> Any:
        from lab.inspect.lens import Difference
        from lab.inspect.stored import Stored

        if other is None:
            return old[letter]
        pair = [old[other], old[letter]]
        if all(isinstance(x, Stored) for x in pair) and len({x.survey.step for x in pair}) == 1:
            shared = min(x.tokens for x in pair)
            return Difference(*(x if x.tokens == shared and pair[0].tokens == pair[1].tokens else x.cut(shared) for x in pair))
        if any(x is None for x in pair) or pair[0].tokens != pair[1].tokens:
            raise LabError(f"{letter} and {other} cannot be subtracted from what this run keeps of them",
                           "A difference needs queries and keys of both", "Replay both to capture attention")
        return Difference(*pair)

    def stored(self, letter: str, layer: int | str, head: int | str) -> Any:
        """The Lens of what was kept of a view whose queries and keys the run does not hold; None where it holds them, or kept
        nothing."""
        from lab.inspect.stored import Seen, Stored, light

        have = self.layers(letter)
        if have if head == "rollout" or layer in COMBINED else layer in have:
            return None
        seen = self._seen(letter, layer, head)
        if seen is not None:
            return Seen(seen[0], seen[1]["cells"], head)
        survey = None if head == "rollout" else self._survey(letter)
        if survey is None:
            return None
        model = self.record.get("model") or {}
        with self._lock:
            if letter not in self._light:
                heads, kv = survey.largest.shape[1], int(model.get("kv_heads") or 1)
                kinds, window = model.get("layer_types") or (), model.get("sliding_window")
                self._light[letter] = [
                    light(self.arrays, letter, n, survey.tokens, heads, kv,
                          window if n < len(kinds) and kinds[n] == "sliding_attention" else None)
                    for n in survey.layers
                ]
            return Stored(survey, self._light[letter], head, layer)

    def _survey(self, letter: str) -> Any:
        from lab.inspect.stored import unpack

        with self._lock:
            if self._surveys.get(letter) is None:
                found = self.result(overview_name(letter))
                self._surveys[letter] = None if found is None else unpack(*found)
            return self._surveys[letter]

    def seen_layers(self, letter: str, layer: int | str, head: int | str) -> list[int]:
        """Layers that a kept view combines: those it was drawn of, else those of the overview."""
        seen = self._seen(letter, layer, head)
        return self.overview_layers(letter) if seen is None else list(seen[0].get("layers") or ())

    def _seen(self, letter: str, layer: int | str, head: int | str) -> Any:
        """(about, arrays) of a view of all layers as it was drawn and kept; None where there is none."""
        seen = self.result(seen_name(letter, layer, head))
        return seen if seen is not None and "cells" in seen[1] else None

    def overview_layers(self, letter: str) -> list[int]:
        """Layers of which the run keeps an overview."""
        survey = self._survey(letter)
        return [] if survey is None else list(survey.layers)

    def must_keep(self, letter: str) -> bool:
        """True when a variant's queries and keys are not saved with the run, so that what is drawn of it should be."""
        return any(name.startswith(f"qk/{letter}/") for name in self._replayed)

    def _needed(self, letter: str) -> list[int]:
        found = self.layers(letter)
        if not found and self.overview_layers(letter):
            raise LabError(f"This view of variant {letter} was never drawn while the run's queries and keys were there",
                           "The overview that was kept holds every head, and the reductions that follow from them",
                           "Load the run's model and replay it")
        if not found:
            raise LabError(f"This run holds no captured attention of variant {letter}",
                           fix="Load the run's model and replay it to capture attention")
        return found

    def _cut(self, letter: str, layer: int, tokens: int | None) -> Any:
        from lab.inspect.lens import trim

        capture = self.capture(letter, layer)
        if tokens is None or tokens >= capture.tokens:
            return capture
        with self._lock:  # kept, because what is derived from a capture is stored under its serial
            key = (letter, layer, tokens)
            if key not in self._trimmed:
                self._trimmed[key] = trim(capture, tokens)
            return self._trimmed[key]

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Arrays that a replay brought."""
        with self._lock:
            self._replayed |= {name for name in arrays if name.startswith("qk/") and name not in self.arrays}
            self.arrays = {**self.arrays, **arrays}  # whoever reads the arrays before it goes on reading those
            self._forget()

    def replayed_bytes(self) -> int:
        """Bytes of queries and keys that replays brought."""
        with self._lock:
            return sum(self.arrays[name].nbytes for name in self._replayed)

    def let_go(self) -> None:
        """Drop what replays brought; it can be captured again."""
        with self._lock:
            self.arrays = {name: array for name, array in self.arrays.items() if name not in self._replayed}
            self._replayed.clear()
            self._forget()

    def _forget(self) -> None:
        self._captures.clear()
        self._trimmed.clear()
        self._stats.clear()

    def result(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """(about, arrays) of something computed from this run, now or before it was saved."""
        return kept.unpack(name, self.arrays)

    def results(self) -> list[str]:
        """Names of what was computed from this run."""
        return kept.names(self.arrays)

    def remember(self, name: str, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Keep something computed from this run, with the saved run where there is one. A failed save loses nothing."""
        packed, start = kept.pack(name, about, arrays), kept.prefix(name)
        with self._lock:
            self.arrays = {**{k: v for k, v in self.arrays.items() if not k.startswith(start)}, **packed}
            self._surveys.clear()
            self._light.clear()
        if self._save is None or sum(a.nbytes for a in packed.values()) > kept.MOST_BYTES:
            return
        try:
            self._save(start, packed)
        except Exception as problem:  # a run that somebody else shared, a full disk: the result is on screen all the same
            log.info("a result was not saved with its run: %s", problem)

    def stats(self, letter: str, layer: int) -> Any:
        """lab.inspect HeadStats of one layer, computed once."""
        from lab.inspect.heads import stats

        if (letter, layer) not in self._stats:
            self._stats[letter, layer] = stats(self.capture(letter, layer))
        return self._stats[letter, layer]

    def cache_map(self, letter: str) -> Any:
        """lab.inspect CacheMap of one variant. Raises LabError when the run did not record it."""
        from lab.inspect.cachemap import CacheMap

        with self._lock:
            if letter not in self._maps:
                self._maps[letter] = CacheMap.from_arrays(self.arrays, letter)
            return self._maps[letter]

    def _lanes(self, letter: str, layer: int | str, head: int | str) -> list[tuple[Any, slice]]:
        """(capture, its KV heads) of everything that `layer` and `head` mean."""
        chosen = [self.capture(letter, n) for n in (self._needed(letter) if layer in COMBINED else [int(layer)])]
        return [(c, slice(None) if isinstance(head, str) else slice(c.kv_head(head), c.kv_head(head) + 1)) for c in chosen]

    def evicted_at(self, letter: str, layer: int | str, head: int | str, i: int) -> np.ndarray | None:
        """bool [T]: entries that row i could have read, had every KV head of `head` (in every layer) not evicted them."""
        lanes = self._lanes(letter, layer, head)
        if any(c.death is None for c, _ in lanes):
            return None
        death = np.max([np.asarray(c.death.cpu())[part].max(axis=0) for c, part in lanes], axis=0)
        return (death <= i) & (np.arange(death.size) <= i)

    def bits_at(self, letter: str, layer: int | str, head: int | str, i: int, j: int) -> int | None:
        """Fewest bits in which row i read entry j; None when the run did not record it."""
        found = []
        for c, part in self._lanes(letter, layer, head):
            if c.bits is not None:
                bits = np.asarray(c.bits.cpu())[part, j]
                narrow = np.ones_like(bits, dtype=bool) if c.demoted is None else np.asarray(c.demoted.cpu())[part, j] <= i
                found.append(int(np.where(narrow & (bits > 0), bits, 16).min()))
        return min(found, default=None)


def overview_name(letter: str) -> str:
    """Under which name the overview of every head is kept."""
    return f"{letter}/overview"


def seen_name(letter: str, layer: int | str, head: int | str) -> str:
    """Under which name a view of several layers is kept once it was drawn."""
    return f"{letter}/seen/{'all' if head == 'rollout' else layer}-{head}"


class Shelf:
    """The open runs of all visitors, by unguessable key. The least recently used leave when it is full."""

    def __init__(self, keep: int = KEEP) -> None:
        self._runs: OrderedDict[str, OpenRun] = OrderedDict()
        self._keep, self._lock = keep, threading.Lock()

    def put(self, run: OpenRun, key: str | None = None) -> str:
        """Keep a run and return its key."""
        key = key or secrets.token_urlsafe(12)
        with self._lock:
            self._runs[key] = run
            for old in [k for k in self._runs if k != "recorded"][: max(0, len(self._runs) - self._keep)]:
                del self._runs[old]
        return key

    def find(self, record: dict[str, Any], owner: str) -> OpenRun | None:
        """A run that this owner has open already, the same in every respect, or None."""
        with self._lock:
            for run in self._runs.values():
                if run.owner == owner and run.record.get("run_id") == record.get("run_id") and run.record == record:
                    return run
        return None

    def rename(self, run_id: str, name: str, owner: str) -> None:
        """An owner's run has another name now, wherever it is open."""
        with self._lock:
            for run in self._runs.values():
                if run.owner == owner and run.record.get("run_id") == run_id:
                    run.record = {**run.record, "name": name}

    def make_room(self, limit: int = REPLAYED_BYTES) -> None:
        """Let go of what replays brought to the runs that were used least recently, until the rest fits."""
        with self._lock:
            runs = list(dict.fromkeys(self._runs.values()))  # one run may lie here under several keys
        for run in runs[:-1]:
            if sum(r.replayed_bytes() for r in runs) <= limit:
                return
            run.let_go()

    def get(self, key: str | None) -> OpenRun | None:
        """The run of a key, or None when it has left."""
        with self._lock:
            if key in self._runs:
                self._runs.move_to_end(key)
                return self._runs[key]
        return None
