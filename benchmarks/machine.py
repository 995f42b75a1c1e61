"""The machine a figure was measured on."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, threads, libraries and, where there is one, the GPU."""
    from lab.measure.record import environment

    return dict(environment())


def spread(values: list[float]) -> dict[str, float]:
    """Median with the quartiles."""
    ordered = sorted(values)
    quarters = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {"median": statistics.median(ordered), "q1": quarters[0], "q3": quarters[2]}


def write(name: str, payload: dict[str, Any]) -> Path:
    """Save a result beside the others, with its machine in it."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **payload}, indent=1) + "\n")
    return path
