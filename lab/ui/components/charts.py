"""Two small charts under the columns, as inline SVG: KV bytes along the sequence, and step time with its spread."""
from __future__ import annotations

from statistics import quantiles
from typing import Any

from ..format import duration, esc, missing, size

WIDTH, HEIGHT = 560, 170
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 12, 28
LABEL = 12.0  # height of a letter beside its curve


def _series(record: dict[str, Any]) -> list[tuple[str, list[tuple[int, float]]]]:
    prompt = len((record.get("prompt") or {}).get("token_ids") or [])
    out = []
    for variant in record.get("variants") or []:
        tokens = variant.get("tokens") or []
        points = [(prompt + i, t["kv_bytes"]) for i, t in enumerate(tokens) if not missing(t.get("kv_bytes"))]
        if len(points) > 1:
            out.append((variant["letter"], points))
    return out


def kv_chart(record: dict[str, Any]) -> str:
    """Measured KV bytes of each variant at every generated token."""
    series = _series(record)
    if not series:
        return ""
    xs = [x for _, points in series for x, _ in points]
    top = max(y for _, points in series for _, y in points) or 1
    x0, x1 = min(xs), max(xs) or 1

    def px(x: float) -> float:
        return LEFT + (x - x0) / max(1, x1 - x0) * (WIDTH - LEFT - RIGHT - 16)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
             f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{esc(size(y))}</text>' for y in (0, top / 2, top)]
    rising = sorted(series, key=lambda one: one[1][-1][1])
    places: dict[str, float] = {}
    lowest = HEIGHT - BOTTOM + LABEL
    for letter, points in rising:  # labels that would touch are moved up
        lowest = places[letter] = min(py(points[-1][1]), lowest - LABEL)
    highest = TOP - LABEL
    for letter, _ in reversed(rising):  # and down again where that would lift them out of the picture
        highest = places[letter] = max(places[letter], highest + LABEL)
    for letter, points in series:
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        end = places[letter]
        parts.append(f'<path class="line v{esc(letter)}" d="{path}"/>'
                     f'<text class="tag v{esc(letter)}" x="{px(points[-1][0]) + 6:.1f}" y="{end + 4:.1f}">{esc(letter)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">token {x0:,}</text>'
                 f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">token {x1:,}</text>')
    words = "; ".join(f"{letter} ends at {size(points[-1][1])}" for letter, points in series)
    return _figure("KV bytes along the sequence · measured", "".join(parts), words)


def step_chart(record: dict[str, Any]) -> str:
    """Median and middle half of the measured decode steps of each variant."""
    rows = []
    for variant in record.get("variants") or []:
        times = [t["step_ms"] for t in variant.get("tokens") or [] if not missing(t.get("step_ms"))]
        if times:
            rows.append((variant["letter"], *_quarters(times), times))
    if not rows:
        return ""
    top = max(high for _, _, _, high, _ in rows) * 1.25

    def px(ms: float) -> float:
        return 44 + ms / top * (WIDTH - 44 - RIGHT - 70)
    gap = (HEIGHT - TOP - BOTTOM) / len(rows)
    parts = []
    for i, (letter, low, middle, high, _) in enumerate(rows):
        y = TOP + gap * (i + 0.5)
        parts.append(f'<text class="tag v{esc(letter)}" x="14" y="{y + 4:.1f}">{esc(letter)}</text>'
                     f'<line class="axis" x1="44" x2="{px(top):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<line class="spread v{esc(letter)}" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<circle class="dot v{esc(letter)}" cx="{px(middle):.1f}" cy="{y:.1f}" r="5"/>'
                     f'<text x="{WIDTH - RIGHT}" y="{y + 4:.1f}" text-anchor="end">{esc(duration(middle))}</text>')
    parts.append(f'<text x="44" y="{HEIGHT - 8}">0</text>'
                 f'<text x="{px(top):.1f}" y="{HEIGHT - 8}" text-anchor="end">{esc(duration(top))}</text>')
    words = "; ".join(f"{letter} median {duration(middle)}" for letter, _, middle, _, _ in rows)
    return _figure("Step time · median and middle half, measured", "".join(parts), words)


def _quarters(times: list[float]) -> tuple[float, float, float]:
    """Lower quarter, median, upper quarter; of few steps none lies beyond what was measured."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = quantiles(times, n=4, method="exclusive" if len(times) > 3 else "inclusive")
    return low, middle, high


def _figure(title: str, body: str, words: str) -> str:
    return (f'<figure class="plot"><figcaption class="h">{esc(title)}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}: {esc(words)}">{body}</svg></figure>')


def charts(record: dict[str, Any] | None) -> str:
    """Both charts, or nothing for a run without tokens."""
    if not record:
        return ""
    both = kv_chart(record) + step_chart(record)
    return f'<div class="plots">{both}</div>' if both else ""
