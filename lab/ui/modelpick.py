"""Change model: another hub id, folder or GGUF file, loaded while its progress shows; the old one stays until it is ready."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lab.errors import LabError

from .components import cards
from .controller import Lab, sentence

WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")


@dataclass
class Parts:
    """The components `app` connects."""

    source: gr.Textbox
    weights: gr.Dropdown
    load: gr.Button
    status: gr.HTML


def build(lab: Lab) -> Parts:
    """The folded panel under the model card; not on a Space, where strangers share the one model."""
    with gr.Accordion("Change model", open=False, visible=not lab.public, elem_id="changemodel", elem_classes="sidebody"):
        source = gr.Textbox(lab.source, label="Model", info="default, a hub id, a folder, or a .gguf file", max_length=500,
                            elem_id="modelsource")
        weights = gr.Dropdown(list(WEIGHTS), value=lab.weights, label="Weights on a CPU",
                              info="auto: the fastest whose KL to float32 is under 0.02", elem_id="modelweights")
        load = gr.Button("Load", elem_id="modelload", size="sm")
        status = gr.HTML("", apply_default_css=False, elem_id="modelstatus")
    return Parts(source, weights, load, status)


def waiter(lab: Lab) -> Any:
    """Load was pressed: the button rests, and the line tells that it waits while a run is under way."""
    def wait() -> tuple[Any, ...]:
        text = "A run is under way; the model is changed when it ends." if lab.busy() else "Waiting for its turn"
        return cards.status(text, busy=True), gr.Button(interactive=False)
    return wait


def refused() -> tuple[Any, ...]:
    """The queue took no more: Load can be pressed again."""
    told = LabError("The model could not be queued", "At most 32 visitors wait at a time", "Press Load again in a moment")
    return cards.error(sentence(told)), gr.Button(interactive=True)


def loader(lab: Lab, header: Any) -> Any:
    """The event behind Load: yields (status, model card, header, button). `header()` gives the page's header."""

    def change(source: str, weights: str) -> Iterator[tuple[Any, ...]]:
        told: dict[str, Any] = {"fraction": 0.0, "text": "Looking for the model", "problem": None}

        def report(fraction: float, text: str) -> None:
            told.update(fraction=fraction, text=text)

        def work() -> None:
            try:
                lab.change_model(source, weights, report)
            except Exception as problem:
                told["problem"] = problem

        if not (source or "").strip():
            problem = LabError("No model was named", "Expected `default`, a hub id, a folder or a .gguf file")
            yield cards.error(sentence(problem)), gr.skip(), gr.skip(), gr.Button(interactive=True)
            return
        thread = threading.Thread(target=work, name="change-model", daemon=True)
        thread.start()
        while thread.is_alive():
            yield cards.status(told["text"], told["fraction"], True), gr.skip(), gr.skip(), gr.Button(interactive=False)
            thread.join(0.25)
        if told["problem"] is not None:
            kept = " The model before it is still loaded." if lab.loaded else ""
            yield cards.error(sentence(told["problem"]) + kept), gr.skip(), gr.skip(), gr.Button(interactive=True)
            return
        yield cards.status("Loaded. Run uses it."), cards.model_card(lab.facts()), header(), gr.Button(interactive=True)
    return change
