"""Diagnostics of the literature in the Attention tab: what each needs and takes, a Run button, figures and their tables."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lab.errors import LabError

from . import assets, probes
from .controller import Lab
from .opened import OpenRun
from .sessions import of_model, paragraphs, read_of, session
from .tasks import Task, Told

SLOTS = 6  # the most figures that a diagnostic declares
GONE = "This run is no longer open on the server. Open it again from Runs."


def name_of(letter: str, name: str) -> str:
    """Under which name a result is kept with its run."""
    return f"{letter}/diagnostic/{name}"


def value(lab: Lab, key: str | None, **more: Any) -> dict[str, Any]:
    """The list of diagnostics, the run they would read, and what was computed from it before."""
    from lab.inspect.diagnostics import registry

    run = lab.shelf.get(key)
    variants = [] if run is None else [{"letter": v["letter"], "title": v.get("title") or v.get("spec"),
                                        "layers": run.layers(v["letter"])}
                                       for v in run.record.get("variants") or [] if not v.get("error")]
    total = None if run is None else (run.record.get("model") or {}).get("layers")
    fits = run is None or lab.replayable(run)
    listed = [{"name": d.name, "title": d.title, "paper": d.paper.title, "arxiv": d.paper.arxiv, "year": d.paper.year,
               "help": d.help, "explanation": d.explanation, "model": of_model(d.needs), "captures": "captures" in d.needs,
               "before": before(lab, run, d, fits), "inputs": [asdict(i) for i in d.inputs]}
              for d in sorted(registry().values(), key=lambda d: d.title)]
    return {"key": key if run is not None else None, "variants": variants, "total": total, "list": listed,
            "kept": kept(run), **more}


def before(lab: Lab, run: OpenRun | None, declared: Any, fits: bool) -> list[str]:
    """What a person should know before Run is pressed: what is read and how long it takes, and what is still missing."""
    said = [declared.before] if declared.before else []
    if of_model(declared.needs) and not lab.loaded:
        said.append("It needs the model, and none is loaded: press Run in Compare once.")
    elif of_model(declared.needs) and not fits:
        said.append("Another model is loaded than the one that made this run: load that one in Compare first.")
    if run is not None and "documents" in declared.needs and paragraphs(run) is None:
        said.append("This prompt has fewer than three paragraphs before its last part: say below what separates its documents.")
    return said


def kept(run: OpenRun | None) -> dict[str, list[str]]:
    """{letter: names of diagnostics whose result is kept with the run}."""
    out: dict[str, list[str]] = {}
    for name in run.results() if run is not None else []:
        parts = name.split("/")
        if len(parts) == 3 and parts[1] == "diagnostic":
            out.setdefault(parts[0], []).append(parts[2])
    return out


def asked_for(declared: Any, given: Any) -> dict[str, str]:
    """What a person gave, as text, empty fields left out: two equal ones ask the same."""
    given = given if isinstance(given, dict) else {}
    found = {i.name: str(given.get(i.name) or "").strip() for i in declared.inputs}
    return {name: text for name, text in found.items() if text}


def known(run: OpenRun, letter: str, declared: Any, given: dict[str, str] | None) -> tuple[dict[str, Any], Any] | None:
    """(about, arrays) kept of a diagnostic: with these inputs and of all layers captured now, or, for None, whatever there is."""
    found = run.result(name_of(letter, declared.name))
    if found is None or given is None:
        return found
    about = found[0]
    same = about.get("given") == given and set(about.get("layers") or []) >= set(run.layers(letter))
    return found if same and probes.whole(declared, found[1], list(about.get("layers") or [])) else None


def _task(lab: Lab, run: OpenRun, letter: str, declared: Any, given: dict[str, str]) -> Task:
    """The work of one diagnostic on one variant, begun once; its result is kept with the run."""
    from lab.inspect.diagnostics import run as compute
    from lab.inspect.scores import Cancelled

    layers = run.layers(letter)
    key = ("diagnostic", declared.name, letter, str(given), tuple(layers))

    def work(told: Told) -> Any:
        def progress(fraction: float) -> None:
            if told.cancelled():
                raise Cancelled()
            told.progress(fraction)
        found = session(lab, run, letter, declared, given)
        progress(0.0)
        arrays = compute(declared.name, found, progress)
        about = {"given": given, "layers": layers, "read": read_of(run, letter, declared)}
        run.remember(name_of(letter, declared.name), about, arrays)
        return about, arrays
    task = run.tasks.get(key)
    if task is None or task.problem is not None or not task.running:
        task = run.tasks[key] = Task(lab, work)
        run.tasks["diagnostic"] = task
    return task


def stopper(lab: Lab) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The server function behind Cancel."""
    def stop(ask: dict[str, Any]) -> dict[str, Any]:
        run = lab.shelf.get(str((ask or {}).get("key")))
        task = run.tasks.get("diagnostic") if run is not None else None
        going = task is not None and task.running
        if going:
            task.cancel()
        return {"stopped": going}
    return stop


def empty() -> list[Any]:
    """No figure in any slot."""
    return [x for _ in range(SLOTS) for x in (gr.update(visible=False), gr.skip(), gr.skip(), gr.skip())]


def drawn(declared: Any, about: dict[str, Any], arrays: Any) -> list[Any]:
    """Updates of all slots for a result."""
    layers = [int(n) for n in about.get("layers") or []]
    slots: list[Any] = []
    for figure in [f for f in declared.figures if probes.drawable(f, arrays)][:SLOTS]:
        slots += [gr.update(visible=True), f'<h4 class="h">{probes.esc(figure.title)}</h4>',
                  probes.draw(figure, arrays, layers), probes.table(figure, arrays, layers)]
    return [*slots, *empty()[len(slots):]]


def runner(lab: Lab) -> Callable[[gr.EventData], Iterator[Any]]:
    """Compute one diagnostic with progress, then fill the figure slots. `show` in the ask: only what is kept.

    What is refused or cancelled leaves the figures that were there before.
    """
    def work(event: gr.EventData) -> Iterator[Any]:
        from lab.inspect.diagnostics import registry

        ask = event._data or {}
        key, letter, name = (str(ask.get(k) or "") for k in ("key", "letter", "name"))
        told: dict[str, Any] = {"chosen": name, "letter": letter}
        run, declared = lab.shelf.get(key), registry().get(name)

        def end(problem: str) -> list[Any]:
            return [{**value(lab, key), **told, "problem": problem}, *[gr.skip()] * len(empty())]
        if run is None:
            yield [{**value(lab, key), **told, "problem": GONE}, *empty()]
            return
        try:
            if declared is None:
                raise LabError(f'There is no diagnostic "{name}"', fix="Choose one from the list")
            run.variant(letter)
            given = asked_for(declared, ask.get("given"))
            found = known(run, letter, declared, None if ask.get("show") else given)
            task = None if found is not None or ask.get("show") else _task(lab, run, letter, declared, given)
        except LabError as problem:
            yield end(str(problem))
            return
        if task is not None:
            while task.running:
                yield [{**value(lab, key), **told, "fraction": task.fraction}, *[gr.skip()] * len(empty())]
                task.join(0.4)
            if task.problem is not None:
                yield end(task.problem)
                return
            found = task.result
        if found is None:
            yield [{**value(lab, key), **told}, *empty()]
            return
        about, arrays = found
        done = {"name": name, "letter": letter, "read": about.get("read"), "layers": about.get("layers"),
                "given": about.get("given") or {}, "numbers": probes.numbers(declared, arrays),
                "absent": probes.absent(declared, arrays)}
        yield [{**value(lab, key), **told, "done": done}, *drawn(declared, about, arrays)]
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
