"""Figures and tables of a diagnostic's arrays, drawn as its declaration says."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from .figures import layout
from .format import DASH, decimal, esc

SERIES = ("#3f6fb5", "#d98a00", "#009e73", "#7d5fb2", "#c2410c", "#7d8594")
DASHES = ("solid", "dash", "dot", "dashdot")
DIVERGING = [[0, "#b5651d"], [0.25, "#e8a55a"], [0.5, "#e9e9ec"], [0.75, "#7aa3db"], [1, "#1f3f8f"]]
DEPTH = [[0, "#3f7fd0"], [0.5, "#a86a9a"], [1, "#e08a00"]]  # first to last layer; all of it shows on white and on black
GROUPS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#ee7733", "#009988", "#997700",
          "#bb5566", "#6699cc")  # told apart by the colour-blind, and every group has its number or its marker as well
DARK_GROUPS = (0, 2, 5, 8, 9, 10)
MARKERS = ("circle", "square", "diamond", "cross", "triangle-up", "star")
NAMED_SERIES, MOST_ROWS = 8, 200  # more lines than this are a family coloured by order, not names to be told apart
WIDE, WIDE_CELLS = 100, 20  # times its median that the largest value is where a straight scale would hide the rest


def along(figure: Any, axis: str, size: int, arrays: dict[str, np.ndarray], layers: list[int]) -> list[Any] | None:
    """Words or numbers along an axis of a figure: captured layers, declared words, an array named like the axis, the middle of
    bins, or counted where the axis is one to be counted. None where the result says nothing of the axis."""
    from lab.inspect.diagnostics import COUNTED

    words = figure.words.get(axis)
    if axis == "layer" and size == len(layers):
        return list(layers)
    if words is not None and not isinstance(words, Mapping) and len(words) >= size:
        return list(words[:size])
    for name in (axis, axis + "s", axis.replace(" ", "_"), axis.replace(" ", "_") + "s"):
        found = arrays.get(name)
        if found is not None and found.ndim == 1 and found.size == size and name != figure.array:
            return [(words or {}).get(x, x) if isinstance(x, str) else x for x in found.tolist()]
    edges = arrays.get("edges")
    if edges is not None and edges.ndim == 1 and edges.size == size + 1:
        return ((edges[:-1] + edges[1:]) / 2).tolist()
    return list(range(COUNTED[axis][0], COUNTED[axis][0] + size)) if axis in COUNTED else None


def labels(figure: Any, axis: str, size: int, arrays: dict[str, np.ndarray], layers: list[int]) -> list[Any]:
    """What stands along an axis; counted from 0 where a result of an older lab says nothing of it."""
    found = along(figure, axis, size, arrays, layers)
    return list(range(size)) if found is None else found


def text(x: Any) -> str:
    """A word or a number as it is written along an axis."""
    return x if isinstance(x, str) else f"{x:.4g}" if isinstance(x, float) else str(x)


def heading(axis: str) -> str:
    """What a reader is told of an axis."""
    from lab.inspect.diagnostics import COUNTED

    return COUNTED[axis][1] if axis in COUNTED else axis


def number(x: Any, share: bool = False) -> str:
    """A number of a result: whole ones whole, a share in per cent, others with three digits that mean something."""
    value = float(x)
    if not np.isfinite(value):
        return DASH
    if share:
        return f"{100 * value:.3g} %"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return decimal(value, 3) if abs(value) < 1 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _none(values: np.ndarray) -> list[Any]:
    return [[None if not np.isfinite(x) else float(x) for x in row] for row in np.atleast_2d(values.astype(np.float64))]


def drawable(figure: Any, arrays: dict[str, np.ndarray]) -> bool:
    """True when a result holds something to draw for a figure."""
    found = arrays.get(figure.array)
    return found is not None and found.size > 0 and bool(np.isfinite(np.asarray(found, dtype=np.float64)).any())


def whole(declared: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> bool:
    """False for a result of an older lab that lacks a figure, or what stands along one of its axes."""
    if absent(declared, arrays):
        return False
    shapes = [(f, np.asarray(arrays[f.array]).shape) for f in declared.figures if drawable(f, arrays)]
    return all(along(f, axis, size, arrays, layers) is not None for f, shape in shapes if len(shape) == len(f.axes)
               for axis, size in zip(f.axes, shape, strict=True))


def absent(declared: Any, arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """[title, why] of the figures that a result holds nothing for."""
    return [[f.title, f.absent] for f in declared.figures if f.absent and not drawable(f, arrays)]


def numbers(declared: Any, arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """[words before, number, words after] of what stands in one number. One without a declaration goes by its name."""
    told = {n.array: n for n in declared.numbers}
    known = [name for name in told if name in arrays] + [name for name in arrays if name not in told]
    out = []
    for name in known:
        x, said = arrays[name], told.get(name)
        if x.ndim == 0 and x.dtype.kind in "fiu" and np.isfinite(x):
            before, _, after = said.text.partition("{}") if said else (name.replace("_", " ") + " ", "", "")
            out.append([before, number(x, bool(said and said.share)), after])
    return out


def wide(values: np.ndarray, factor: float = WIDE) -> bool:
    """True when values span orders of magnitude, none negative and few zero: a straight scale would show the largest only."""
    there = np.asarray(values, dtype=np.float64)
    there = there[np.isfinite(there)]
    some = there[there > 0]
    if some.size < 2 or (there < 0).any() or some.size < there.size / 2:
        return False
    return float(some.max()) > factor * float(np.median(some))


def apart(lines: np.ndarray) -> bool:
    """True when a whole line would lie on the zero line of a straight scale beside the others."""
    usual = [float(np.median(line[line > 0])) for line in lines if (line > 0).any()]
    few = (lines < 0).any() or (lines > 0).mean() < 0.5
    return len(usual) > 1 and not few and float(np.nanmax(lines)) > WIDE * min(usual)


def folded(words: str, most: int = 30) -> str:
    """A title broken near its middle where it is longer than an axis."""
    spaces = [n for n, c in enumerate(words) if c == " "]
    if len(words) <= most or not spaces:
        return words
    cut = min(spaces, key=lambda n: abs(n - len(words) // 2))
    return f"{words[:cut]}<br>{words[cut + 1 :]}"


def _powers(values: np.ndarray) -> dict[str, Any]:
    """Ticks of a colour bar over log10 of positive values, written as the values themselves."""
    low, high = (float(np.log10(x)) for x in (values.min(), values.max()))
    whole = np.arange(np.ceil(low), np.floor(high) + 1)
    at = whole if len(whole) > 1 else np.linspace(low, high, 4)
    return {"tickvals": at.tolist(), "ticktext": [f"{10**e:,.0f}" if e >= 0 else f"{10**e:.2g}" for e in at]}


def _bar(title: str) -> dict[str, Any]:
    return {"thickness": 10, "outlinewidth": 0, "exponentformat": "e",
            "title": {"text": esc(title), "side": "right", "font": {"size": 11}}}


def _heat(out: go.Figure, values: np.ndarray, rows: list[str], cols: list[str], figure: Any) -> None:
    """Cells with their values on hover, by order of magnitude where they span many."""
    values = np.asarray(values, dtype=np.float64)
    signed, log = bool((values < 0).any() and (values > 0).any()), wide(values, WIDE_CELLS)
    bar, shown = _bar(figure.unit), values
    if log:
        some = values > 0
        shown = np.full(values.shape, np.nan)
        shown[some] = np.log10(values[some])
        zeros = ", blank: 0" if (values == 0).any() else ""
        bar = _bar(f"{figure.unit} (log scale{zeros})".strip()) | _powers(values[some])
    gap = 1 if max(len(rows), len(cols)) <= 64 else 0
    out.add_heatmap(z=_none(shown), customdata=_none(values), x=cols, y=rows, xgap=gap, ygap=gap, zmid=0 if signed else None,
                    colorscale=DIVERGING if signed else "Cividis", colorbar=bar,
                    hovertemplate=f"{esc(figure.axes[0])} %{{y}} · {esc(figure.axes[-1])} %{{x}}<br>%{{customdata:.4g}}"
                                  "<extra></extra>")


def _grouped(out: go.Figure, values: np.ndarray, rows: list[str], cols: list[str]) -> None:
    """Cells in the colour of their group with its number in it; the legend names the groups.

    The number's colour is a span's, as lab.css sets that of all other text.
    """
    ink = [f'<span style="color:{"#fff" if n in DARK_GROUPS else "#111"}">{n + 1}</span>' for n in range(len(GROUPS))]
    count = int(values.max()) + 1
    steps = [[x / count, GROUPS[n % len(GROUPS)]] for n in range(count) for x in (n, n + 1)]
    out.add_heatmap(z=values.tolist(), x=cols, y=rows, xgap=1, ygap=1, zmin=-0.5, zmax=count - 0.5, colorscale=steps,
                    showscale=False, customdata=(values + 1).tolist(),
                    text=[[ink[n % len(ink)] for n in line] for line in values.tolist()],
                    texttemplate="%{text}" if values.shape[1] <= 16 else None, textfont={"size": 11},
                    hovertemplate="layer %{y} · head %{x}<br>group %{customdata}<extra></extra>")
    for n in range(count):
        out.add_scatter(x=[None], y=[None], mode="markers", name=f"group {n + 1}", showlegend=True,
                        marker={"color": GROUPS[n % len(GROUPS)], "symbol": "square", "size": 10})


def _names(shape: tuple[int, ...], layers: list[int]) -> list[str]:
    """"layer 3, head 2" of every cell of [layers, heads], row after row."""
    real = layers if len(layers) == shape[0] else range(shape[0])
    return [f"layer {layer}, head {head}" for layer in real for head in range(shape[1])]


def _points(out: go.Figure, values: np.ndarray, cells: np.ndarray | None, layers: list[int]) -> None:
    """Points; where they are heads each says which, and heads of a group share colour and marker."""
    known = cells is not None and cells.size == len(values)
    names = np.array(_names(cells.shape, layers) if known else [str(n) for n in range(len(values))])
    grouped = known and cells.dtype.kind in "iu"
    groups = cells.ravel() if grouped else np.zeros(len(values), dtype=int)
    for n in range(int(groups.max()) + 1):
        mine = groups == n
        out.add_scatter(x=values[mine, 0].tolist(), y=values[mine, 1].tolist(), mode="markers", name=f"group {n + 1}",
                        showlegend=grouped, text=names[mine].tolist(),
                        hovertemplate="%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
                        marker={"color": GROUPS[n % len(GROUPS)] if grouped else SERIES[0], "size": 7, "opacity": 0.8,
                                "symbol": MARKERS[n % len(MARKERS)]})


def _thumbnails(out: go.Figure, members: np.ndarray, maps: np.ndarray, layers: list[int], unit: str) -> go.Figure:
    """A row of small maps for every group, each under the name of its head; one picture of cells, so that it stays light."""
    names, flat = _names(maps.shape, layers), maps.reshape(-1, *maps.shape[2:])
    side, room = maps.shape[-1], max(6, maps.shape[-1] // 2)
    high, broad = side + room, side + max(2, side // 8)
    picture = np.full((len(members) * high, members.shape[1] * broad), np.nan)
    for row, line in enumerate(members):
        for column, head in enumerate(line):
            if head < 0:
                continue
            one = np.asarray(flat[head], dtype=np.float64)
            one = one / np.maximum(np.nanmax(np.where(np.isfinite(one), one, 0), axis=1, keepdims=True), 1e-12)
            top, left = row * high + room, column * broad
            picture[top : top + side, left : left + side] = one
            out.add_annotation(x=left + side / 2, y=top - 1, text=names[head].replace(", ", "<br>"), showarrow=False,
                               font={"size": 9}, yanchor="bottom")
    rounded = [[None if x is None else round(x, 2) for x in line] for line in _none(picture)]
    out.add_heatmap(z=rounded, colorscale="Cividis", hoverinfo="skip", colorbar=_bar(unit))
    layout(out, "", "", 60 + 96 * len(members)).update_xaxes(visible=False)
    middle = [row * high + room + side / 2 for row in range(len(members))]
    marks = [f'<span style="color:{GROUPS[n % len(GROUPS)]}">■</span> group {n + 1}' for n in range(len(members))]
    return out.update_yaxes(autorange="reversed", tickvals=middle, ticktext=marks, showgrid=False)


def lies(x: list[Any]) -> bool:
    """True where names are so long that they are read only beside the y axis."""
    return any(isinstance(n, str) and len(n) > 14 for n in x)


def _bars(out: go.Figure, x: list[Any], y: list[Any]) -> None:
    """Upright, or lying where the names are long."""
    along = {"x": y, "y": x, "orientation": "h"} if lies(x) else {"x": x, "y": y}
    out.add_bar(**along, marker={"color": SERIES[0], "line": {"width": 0}}, showlegend=False)
    out.update_layout(bargap=0.05 if len(x) > 60 else 0.2)


def _lines(out: go.Figure, figure: Any, values: np.ndarray, x: list[Any], names: list[Any]) -> None:
    """One line each. Many are thin and coloured from first to last, all of them drawn; a bar says which colour is which."""
    many = len(values) > NAMED_SERIES and not any(isinstance(n, str) for n in names)
    shades = sample_colorscale(DEPTH, np.linspace(0, 1, len(values)).tolist()) if many else []
    for n, line in enumerate(_none(values)):
        look = {"color": shades[n], "width": 1.2} if many else {
            "color": SERIES[n % len(SERIES)], "dash": DASHES[n // len(SERIES) % len(DASHES)], "width": 2}
        name = figure.phrase.format(text(names[n])) if len(names) else figure.title
        along = {"x": line, "y": x} if lies(x) else {"x": x, "y": line}
        out.add_scatter(**along, mode="lines+markers" if len(x) < 40 and not many else "lines", name=esc(name), line=look,
                        showlegend=len(values) > 1 and not many)
    if many:
        out.add_scatter(x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip", marker={
            "color": [names[0]], "cmin": names[0], "cmax": names[-1], "colorscale": DEPTH, "showscale": True,
            "colorbar": _bar(heading(figure.axes[0]))})


def draw(figure: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> go.Figure:
    """One declared figure. Axis text of many names is thinned by Plotly; missing values stay empty."""
    values, axes = np.asarray(arrays[figure.array]), figure.axes
    cells, out = arrays.get(figure.cells), go.Figure()
    if figure.kind in ("matrix", "groups"):
        rows, cols = ([text(x) for x in labels(figure, a, n, arrays, layers)] for a, n in zip(axes, values.shape, strict=True))
        (_grouped(out, values, rows, cols) if figure.kind == "groups" else _heat(out, values, rows, cols, figure))
        layout(out, heading(axes[-1]), heading(axes[0]), max(220, min(620, 90 + 16 * len(rows))))
        return out.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")
    if figure.kind == "thumbnails":
        return _thumbnails(out, values, cells, layers, figure.unit)
    if figure.kind == "scatter":
        _points(out, values, cells, layers)
        return layout(out, axes[0], axes[-1]).update_yaxes(rangemode="normal")
    x, grid = labels(figure, axes[-1], values.shape[-1], arrays, layers), np.atleast_2d(values)
    log, unit = wide(values) or figure.kind == "lines" and values.ndim == 2 and apart(values), figure.unit
    if log:
        unit, grid = f"{unit} (log scale)".strip(), np.where(grid > 0, grid, np.nan)
    if figure.kind == "bars":
        there = np.flatnonzero(np.isfinite(grid[0]))  # a window of a long run is drawn as wide as the window
        x, grid = x[there[0] : there[-1] + 1], grid[:, there[0] : there[-1] + 1]
        _bars(out, x, _none(grid)[0])
    else:
        _lines(out, figure, grid, x, labels(figure, axes[0], len(grid), arrays, layers) if values.ndim > 1 else [])
    if lies(x):
        layout(out, unit, "", 110 + 24 * len(x)).update_yaxes(autorange="reversed", rangemode="normal")
        begin = "tozero" if figure.kind == "bars" and not log else "normal"
        return out.update_xaxes(type="log" if log else "-", rangemode=begin)
    layout(out, heading(axes[-1]), folded(unit), 280 if figure.kind == "bars" else 320)
    if figure.kind != "bars" or log:
        out.update_yaxes(rangemode="normal")
    if figure.log == "x" and all(not isinstance(v, str) and v > 0 for v in x):
        out.update_xaxes(type="log", title={"text": f"{heading(axes[-1])} (log scale)"})
        if len(x) <= 8:  # the blocks themselves are better ticks than those of a logarithmic axis
            out.update_xaxes(tickvals=x, ticktext=[text(v) for v in x])
    return out.update_yaxes(type="log") if log else out


def _grid(figure: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> tuple[str, list[str], list[str], list[list[str]]]:
    """(corner, column names, row names, cells as text) of a figure's table."""
    values, axes = np.asarray(arrays[figure.array]), figure.axes
    cells = arrays.get(figure.cells)
    if figure.kind == "scatter":
        known = cells is not None and cells.size == len(values)
        names = _names(cells.shape, layers) if known else [str(n) for n in range(len(values))]
        return "head" if known else "point", list(axes), names, [[number(x) for x in line] for line in values]
    if values.ndim == 1:
        rows = [text(x) for x in labels(figure, axes[0], len(values), arrays, layers)]
        return heading(axes[0]), [figure.unit or "value"], rows, [[number(x)] for x in values]
    rows, cols = ([text(x) for x in labels(figure, a, n, arrays, layers)] for a, n in zip(axes, values.shape, strict=True))
    if figure.kind == "thumbnails":
        heads = _names(cells.shape, layers)
        body = [[heads[n] if n >= 0 else DASH for n in line] for line in values]
    else:
        body = [[number(x + 1 if figure.kind == "groups" else x) for x in line] for line in values]
    if figure.kind == "lines":  # one line is one column, which reads better downwards
        return heading(axes[1]), [figure.phrase.format(x) for x in rows], cols, [list(line) for line in zip(*body, strict=True)]
    return f"{heading(axes[0])} \\ {heading(axes[1])}", cols, rows, body


def table(figure: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> str:
    """The same numbers as a table, folded away. Long ones are cut and say so."""
    corner, cols, rows, cells = _grid(figure, arrays, layers)
    head = "".join(f'<th scope="col">{esc(c)}</th>' for c in cols[:64])
    body = "".join(f'<tr><th scope="row" class="num">{esc(name)}</th>'
                   + "".join(f'<td class="num">{esc(x)}</td>' for x in line[:64]) + "</tr>"
                   for name, line in zip(rows[:MOST_ROWS], cells[:MOST_ROWS], strict=True))
    cut = []
    if len(rows) > MOST_ROWS:
        cut.append(f"the first {MOST_ROWS} of {len(rows):,} rows")
    if len(cols) > 64:
        cut.append(f"the first 64 of {len(cols):,} columns")
    note = f'<p class="soft note">Shown: {esc(" and ".join(cut))}.</p>' if cut else ""
    unit = f" ({figure.unit})" if figure.unit else ""
    return (f'<details class="figtable"><summary>Table</summary>{note}<div class="tablebox tall"><table class="lines">'
            f'<caption class="sr">{esc(figure.title + unit)}</caption><thead><tr><th scope="col">{esc(corner)}</th>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div></details>")
