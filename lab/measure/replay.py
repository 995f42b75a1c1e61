"""Replaying a saved run: the same tokens through the same stack again, to see what was not saved with it."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import torch

from lab.engine.session import Session
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.measure.record import cache_arrays, capture_arrays


def replay(
    loaded: Any, record: dict[str, Any], letter: str, *, layers: set[int] | None = None,
    progress: Callable[[float], None] | None = None, cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray]:
    """Arrays of one variant, by the names run records use: queries and keys of `layers` (None: all), and the cache's life.

    Raises LabError when another model is loaded than the one the run was made with, or for a letter the run lacks.
    """
    variant = next((v for v in record["variants"] if v["letter"] == letter), None)
    if variant is None:
        have = ", ".join(v["letter"] for v in record["variants"])
        raise LabError(f"This run has no variant {letter}", f"It has {have}")
    made = record["model"]
    if made["id"] != loaded.facts.id:
        raise LabError(
            f"This run was made with {made['id']}, but {loaded.facts.id} is loaded",
            "A replay needs the same model", f"Load {made['source']} first",
        )
    prompt, generated = record["prompt"]["token_ids"], variant["token_ids"]
    session = Session(
        loaded.model, Stack.parse(variant["spec"]), new_tokens=len(generated), seed=record["settings"]["seed"],
        record=True, capture=layers is None,
    )
    total = len(prompt) + len(generated)
    for fraction in session.prefill_steps(prompt, taps=layers):
        _report(progress, cancelled, fraction * len(prompt) / total)
    for i, token in enumerate(generated[:-1]):
        session.step(torch.tensor([token], device=session.device))
        _report(progress, cancelled, (len(prompt) + i) / total)
    arrays = {**cache_arrays(letter, session.cache), **capture_arrays(letter, session.cache)}
    session.close()
    return arrays


def _report(progress: Callable[[float], None] | None, cancelled: Callable[[], bool], fraction: float) -> None:
    if cancelled():
        raise LabError("The replay was stopped")
    if progress is not None:
        progress(fraction)
