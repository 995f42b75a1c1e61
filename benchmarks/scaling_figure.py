"""Draws results/kernels_gpu_scaling.json as results/kernels_gpu_scaling.svg: decode time against context and batch.

    python benchmarks/scaling_figure.py
"""

from __future__ import annotations

import json
import math
import os

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
SERIES = [("baseline_us", "best bf16 library", "#6b7280"), ("ours_16_us", "ours, 16 bits", "#1d4ed8"),
          ("ours_8_us", "8 bits", "#0891b2"), ("ours_4_us", "4 bits", "#16a34a"), ("ours_2_us", "2 bits", "#ea580c")]
WIDTH, HEIGHT, LEFT, TOP = 420, 300, 76, 40


def panel(rows: list[dict], key: str, title: str, x0: int) -> list[str]:
    """One log-log panel with its axes."""
    xs = [r[key] for r in rows]
    ys = [r[s] for r in rows for s, _, _ in SERIES]
    lx, hx = math.log2(min(xs)), math.log2(max(xs))
    ly, hy = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(x: float, y: float) -> tuple[float, float]:
        return (x0 + LEFT + (math.log2(x) - lx) / (hx - lx) * (WIDTH - LEFT - 16),
                TOP + (hy - math.log10(y)) / (hy - ly) * (HEIGHT - TOP - 48))

    out = [f'<text x="{x0 + LEFT}" y="22" font-weight="600">{title}</text>']
    for e in range(ly, hy + 1):
        x, y = at(min(xs), 10**e)
        out.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x0 + WIDTH - 16}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{10**e:g} µs</text>')
    for x in xs:
        px, py = at(x, 10**ly)
        label = f"{x >> 20}M" if x >= 1 << 20 else f"{x >> 10}k" if x >= 1024 else str(x)
        out.append(f'<text x="{px:.1f}" y="{py + 20:.1f}" text-anchor="middle">{label}</text>')
    for s, _, colour in SERIES:
        points = " ".join("{:.1f},{:.1f}".format(*at(r[key], r[s])) for r in rows)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return out


def main() -> None:
    """Write the figure."""
    with open(os.path.join(HERE, "kernels_gpu_scaling.json")) as f:
        data = json.load(f)
    context = sorted((r for r in data["rows"] if r["batch"] == 1), key=lambda r: r["context"])
    batch = sorted((r for r in data["rows"] if r["context"] == 8192), key=lambda r: r["batch"])
    body = panel(context, "context", "Decode time against context, batch 1", 0)
    body += panel(batch, "batch", "Decode time against batch, 8k tokens", WIDTH)
    for i, (_, name, colour) in enumerate(SERIES):
        x = LEFT + i * 150
        y = HEIGHT + 6
        body.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        body.append(f'<text x="{x + 28}" y="{HEIGHT + 10}">{name}</text>')
    body.append(f'<text x="{LEFT}" y="{HEIGHT + 32}" fill="#6b7280">{data["machine"]["gpu"]}, 32/8 heads of 128, groups of 64,'
                " CUDA graphs, cold L2</text>")
    with open(os.path.join(HERE, "kernels_gpu_scaling.svg"), "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT + 44}" '
                'font-family="system-ui,sans-serif" font-size="12">'
                '<rect width="100%" height="100%" fill="white"/>' + "".join(body) + "</svg>\n")


if __name__ == "__main__":
    main()
