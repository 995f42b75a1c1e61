"""The Memory & speed tab: measured bytes and times, and what the cost model predicts beyond them."""
from __future__ import annotations

from typing import Any

import gradio as gr

from . import figures
from .components import cards, tables
from .controller import Lab

NOTE = ('<p class="soft note"><span class="solidmark"></span> measured in this run '
        '<span class="predmark"></span> predicted from the cost model; nothing beyond the run was executed</p>')


def build(lab: Lab) -> list[Any]:
    """[costs, kv figure, step figure, layers], in the order that `draw` answers."""
    first = draw(lab, "recorded")
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
        gr.HTML('<h2 class="h">Layer by layer</h2>', apply_default_css=False)
        layers = gr.HTML(first[3], apply_default_css=False)
    return [costs, growth, steps, layers]


def draw(lab: Lab, key: str | None) -> tuple[Any, ...]:
    """The tab's four parts for an open run."""
    run = lab.shelf.get(key)
    if run is None:
        nothing = cards.empty("No run is open. Make one in Compare, or open one from Runs.", "Go to Compare", "compare")
        return nothing, None, None, ""
    record = run.record
    growth = {str(v.get("letter")): lab.growth(record, v) for v in record.get("variants") or [] if not v.get("error")}
    return tables.costs(record), figures.kv_growth(record, growth), figures.step_latency(record), tables.layers(record)
