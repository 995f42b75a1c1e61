"""Diagnostics of the literature in the Attention tab: what each one needs, a Run button, figures and their tables."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lab.errors import LabError

from . import assets, probes
from .controller import Lab
from .opened import OpenRun
from .sessions import of_model, session
from .tasks import Task, Told

SLOTS = 5  # the most figures that a diagnostic declares
GONE = "This run is no longer open on the server. Open it again from Runs."


def value(lab: Lab, key: str | None, **more: Any) -> dict[str, Any]:
    """The list of diagnostics and the run it would read."""
    from lab.inspect.diagnostics import registry

    run = lab.shelf.get(key)
    variants = [] if run is None else [{"letter": v["letter"], "title": v.get("title") or v.get("spec"),
                                        "layers": run.layers(v["letter"])}
                                       for v in run.record.get("variants") or [] if not v.get("error")]
    total = None if run is None else (run.record.get("model") or {}).get("layers")
    listed = [{"name": d.name, "title": d.title, "paper": d.paper.title, "arxiv": d.paper.arxiv, "year": d.paper.year,
               "help": d.help, "explanation": d.explanation, "model": of_model(d.needs), "captures": "captures" in d.needs,
               "words": "marked" in d.needs} for d in sorted(registry().values(), key=lambda d: d.title)]
    return {"key": key if run is not None else None, "variants": variants, "total": total, "list": listed, **more}


def _task(lab: Lab, run: OpenRun, letter: str, name: str, words: str) -> Task:
    """The work of one diagnostic on one variant, begun once and kept with the run."""
    from lab.inspect.diagnostics import registry
    from lab.inspect.diagnostics import run as compute
    from lab.inspect.scores import Cancelled

    declared = registry().get(name)
    if declared is None:
        raise LabError(f'There is no diagnostic "{name}"', fix="Choose one from the list")
    key = ("diagnostic", name, letter, words, tuple(run.layers(letter)))

    def work(told: Told) -> Any:
        def progress(fraction: float) -> None:
            if told.cancelled():
                raise Cancelled()
            told.progress(fraction)
        found = session(lab, run, letter, declared.needs, words)
        progress(0.0)
        return compute(name, found, progress)
    task = run.tasks.get(key)
    if task is None or task.problem is not None:
        task = run.tasks[key] = Task(lab, work)
        run.tasks["diagnostic"] = task
    return task


def stopper(lab: Lab) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The server function behind Cancel."""
    def stop(ask: dict[str, Any]) -> dict[str, Any]:
        run = lab.shelf.get(str((ask or {}).get("key")))
        task = run.tasks.get("diagnostic") if run is not None else None
        if task is not None:
            task.cancel()
        return {"stopped": task is not None}
    return stop


def empty() -> list[Any]:
    """No figure in any slot."""
    return [x for _ in range(SLOTS) for x in (gr.update(visible=False), gr.skip(), gr.skip(), gr.skip())]


def runner(lab: Lab) -> Callable[[gr.EventData], Iterator[Any]]:
    """Compute one diagnostic with progress, then fill the figure slots."""
    def work(event: gr.EventData) -> Iterator[Any]:
        from lab.inspect.diagnostics import registry

        ask = event._data or {}
        key, letter, name, words = (str(ask.get(k) or "") for k in ("key", "letter", "name", "words"))
        kept = {"chosen": name, "letter": letter, "words": words}
        run = lab.shelf.get(key)
        if run is None:
            yield [{**value(lab, key), **kept, "problem": GONE}, *empty()]
            return
        try:
            run.variant(letter)
            task = _task(lab, run, letter, name, words[:200])
        except LabError as problem:
            yield [{**value(lab, key), **kept, "problem": str(problem)}, *empty()]
            return
        while task.running:
            yield [{**value(lab, key), **kept, "fraction": task.fraction}, *[gr.skip()] * len(empty())]
            task.join(0.4)
        if task.problem is not None:
            yield [{**value(lab, key), **kept, "problem": task.problem}, *empty()]
            return
        declared, layers = registry()[name], run.layers(letter)
        drawn = [f for f in declared.figures if f.array in task.result][:SLOTS]
        slots: list[Any] = []
        for figure in drawn:
            slots += [gr.update(visible=True), f'<h4 class="h">{probes.esc(figure.title)}</h4>',
                      probes.draw(figure, task.result, layers), probes.table(figure, task.result, layers)]
        yield [{**value(lab, key), **kept, "done": name}, *slots, *empty()[len(slots):]]
    return work


def build(lab: Lab) -> tuple[gr.HTML, list[Any]]:
    """The list and the figure slots; returns the component and the outputs of `runner`."""
    panel = gr.HTML(value(lab, "recorded"), html_template="", apply_default_css=False, elem_id="diagnostics",
                    js_on_load=assets.script("diagnostics"), server_functions=[stopper(lab)])
    slots: list[Any] = []
    with gr.Row(elem_classes="figrow probes"):
        for n in range(SLOTS):
            with gr.Column(visible=False, elem_classes="figbox") as box:
                head = gr.HTML("", apply_default_css=False)
                plot = gr.Plot(show_label=False, container=False, elem_id=f"probe{n}")
                text = gr.HTML("", apply_default_css=False)
            slots += [box, head, plot, text]
    return panel, [panel, *slots]
