"""Plotly figures. Backgrounds are transparent and text colours come from lab.css, so both themes work.

Measured is solid, predicted is dashed, everywhere; a variant keeps its colour and its letter.
"""
from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from .format import duration, missing, size

COLOURS = {"A": "#7d8594", "B": "#d98a00", "C": "#2a8fd0", "D": "#009e73"}
MARKERS = {"A": "circle", "B": "square", "C": "diamond", "D": "triangle-up"}
MIB = 1024 * 1024
Growth = dict[str, tuple[list[int], list[float]]]


def layout(figure: go.Figure, x: str, y: str, height: int = 340) -> go.Figure:
    """Axes, fonts and transparent backgrounds that every figure shares."""
    axis = {"gridcolor": "#8884", "zeroline": False, "linecolor": "#8888", "tickformat": ",", "automargin": True}
    figure.update_layout(
        height=height, margin={"l": 8, "r": 12, "t": 8, "b": 8}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "Inter, system-ui, sans-serif", "size": 12, "color": "#7b8190"}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        xaxis={**axis, "title": {"text": x}}, yaxis={**axis, "title": {"text": y}, "rangemode": "tozero"})
    return figure


def _label(variant: dict[str, Any]) -> str:
    text = f"{variant.get('letter')} · {variant.get('spec') if variant.get('techniques') else 'dense'}"
    return text.replace("<", "&lt;")  # Plotly reads a little HTML in names


def kv_growth(record: dict[str, Any], growth: Growth) -> go.Figure:
    """KV bytes along the sequence: measured per generated token, then predicted to the model's full context."""
    figure = go.Figure()
    start = len((record.get("prompt") or {}).get("token_ids") or [])
    for variant in record.get("variants") or []:
        letter = str(variant.get("letter"))
        points = [(start + i, t["kv_bytes"]) for i, t in enumerate(variant.get("tokens") or []) if not missing(t.get("kv_bytes"))]
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[y / MIB for _, y in points], mode="lines+markers", name=_label(variant),
                line={"color": COLOURS.get(letter, "#7d8594"), "width": 3},
                marker={"symbol": MARKERS.get(letter, "circle"), "size": [0] * (len(points) - 1) + [8], "opacity": 1},
                customdata=[size(y) for _, y in points],
                hovertemplate=f"{letter} · token %{{x:,}}<br>%{{customdata}} measured<extra></extra>")
        xs, ys = growth.get(letter, ([], []))
        if xs:
            figure.add_scatter(
                x=xs, y=[y / MIB for y in ys], mode="lines", name=f"{letter} · predicted", showlegend=not points,
                line={"color": COLOURS.get(letter, "#7d8594"), "width": 1.5, "dash": "dash"}, opacity=0.75,
                customdata=[size(y) for y in ys],
                hovertemplate=f"{letter} · token %{{x:,}}<br>%{{customdata}} predicted<extra></extra>")
    # Logarithmic, so that a cache of a fiftieth is a line of its own and not the axis.
    return layout(figure, "tokens in the sequence", "KV cache, MiB").update_yaxes(type="log", dtick=1, rangemode="normal")


def step_latency(record: dict[str, Any]) -> go.Figure:
    """Measured time of every decode step."""
    figure = go.Figure()
    for variant in record.get("variants") or []:
        letter = str(variant.get("letter"))
        points = [(i + 1, t["step_ms"]) for i, t in enumerate(variant.get("tokens") or []) if not missing(t.get("step_ms"))]
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers", name=_label(variant),
                line={"color": COLOURS.get(letter, "#7d8594"), "width": 1.5},
                marker={"symbol": MARKERS.get(letter, "circle"), "size": 5},
                customdata=[duration(y) for _, y in points],
                hovertemplate=f"{letter} · step %{{x}}<br>%{{customdata}} measured<extra></extra>")
    return layout(figure, "generated token", "step time, ms")
