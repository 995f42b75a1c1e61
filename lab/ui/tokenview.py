"""The generated texts of all variants coloured by one per-token measure, with both sides' alternatives."""
from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .controller import Lab
from .format import decimal, titles, visible
from .opened import OpenRun
from .tasks import Task, Told


def _alternatives(entries: Any) -> list[list[str]]:
    return [[visible(str(e[1])), decimal(float(e[2]), 3)] for e in (entries or [])[:5]]


def _column(run: OpenRun, variant: dict[str, Any], reference: dict[str, Any], title: str) -> dict[str, Any]:
    from lab.inspect.tokenview import recorded

    tokens, fidelity, fork = variant.get("tokens") or [], variant.get("fidelity") or [], variant.get("first_divergence")
    theirs = reference.get("tokens") or []
    shared = len(tokens) if fork is None else fork + 1
    measures, both = recorded(tokens, fidelity, shared), min(shared, len(theirs))
    return {"letter": variant["letter"], "title": title, "fork": fork,
            "layers": run.layers(variant["letter"]), "text": [str(t.get("text") or "") for t in tokens],
            "own": [_alternatives(t.get("alternatives")) for t in tokens], "values": measures,
            "other": [_alternatives(theirs[i].get("alternatives")) if variant is not reference and i < both else []
                      for i in range(len(tokens))]}


def texts(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Text, measures and alternatives of every variant, as recorded."""
    from lab.inspect.tokenview import MEASURES

    variants = [v for v in run.record.get("variants") or [] if not v.get("error") and v.get("tokens")]
    reference = (run.record.get("variants") or [{}])[0]
    names = titles(run.record.get("variants") or [])
    cols = [_column(run, v, reference, names[v["letter"]]) for v in variants]
    return {"measures": [asdict(m) for m in MEASURES], "cols": cols}


def attention(lab: Lab, run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Start or follow the measures that read captures: {"fraction"}, then {"values": {letter: {name: [..]}}}."""
    letters = [v["letter"] for v in run.record.get("variants") or [] if not v.get("error") and run.layers(v["letter"])]
    layers = {x: run.layers(x) for x in letters}
    key = ("tokenview", str(layers))
    prompt = len((run.record.get("prompt") or {}).get("tokens") or [])

    def work(told: Told) -> dict[str, Any]:
        from lab.inspect.tokenview import attended

        found = {}
        for n, letter in enumerate(letters):
            captures = [run.capture(letter, layer) for layer in layers[letter]]
            found[letter] = attended(captures, prompt, len(run.variant(letter)["tokens"]),
                                     lambda f, n=n: told.progress((n + f) / len(letters)), told.cancelled)
        return {"values": found, "layers": layers}
    task = run.tasks.get(key)
    if task is None:
        task = run.tasks[key] = Task(lab, work)
        task.join(0.3)
    if task.running:
        return {"fraction": task.fraction}
    if task.problem is not None:
        run.tasks.pop(key, None)
        return {"error": task.problem}
    return task.result
