"""Keeping a run that goes on: what it has so far is handed to a store every few seconds, so that a crash loses little."""

from __future__ import annotations

import logging
import time
from typing import Any, Callable, Iterator

from lab.engine.events import Event
from lab.measure.experiment import Experiment

log = logging.getLogger("lab")

EVERY_S = 3.0
SHARE = 0.02  # of the run's time at most: a slow disk is asked less often


def kept(
    experiment: Experiment, checkpoint: Callable[[dict[str, Any]], None], every: float = EVERY_S, share: float = SHARE,
) -> Iterator[Event]:
    """The experiment's events; between two of them, `checkpoint(record)` is called every `every` seconds at most, and
    so seldom that it takes no more than `share` of the time.

    A checkpoint that fails is logged and ends the checkpoints, never the run: what matters is saved at the end, where a
    failure is told.
    """
    due = time.monotonic() + every
    for event in experiment.events():
        yield event
        if time.monotonic() < due:
            continue
        start = time.monotonic()
        try:
            checkpoint(experiment.snapshot())
        except Exception as problem:
            log.warning("the run could not be kept while it goes on: %s", problem)
            due = float("inf")
            continue
        end = time.monotonic()
        due = end + max(every, (end - start) / share)


__all__ = ["kept"]
