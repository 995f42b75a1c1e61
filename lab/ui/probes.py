"""Figures and tables of a diagnostic's arrays, drawn as its declaration says."""
from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from .figures import layout
from .format import decimal, esc

SERIES = ("#3f6fb5", "#d98a00", "#009e73", "#7d5fb2", "#c2410c", "#7d8594")
DASHES = ("solid", "dash", "dot", "dashdot")
DIVERGING = [[0, "#b5651d"], [0.25, "#e8a55a"], [0.5, "#e9e9ec"], [0.75, "#7aa3db"], [1, "#1f3f8f"]]
MOST_SERIES, MOST_ROWS = 12, 200
WIDE = 1000  # positive values that span more than this are drawn on a logarithmic scale


def labels(axis: str, size: int, arrays: dict[str, np.ndarray], layers: list[int]) -> list[str]:
    """Names along an axis: captured layers, an array named like the axis, bin edges, else counted from 0."""
    if axis == "layer" and size == len(layers):
        return [str(n) for n in layers]
    for name in (axis, axis + "s", axis.replace(" ", "_"), axis.replace(" ", "_") + "s"):
        found = arrays.get(name)
        if found is not None and found.ndim == 1 and found.size == size and name != axis:
            return [str(x) if found.dtype.kind in "US" else f"{x:g}" for x in found]
    edges = arrays.get("edges")
    if edges is not None and edges.ndim == 1 and edges.size == size + 1:
        return [f"{a:.3g} to {b:.3g}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [str(i) for i in range(size)]


def _numbers(names: list[str]) -> list[Any]:
    """Names that are numbers get an axis of numbers."""
    try:
        return [float(n) for n in names]
    except ValueError:
        return list(names)


def _none(values: np.ndarray) -> list[Any]:
    return [[None if not np.isfinite(x) else float(x) for x in row] for row in np.atleast_2d(values.astype(np.float64))]


def drawable(figure: Any, arrays: dict[str, np.ndarray]) -> bool:
    """True when a result holds something to draw for a figure."""
    found = arrays.get(figure.array)
    return found is not None and found.size > 0 and bool(np.isfinite(np.asarray(found, dtype=np.float64)).any())


def numbers(arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """The single figures of a result, named: what stands in one number."""
    return [[name.replace("_", " "), decimal(float(x), 4)] for name, x in arrays.items()
            if x.ndim == 0 and x.dtype.kind in "fiu" and np.isfinite(x)]


def wide(values: np.ndarray) -> bool:
    """True when positive values span several orders of magnitude: on a straight scale only the largest would show."""
    there = np.asarray(values, dtype=np.float64)
    there = there[np.isfinite(there)]
    return there.size > 1 and bool((there > 0).all()) and float(there.max()) > WIDE * float(np.median(there))


def _heat(out: go.Figure, values: np.ndarray, rows: list[str], cols: list[str], axes: tuple[str, ...]) -> None:
    """Cells with their values on hover, by order of magnitude where they span many."""
    signed, log = bool((values < 0).any() and (values > 0).any()), wide(values)
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0}
    if log:
        bar |= {"tickprefix": "10<sup>", "ticksuffix": "</sup>", "dtick": 1}
    gap = 1 if max(len(rows), len(cols)) <= 64 else 0
    out.add_heatmap(z=_none(np.log10(values) if log else values), customdata=_none(values), x=cols, y=rows, xgap=gap, ygap=gap,
                    zmid=0 if signed else None, colorscale=DIVERGING if signed else "Cividis", colorbar=bar,
                    hovertemplate=f"{esc(axes[0])} %{{y}} · {esc(axes[-1])} %{{x}}<br>%{{customdata:.4g}}<extra></extra>")


def draw(figure: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> go.Figure:
    """One declared figure. Axis text of many names is thinned by Plotly; missing values stay empty."""
    values, axes = np.asarray(arrays[figure.array]), figure.axes
    out = go.Figure()
    if figure.kind == "matrix" and values.ndim == 2:
        rows, cols = (labels(a, n, arrays, layers) for a, n in zip((*axes, "")[:2], values.shape, strict=False))
        _heat(out, values, rows, cols, axes)
        layout(out, axes[-1], axes[0], max(220, min(620, 90 + 16 * len(rows))))
        return out.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")
    if figure.kind == "scatter" and values.ndim == 2 and values.shape[-1] == 2:
        out.add_scatter(x=values[:, 0], y=values[:, 1], mode="markers", marker={"color": SERIES[0], "size": 7, "opacity": 0.75})
        return layout(out, axes[0], axes[-1]).update_yaxes(rangemode="normal")
    x = _numbers(labels(axes[-1], values.shape[-1], arrays, layers))
    if figure.kind == "bars" and values.ndim == 1:
        out.add_bar(x=x, y=_none(values)[0], marker={"color": SERIES[0]})
        layout(out, axes[-1], "", 280)
        return out.update_yaxes(type="log", rangemode="normal") if wide(values) else out
    names = labels(axes[0], values.shape[0], arrays, layers) if values.ndim > 1 else [figure.title]
    for n, line in enumerate(_none(values)[:MOST_SERIES]):
        out.add_scatter(x=x, y=line, mode="lines+markers" if len(x) < 40 else "lines", showlegend=values.ndim > 1,
                        name=esc(f"{axes[0]} {names[n]}" if values.ndim > 1 else names[n]),
                        line={"color": SERIES[n % len(SERIES)], "dash": DASHES[n // len(SERIES) % len(DASHES)], "width": 2})
    layout(out, axes[-1], "", 320).update_yaxes(rangemode="normal")
    return out.update_yaxes(type="log") if wide(values) else out


def table(figure: Any, arrays: dict[str, np.ndarray], layers: list[int]) -> str:
    """The same numbers as a table, folded away. Long ones are cut and say so."""
    values, axes = np.asarray(arrays[figure.array]), figure.axes
    grid = values[:, None] if values.ndim == 1 else values
    long = values.ndim == 2 and figure.kind == "lines"  # one line is one column, which reads better downwards
    grid, names = (grid.T, (axes[-1], axes[0])) if long else (grid, (axes[0], axes[-1]))
    rows = labels(names[0], grid.shape[0], arrays, layers)
    if figure.kind == "scatter":
        cols, rows = [*axes], [str(i) for i in range(grid.shape[0])]
    else:
        cols = labels(names[1], grid.shape[1], arrays, layers) if values.ndim == 2 else ["value"]
    shown, wide = grid[:MOST_ROWS], grid.shape[1] > 64
    head = "".join(f'<th scope="col">{esc(c)}</th>' for c in cols[:64])
    body = "".join(f'<tr><th scope="row" class="num">{esc(rows[i])}</th>'
                   + "".join(f'<td class="num">{esc(decimal(float(x), 4))}</td>' for x in line[:64]) + "</tr>"
                   for i, line in enumerate(shown))
    cut = []
    if len(shown) < grid.shape[0]:
        cut.append(f"the first {MOST_ROWS} of {grid.shape[0]:,} rows")
    if wide:
        cut.append(f"the first 64 of {grid.shape[1]:,} columns")
    corner = esc(names[0]) if values.ndim == 1 or figure.kind == "scatter" else f"{esc(names[0])} \\ {esc(names[1])}"
    note = f'<p class="soft note">Shown: {esc(" and ".join(cut))}.</p>' if cut else ""
    return (f'<details class="figtable"><summary>Table</summary>{note}<div class="tablebox tall"><table class="lines">'
            f'<caption class="sr">{esc(figure.title)}</caption><thead><tr><th scope="col">{corner}</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></details>")
