"""Plotly figures. Backgrounds are transparent and text colours come from lab.css, so both themes work.

Measured is solid, predicted is dashed, everywhere; a variant keeps its colour and its letter.
"""
from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from .format import duration, missing, size, titles

NEUTRAL = "#7d8594"
SHAPES = {"decode": "circle", "prompt": "diamond"}
COLOURS = {"A": "#7d8594", "B": "#d98a00", "C": "#2a8fd0", "D": "#009e73"}
MARKERS = {"A": "circle", "B": "square", "C": "diamond", "D": "triangle-up"}
MIB, GIB = 2**20, 2**30
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


def named(record: dict[str, Any]) -> dict[str, str]:
    """"A · Dense" by letter: letter and title; a specification would not fit a phone's legend. Plotly reads a little HTML."""
    names = titles(record.get("variants") or [])
    return {letter: f"{letter} · {title}".replace("<", "&lt;") for letter, title in names.items()}


def kv_growth(record: dict[str, Any], growth: Growth) -> go.Figure:
    """KV bytes along the sequence: measured per generated token, then predicted to the model's full context."""
    figure, names = go.Figure(), named(record)
    start = len((record.get("prompt") or {}).get("token_ids") or [])
    for variant in record.get("variants") or []:
        letter = str(variant.get("letter"))
        points = [(start + i, t["kv_bytes"]) for i, t in enumerate(variant.get("tokens") or []) if not missing(t.get("kv_bytes"))]
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[y / MIB for _, y in points], mode="lines+markers", name=names[letter],
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
    return layout(figure, "tokens in the sequence", "KV cache, MiB (log)").update_yaxes(type="log", dtick=1, rangemode="normal")


def step_latency(record: dict[str, Any]) -> go.Figure:
    """Measured time of every decode step."""
    figure, names = go.Figure(), named(record)
    for variant in record.get("variants") or []:
        letter = str(variant.get("letter"))
        points = [(i + 1, t["step_ms"]) for i, t in enumerate(variant.get("tokens") or []) if not missing(t.get("step_ms"))]
        if points:
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers", name=names[letter],
                line={"color": COLOURS.get(letter, "#7d8594"), "width": 1.5},
                marker={"symbol": MARKERS.get(letter, "circle"), "size": 5},
                customdata=[duration(y) for _, y in points],
                hovertemplate=f"{letter} · step %{{x}}<br>%{{customdata}} measured<extra></extra>")
    layout(figure, "generated token", "step time, ms")
    if not figure.data:
        figure.add_annotation(text="This run timed no step.", xref="paper", yref="paper", x=0.5, y=0.5, showarrow=False)
        figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure


def roofline(roof: dict[str, Any], dots: list[dict[str, Any]]) -> go.Figure:
    """A machine's roof and the work under it, on two logarithmic axes.

    roof: {name, flops, bandwidth, measured}. dots: [{letter, kind "decode" | "prompt", intensity, flops (per second), measured,
    text}]; predicted ones are open and lie on the roof, measured ones are filled and lie below it.
    """
    ridge = roof["flops"] / roof["bandwidth"]
    low = min([d["intensity"] for d in dots] + [ridge]) / 3
    high = max([d["intensity"] for d in dots] + [ridge]) * 6
    figure = go.Figure()
    figure.add_scatter(
        x=[low, ridge, high], y=[low * roof["bandwidth"], roof["flops"], roof["flops"]], mode="lines", showlegend=True,
        name="roof, measured" if roof["measured"] else "roof, from its data sheet",
        line={"color": NEUTRAL, "width": 2, "dash": "solid" if roof["measured"] else "dash"},
        hovertemplate="%{x:.3g} FLOP/byte<br>at most %{y:.3s}FLOP/s<extra></extra>")
    for measured in (False, True):
        for kind, shape in SHAPES.items():
            mine = [d for d in dots if d["measured"] == measured and d["kind"] == kind]
            if mine:
                figure.add_scatter(
                    x=[d["intensity"] for d in mine], y=[d["flops"] for d in mine], mode="markers+text", text=_named(mine),
                    textposition="bottom center" if measured else "top center", textfont={"size": 12},
                    name=f"{kind}, {'measured' if measured else 'predicted'}", customdata=[d["text"] for d in mine],
                    marker={"symbol": shape if measured else f"{shape}-open", "size": 11, "color": [_colour(d) for d in mine],
                            "line": {"width": 2, "color": [_colour(d) for d in mine]}},
                    hovertemplate="%{customdata}<extra></extra>")
    layout(figure, "arithmetic intensity, FLOP per byte (log)", "FLOP/s (log)", 360)
    heights = [d["flops"] for d in dots if d["flops"]] + [low * roof["bandwidth"], roof["flops"]]
    figure.update_xaxes(type="log", tickformat="~g", dtick=1)
    ends = [math.log10(min(heights) / 4), math.log10(max(heights) * 4)]
    return figure.update_yaxes(type="log", tickformat="~s", dtick=1, range=ends)


def _colour(dot: dict[str, Any]) -> str:
    return COLOURS.get(dot["letter"], NEUTRAL)


def _named(dots: list[dict[str, Any]]) -> list[str]:
    """Letters beside dots; those that touch each other on these scales share one label."""
    names = [d["letter"] for d in dots]
    for i, d in enumerate(dots):
        for j in range(i):
            other = dots[j]
            if names[j] and all(abs(d[k] / other[k] - 1) < 0.2 for k in ("intensity", "flops") if other[k]):
                names[j], names[i] = f"{names[j]} {names[i]}", ""
                break
    return names


def memory_context(lines: list[dict[str, Any]], limit: float | None, machine: str) -> go.Figure:
    """Predicted bytes of weights and caches against the context, and the memory they have to fit.

    lines: [{letter, label, contexts, bytes, longest}]; longest: the context at which memory runs out, None where it does not.
    """
    figure = go.Figure()
    for line in lines:
        letter, colour = line["letter"], COLOURS.get(line["letter"], NEUTRAL)
        figure.add_scatter(
            x=line["contexts"], y=[b / GIB for b in line["bytes"]], mode="lines", name=line["label"].replace("<", "&lt;"),
            line={"color": colour, "width": 2, "dash": "dash"}, customdata=[size(b) for b in line["bytes"]],
            hovertemplate=f"{letter} · %{{x:,}} tokens<br>%{{customdata}} predicted<extra></extra>")
        if line["longest"] and limit:
            figure.add_scatter(
                x=[line["longest"]], y=[limit / GIB], mode="markers+text", text=[letter], textposition="top center",
                showlegend=False, marker={"symbol": "x", "size": 10, "color": colour},
                hovertemplate=f"{letter} · memory runs out after %{{x:,}} tokens, predicted<extra></extra>")
    if limit and lines:
        ends = [min(line["contexts"][0] for line in lines), max(line["contexts"][-1] for line in lines)]
        figure.add_scatter(
            x=ends, y=[limit / GIB] * 2, mode="lines", name=f"memory of {machine}".replace("<", "&lt;"),
            line={"color": NEUTRAL, "width": 2}, customdata=[size(limit)] * 2, hovertemplate="%{customdata}<extra></extra>")
    return layout(figure, "tokens of context, each sequence", "weights and caches, GiB (log)", 360).update_yaxes(
        type="log", dtick=1, rangemode="normal", tickformat="~g")
