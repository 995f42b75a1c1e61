"""Every head of every captured layer: thumbnails and the measures to sort them by, computed once and kept with the run."""
from __future__ import annotations

from typing import Any

import numpy as np

from lab.errors import LabError

from .controller import Lab
from .maps import pack, shade
from .opened import OpenRun, overview_name
from .tasks import Task, Told

SIDE = 32
MEASURES = ("entropy", "sink_rate", "mean_distance", "induction", "previous", "far_mass", "importance")


def ids_of(run: OpenRun, letter: str) -> list[int]:
    """Token ids of the prompt and of what the variant wrote."""
    return [*((run.record.get("prompt") or {}).get("token_ids") or []), *(run.variant(letter).get("token_ids") or [])]


def importance(lab: Lab, run: OpenRun, letter: str) -> np.ndarray | None:
    """float32 [L, Hq] gradient importance of every head on the run's last tokens (1905.10650), each layer to norm 1.

    None where the run's model is not loaded, or is no ordinary decoder.
    """
    if not (lab.loaded and lab.replayable(run)):
        return None
    import torch

    from lab.inspect.diagnostics.importance import TOKENS, gate_gradients, normalised
    from lab.inspect.diagnostics.probe import ModelProbe

    try:
        probe = ModelProbe(lab.ensure_model().model)
        ids = torch.as_tensor(ids_of(run, letter)[-TOKENS:], device=probe.device)
        return normalised(gate_gradients(probe, ids)).numpy()
    except LabError:
        return None


def draw(lab: Lab, run: OpenRun, letter: str, layers: list[int], told: Told) -> None:
    """Thumbnails and measures of every head of the given layers, kept with the run under ``name_of``."""
    from lab.inspect import heads, stored
    from lab.inspect.survey import SIDE as FINE
    from lab.inspect.survey import rows_to_read, survey

    captures, ids = [run.capture(letter, n) for n in layers], ids_of(run, letter)
    known = ids if len(ids) >= captures[0].tokens else None
    drawn = survey(captures, FINE, rows_to_read(captures), lambda f: told.progress(f * 0.8), told.cancelled)
    if run.must_keep(letter):
        run.remember(overview_name(letter), *stored.pack(drawn))
    by = -(-drawn.largest.shape[-1] // SIDE)
    rows = []
    for n, capture in enumerate(captures):
        rows += heads.table([capture], known, cancel=told.cancelled)
        told.progress(0.8 + (n + 1) / len(captures) * 0.15)
    weigh = importance(lab, run, letter)
    for r in rows:
        inside = weigh is not None and r["layer"] < weigh.shape[0] and r["head"] < weigh.shape[1]
        r["importance"] = float(weigh[r["layer"], r["head"]]) if inside else float("nan")
    about = {"layers": layers, "step": drawn.step * by, "sampled": drawn.read is not None, "tokens": captures[0].tokens,
             "measures": list(MEASURES), "importance": weigh is not None}
    run.remember(name_of(letter), about, {
        "thumbs": np.stack([shade(np.sqrt(thumbnail(head, by)), False)[0] for layer in drawn.largest for head in layer]),
        "values": np.array([[r[m] for m in MEASURES] for r in rows], dtype=np.float32),
        "heads": np.array([[r["layer"], r["head"], r["kv_head"]] for r in rows], dtype=np.int16)})


def thumbnail(cells: np.ndarray, by: int) -> np.ndarray:
    """Cells [n, n] as the largest of each by x by of them; NaN where none is visible."""
    n = cells.shape[0]
    x = np.full((-(-n // by) * by,) * 2, -1.0, np.float32)
    x[:n, :n] = np.nan_to_num(cells, nan=-1.0)
    x = x.reshape(x.shape[0] // by, by, -1, by).max((1, 3))
    return np.where(x < 0, np.nan, x)


def name_of(letter: str) -> str:
    """Under which name a variant's grid is kept."""
    return f"{letter}/grid"


def known(run: OpenRun, letter: str) -> dict[str, Any] | None:
    """The kept grid as the browser draws it, or None."""
    found = run.result(name_of(letter))
    if found is None:
        return None
    about, arrays = found
    try:
        heads, values, thumbs = arrays["heads"], arrays["values"], arrays["thumbs"]
        if not len(heads) == len(values) == len(thumbs) or thumbs.dtype != np.uint8:
            return None
        rows = [{"layer": int(h[0]), "head": int(h[1]), "kv": int(h[2]),
                 **{m: float(x) if np.isfinite(x) else None for m, x in zip(about["measures"], v, strict=True)}}
                for h, v in zip(heads, values, strict=True)]
        return {"side": int(thumbs.shape[-1]), "thumbs": pack(thumbs), "heads": rows,
                **{k: about[k] for k in ("step", "layers", "sampled", "tokens", "importance")}}
    except (KeyError, ValueError, IndexError):
        return None


def grid(lab: Lab, run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Start or follow the drawing of a variant's heads: {"fraction"} while it lasts, then everything.

    `ask`: letter; `start` to begin (again) whatever is kept; `drop` to give up. After a replay that the run cannot keep, the
    first drawing begins by itself, since what it leaves with the run is all that will be there tomorrow. With what is kept
    comes `better`: that more layers, or the importance, could be had by drawing again.
    """
    letter = str(ask["letter"])
    layers, kept, key = run.layers(letter), known(run, letter), ("grid", letter)
    task = run.tasks.get(key)
    if task is not None and ask.get("drop"):
        task.cancel()
        run.tasks.pop(key, None)
        run.tasks["not by itself", letter] = True
        return kept or {"idle": True}
    by_itself = layers and run.must_keep(letter) and not run.overview_layers(letter)
    by_itself = by_itself and ("not by itself", letter) not in run.tasks
    if task is None and (ask.get("start") or by_itself):
        if not layers:
            raise LabError(f"This run holds no captured attention of variant {letter}",
                           fix="Load the run's model and replay it to capture attention")
        task = run.tasks[key] = Task(lab, lambda told: draw(lab, run, letter, layers, told))
        task.join(0.3)
    if task is not None and task.running:
        return {"fraction": task.fraction}
    if task is not None:
        run.tasks.pop(key, None)
        if task.problem is not None:
            return {"error": task.problem}
        kept = known(run, letter)
    if kept is None:
        if not layers:
            raise LabError(f"This run holds no captured attention of variant {letter}",
                           fix="Load the run's model and replay it to capture attention")
        return {"idle": True}
    more = len(set(layers) - set(kept["layers"]))
    missing = not kept["importance"] and lab.loaded and lab.replayable(run)
    return {**kept, "better": bool(layers) and (more > 0 or missing) and set(layers) >= set(kept["layers"])}
