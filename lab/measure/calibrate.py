"""Calibration as a step of its own: what a technique needs to learn about a model, learnt once and kept in a file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from typing import Any, Callable

from lab.engine.learnt import Calibration, file_name
from lab.engine.slots import Technique
from lab.engine.stack import Stack, near
from lab.errors import LabError

HELPERS = ("common", "prompts", "replay", "labelled")  # modules of lab.measure.fitting that are no technique
Progress = Callable[[float, str], None]


def calibratable() -> list[str]:
    """Names of the techniques that learn from a model beforehand."""
    from lab.measure import fitting

    return sorted(info.name for info in pkgutil.iter_modules(fitting.__path__) if info.name not in HELPERS)


def calibrate(
    technique: Technique | str, loaded: Any, progress: Progress | None = None, *, revision: str | None = None,
    options: dict[str, str] | None = None,
) -> Calibration:
    """Learn a technique's values from a model.

    Args:
        technique: an instance, whose parameters (window, budget, ...) are those learnt under, or a name or spec.
        loaded: a LoadedModel. progress: called with (fraction, text). revision: what to note as the model's revision;
            its own by default, "*" for values that serve every revision. options: how much to measure, by the names of
            `options_of`; text is converted.
    Returns a Calibration; `.save(path)` keeps it, `default_name(technique, loaded)` is what "auto" looks for.
    Raises LabError for a technique that learns nothing, or a model that cannot be learnt from.
    """
    technique = _instance(technique)
    if technique.name not in calibratable():
        raise LabError(f"{technique.title} learns nothing beforehand", f"These do: {', '.join(calibratable())}")
    module = importlib.import_module(f"lab.measure.fitting.{technique.name}")
    if getattr(module, "GRADIENTS", False) and loaded.facts.weights not in ("float32", "bfloat16"):
        raise LabError(
            f"{technique.title} learns with gradients, which {loaded.facts.weights} weights do not give",
            "It needs float weights", "Load the model with weights=float32",
        )
    chosen = _options(technique, options or {})
    report = progress or (lambda fraction, text: None)
    start = time.perf_counter()
    tensors = module.fit(technique, loaded.model, loaded.tokenizer, report, **chosen)
    report(1.0, f"{technique.title} is calibrated")
    return Calibration(
        technique.name, technique.version, loaded.facts.id, loaded.facts.revision if revision is None else revision, tensors,
        {p.name: getattr(technique, p.name) for p in technique.parameters() if p.name != "calibration"} | chosen,
        f"{module.__doc__.splitlines()[0]} Measured on {loaded.facts.id}, revision {loaded.facts.revision}, "
        f"{loaded.facts.weights} weights, in {time.perf_counter() - start:.0f} s.",
    )


def options_of(technique: str) -> dict[str, Any]:
    """What can be said about how a technique is calibrated (samples, steps, ...), with defaults."""
    module = importlib.import_module(f"lab.measure.fitting.{technique}")
    simple = (int, float, str, bool)
    return {n: p.default for n, p in inspect.signature(module.fit).parameters.items()
            if p.kind is p.KEYWORD_ONLY and isinstance(p.default, simple)}


def _options(technique: Technique, given: dict[str, str]) -> dict[str, Any]:
    """The options in the types of their defaults. Raises LabError for one that does not exist or does not fit."""
    known, out = options_of(technique.name), {}
    for name, text in given.items():
        if name not in known:
            raise LabError(f'The calibration of {technique.title} has no option "{name}"', near(name, known))
        kind = type(known[name])
        try:
            out[name] = text if kind is str else kind(float(text))
        except (TypeError, ValueError):
            raise LabError(f"{name}={text} is not a number", f"By default {name} is {known[name]}") from None
    return out


def default_name(technique: Technique | str, loaded: Any) -> str:
    """The file name under which calibration=auto finds it in LAB_CALIBRATION or assets/calibration."""
    return file_name(_instance(technique).name, loaded.facts.id)


def _instance(technique: Technique | str) -> Technique:
    if isinstance(technique, Technique):
        return technique
    stack = Stack.parse(technique)
    if len(stack.techniques) != 1:
        raise LabError(f'"{technique}" is not one technique', "Calibrate one at a time")
    return stack.techniques[0]
