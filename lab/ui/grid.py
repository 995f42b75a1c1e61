"""Every head of every captured layer: thumbnails and the measures to sort them by, computed once per variant."""
from __future__ import annotations

from typing import Any

import numpy as np

from lab.errors import LabError

from .controller import Lab
from .maps import pack, shade
from .opened import OpenRun
from .tasks import Task, Told

SIDE = 32
MEASURES = ("entropy", "sink_rate", "mean_distance", "induction", "previous", "far_mass")


def ids_of(run: OpenRun, letter: str) -> list[int]:
    """Token ids of the prompt and of what the variant wrote."""
    return [*((run.record.get("prompt") or {}).get("token_ids") or []), *(run.variant(letter).get("token_ids") or [])]


def _draw(run: OpenRun, letter: str, layers: list[int], told: Told) -> dict[str, Any]:
    from lab.inspect import heads

    captures, ids, measures = [run.capture(letter, n) for n in layers], ids_of(run, letter), []
    known = ids if len(ids) >= captures[0].tokens else None
    drawn = heads.grid(captures, SIDE, progress=lambda f: told.progress(f / 2), cancel=told.cancelled)
    for n, capture in enumerate(captures):
        measures += heads.table([capture], known, cancel=told.cancelled)
        told.progress(0.5 + (n + 1) / len(captures) / 2)
    thumbs = np.stack([shade(np.sqrt(head), False)[0] for layer in drawn.values for head in layer])
    rows = [{"layer": r["layer"], "head": r["head"], "kv": r["kv_head"],
             **{m: float(r[m]) if np.isfinite(r[m]) else None for m in MEASURES}} for r in measures]
    return {"side": int(thumbs.shape[-1]), "thumbs": pack(thumbs), "heads": rows, "step": drawn.step, "layers": layers,
            "sampled": drawn.sampled, "tokens": captures[0].tokens}


def grid(lab: Lab, run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Start or follow the drawing of a variant's heads: {"fraction"} while it lasts, then everything.

    `ask`: letter; `start` to begin where nothing was begun; `drop` to give up.
    """
    letter = str(ask["letter"])
    layers = run.layers(letter)
    if not layers:
        raise LabError(f"This run holds no captured attention of variant {letter}",
                       fix="Load the run's model and replay it to capture attention")
    key = ("grid", letter, tuple(layers))
    task = run.tasks.get(key)
    if task is not None and ask.get("drop"):
        task.cancel()
        run.tasks.pop(key, None)
        return {"idle": True}
    if task is None:
        if not ask.get("start"):
            return {"idle": True}
        task = run.tasks[key] = Task(lab, lambda told: _draw(run, letter, layers, told))
        task.join(0.3)
    if task.running:
        return {"fraction": task.fraction}
    if task.problem is not None:
        run.tasks.pop(key, None)
        return {"error": task.problem}
    return task.result
