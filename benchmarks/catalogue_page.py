"""The catalogue as an interactive page: quality against stored bytes, one point per policy and share."""

from __future__ import annotations

from pathlib import Path

TITLES = {"kl": "KL(dense || policy), nats", "perplexity": "Perplexity", "one": "One needle found",
          "many": "One of four needles found"}


def page(
    rows: list[dict], path: Path, title: str = "Cache policies at equal bytes",
    axis: str = "stored bytes, % of a dense 16-bit cache",
) -> None:
    """Write a self-contained HTML page of the catalogue's rows. title, axis: what is compared, and what a share is of."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=2, subplot_titles=list(TITLES.values()))
    names = list(dict.fromkeys(r["policy"] for r in rows))
    for number, name in enumerate(names):
        mine = sorted((r for r in rows if r["policy"] == name), key=lambda r: r["share"]["mean"])
        for place, what in enumerate(TITLES):
            figure.add_trace(
                go.Scatter(
                    x=[100 * r["share"]["mean"] for r in mine], y=[r[what]["mean"] for r in mine], name=name, legendgroup=name,
                    showlegend=place == 0, mode="markers+lines", text=[r["spec"] for r in mine],
                    error_y={"type": "data", "array": [r[what]["half"] or 0 for r in mine], "thickness": 1},
                    marker={"symbol": number % 30}, hovertemplate="%{text}<br>%{x:.1f}% of dense<br>%{y:.3f}",
                ),
                row=place // 2 + 1, col=place % 2 + 1,
            )
    figure.update_xaxes(title=axis, type="log")
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_layout(height=1000, title=f"{title}: mean and 95% interval over seeds")
    figure.write_html(path, include_plotlyjs="cdn")
