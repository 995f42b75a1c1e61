"""Probes of the literature, each declared once: ``registry()`` lists them, ``run(name, session)`` computes
one.

A diagnostic is a function from a ``Session`` (captures and, where it needs them, hidden states, values or
the model) to
named arrays. It never changes what is generated. The declaration carries the help, the two sentences beside
the figure
and how each array is drawn, so that an interface needs to know nothing about a single one.
"""

from lab.inspect.diagnostics import (  # noqa: F401  (importing a module declares its diagnostic)
    atlas,
    basin,
    counterfactual,
    deceive,
    deviation,
    embedding,
    faithfulness,
    groups,
    hallucination,
    importance,
    iou,
    limits,
    long_heads,
    massive,
    mixing,
    prompt_ranking,
    rollout,
    shapes,
    sink_inputs,
    sinks,
    subspace,
    training_drift,
)
from lab.inspect.diagnostics.base import COUNTED, Diagnostic, Figure, Number, Paper, Session, declared, run

__all__ = ["COUNTED", "Diagnostic", "Figure", "Number", "Paper", "Session", "registry", "run"]


def registry() -> dict[str, Diagnostic]:
    """All diagnostics by name."""
    return declared()
