"""The 95% t interval that every table of the catalogue gives."""

from __future__ import annotations

import math
import statistics

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% t interval; the half-width of one value is not a number."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = T95[n - 2] if n - 2 < len(T95) else 2.0
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)
