"""A run that somebody has open: its record, its arrays, and the captures built from them on demand."""
from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from lab.errors import LabError

KEEP = 24


class OpenRun:
    """Record and arrays of one run. Captures and head figures are computed once and kept with it."""

    def __init__(self, record: dict[str, Any], arrays: dict[str, np.ndarray] | None, recorded: bool = False) -> None:
        self.record, self.arrays, self.recorded = record, dict(arrays or {}), recorded
        self._captures: dict[tuple[str, int], Any] = {}
        self._stats: dict[tuple[str, int], Any] = {}
        self._maps: dict[str, Any] = {}
        self._trimmed: dict[tuple[str, int, int], Any] = {}
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
                self._captures[letter, layer] = Capture.from_arrays(self.arrays, letter, layer)
            return self._captures[letter, layer]

    def lens(self, letter: str, layer: int, head: int | str, minus: str | None = None) -> Any:
        """lab.inspect Lens: one head, "mean", "max" or "rollout" of a variant, or its difference from variant `minus`.

        A difference covers the tokens that both runs have.
        """
        from lab.inspect.lens import Difference, Heads, Rollout

        def one(name: str, tokens: int | None = None) -> Any:
            if head != "rollout":
                return Heads([self._cut(name, layer, tokens)], head)
            return Rollout([self._cut(name, n, tokens) for n in self._needed(name)])
        if not minus or minus == letter:
            return one(letter)
        shared = min(one(letter).tokens, one(minus).tokens)
        return Difference(one(minus, shared), one(letter, shared))

    def _needed(self, letter: str) -> list[int]:
        found = self.layers(letter)
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
            self.arrays.update(arrays)
            self._captures.clear()
            self._trimmed.clear()
            self._stats.clear()

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

    def _kv(self, capture: Any, head: int | str) -> slice:
        return slice(None) if isinstance(head, str) else slice(capture.kv_head(head), capture.kv_head(head) + 1)

    def evicted_at(self, letter: str, layer: int, head: int | str, i: int) -> np.ndarray | None:
        """bool [T]: entries that row i could have read, had every KV head of `head` not evicted them."""
        capture = self.capture(letter, layer)
        if capture.death is None:
            return None
        death = np.asarray(capture.death.cpu())[self._kv(capture, head)].max(axis=0)
        return (death <= i) & (np.arange(death.size) <= i)

    def bits_at(self, letter: str, layer: int, head: int | str, i: int, j: int) -> int | None:
        """Fewest bits in which row i read entry j; None when the run did not record it."""
        capture = self.capture(letter, layer)
        if capture.bits is None:
            return None
        lanes = self._kv(capture, head)
        bits = np.asarray(capture.bits.cpu())[lanes, j]
        narrow = np.ones_like(bits, dtype=bool) if capture.demoted is None else np.asarray(capture.demoted.cpu())[lanes, j] <= i
        return int(np.where(narrow & (bits > 0), bits, 16).min())


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

    def get(self, key: str | None) -> OpenRun | None:
        """The run of a key, or None when it has left."""
        with self._lock:
            if key in self._runs:
                self._runs.move_to_end(key)
                return self._runs[key]
        return None
