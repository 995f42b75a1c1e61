"""The Memory & speed tab: measured bytes and times, and what the cost model predicts beyond them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import assets, figures, roof
from .components import cards, tables
from .controller import Lab
from .format import count, esc

NOTE = ('<p class="soft note"><span class="solidmark"></span> measured in this run '
        '<span class="predmark"></span> predicted from the cost model, for this prompt and ever more generated tokens; '
        'nothing beyond the run was executed</p>')
ROOF_NOTE = ('<p class="soft note"><span class="openmark"></span> predicted: on the roof, the fastest there could be '
             '<span class="fullmark"></span> measured in this run, on this machine</p>')
MEMORY_NOTE = ('<p class="soft note"><span class="predmark"></span> predicted for a prompt of that length '
               '<span class="solidmark"></span> what the machine has</p>')
WAITING = '<p class="soft note">Waits for a run.</p>'
NOTHING = (None, WAITING, None, WAITING)  # the figures that depend on the control, without a run


@dataclass(frozen=True)
class Parts:
    """The tab's outputs in the order that `draw` answers, its control, and what was last picked there."""

    outputs: list[Any]
    control: gr.HTML
    picked: gr.State


def build(lab: Lab) -> Parts:
    """The whole tab. Figures that depend on the control are drawn for this machine first."""
    first = draw(lab, "recorded", {})
    with gr.Column(elem_classes="memorytab"):
        costs = gr.HTML(first[0], apply_default_css=False)
        with gr.Row(elem_classes="figrow"):
            with gr.Column(min_width=300, elem_classes="figbox"):
                gr.HTML('<h2 class="h">KV bytes along the sequence</h2>' + NOTE, apply_default_css=False)
                growth = gr.Plot(first[1], show_label=False, container=False, elem_id="kvplot")
            with gr.Column(min_width=300, elem_classes="figbox"):
                gr.HTML('<h2 class="h">Step time</h2><p class="soft note"><span class="solidmark"></span> measured, each step '
                        "timed alone</p>", apply_default_css=False)
                steps = gr.Plot(first[2], show_label=False, container=False, elem_id="stepplot")
        control = gr.HTML(chooser(), apply_default_css=False, elem_id="roofpick", js_on_load=assets.script("roofpick"))
        picked = gr.State({})
        with gr.Row(elem_classes="figrow"):
            with gr.Column(min_width=300, elem_classes="figbox"):
                gr.HTML('<h2 class="h">Roofline</h2>' + ROOF_NOTE, apply_default_css=False)
                line = gr.Plot(first[4], show_label=False, container=False, elem_id="roofplot")
                table = gr.HTML(first[5], apply_default_css=False, elem_id="rooftable")
            with gr.Column(min_width=300, elem_classes="figbox"):
                gr.HTML('<h2 class="h">Memory against context</h2>' + MEMORY_NOTE, apply_default_css=False)
                room = gr.Plot(first[6], show_label=False, container=False, elem_id="roomplot")
                fits = gr.HTML(first[7], apply_default_css=False, elem_id="roomtable")
        gr.HTML('<h2 class="h">Layer by layer</h2>', apply_default_css=False)
        layers = gr.HTML(first[3], apply_default_css=False)
    return Parts([costs, growth, steps, layers, line, table, room, fits], control, picked)


def chooser() -> str:
    """The control: which machine, how many sequences at once, with or without the weights."""
    def select(name: str, label: str, options: list[tuple[Any, str]]) -> str:
        lines = "".join(f'<option value="{esc(v)}">{esc(text)}</option>' for v, text in options)
        return (f'<label class="pick"><span>{esc(label)}</span>'
                f'<select name="{name}" aria-label="{esc(label)}">{lines}</select></label>')
    many = [(n, f"{count(n)} sequence{'s' if n > 1 else ''}") for n in roof.SEQUENCES]
    return ('<div class="roofpick row" role="group" aria-label="machine to predict for">'
            + select("machine", "machine", [(m.name, m.name) for m in roof.machines()])
            + select("sequences", "decoded at once", many)
            + select("view", "roofline of the", list(roof.VIEWS.items())) + "</div>")


def picker(lab: Lab) -> Callable[..., tuple[Any, ...]]:
    """Something else was chosen in the control: the two figures and their tables follow."""
    def choose(key: str, event: gr.EventData) -> tuple[Any, ...]:
        value = dict(event._data or {})
        run = lab.shelf.get(key)
        return (value, *(NOTHING if run is None else roof.draw(lab, run.record, roof.Pick.read(value))))
    return choose


def draw(lab: Lab, key: str | None, picked: Any) -> tuple[Any, ...]:
    """All parts of the tab for an open run and what is picked in the control."""
    run = lab.shelf.get(key)
    if run is None:
        nothing = cards.empty("No run is open. Make one in Compare, or open one from Runs.", "Go to Compare", "compare")
        return nothing, None, None, "", *NOTHING
    record = run.record
    growth = {str(v.get("letter")): lab.growth(record, v) for v in record.get("variants") or [] if not v.get("error")}
    return (tables.costs(record), figures.kv_growth(record, growth), figures.step_latency(record), tables.layers(record),
            *roof.draw(lab, record, roof.Pick.read(picked)))
