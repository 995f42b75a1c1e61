"""What was computed from a run, as arrays that are saved with it: numbers as they are, words as JSON in bytes."""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

PREFIX = "look/"  # storage keeps such arrays beside the run's own
ABOUT = "about"
WORDS = ":text"
MOST_BYTES = 32 * 2**20  # of one result; larger ones are shown and not saved


def prefix(name: str) -> str:
    """Where the arrays of a result lie."""
    return f"{PREFIX}{name}/"


def pack(name: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A result by array names. ``about`` is JSON-able and says what it is of; doubles are kept as float32."""
    out = {prefix(name) + ABOUT + WORDS: _words(dict(about))}
    for key, value in arrays.items():
        value = np.asarray(value)
        if value.dtype.kind in "US":
            out[prefix(name) + key + WORDS] = _words(value.tolist())
        else:
            out[prefix(name) + key] = value.astype(np.float32) if value.dtype == np.float64 else value
    return out


def unpack(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """(about, arrays) of a result, or None when there is none or it cannot be read (imported files may hold anything)."""
    start = prefix(name)
    try:
        about = _read(arrays[start + ABOUT + WORDS])
        found = {}
        for key, value in arrays.items():
            if key.startswith(start) and key != start + ABOUT + WORDS:
                key = key.removeprefix(start)
                found[key.removesuffix(WORDS)] = np.array(_read(value)) if key.endswith(WORDS) else value
    except (KeyError, ValueError):
        return None
    return (about, found) if isinstance(about, dict) else None


def names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Results that the arrays hold."""
    end = f"/{ABOUT}{WORDS}"
    return sorted(key[len(PREFIX):-len(end)] for key in arrays if key.startswith(PREFIX) and key.endswith(end))


def _words(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode("utf-8"), np.uint8).copy()


def _read(value: np.ndarray) -> Any:
    return json.loads(np.asarray(value, np.uint8).tobytes().decode("utf-8"))
