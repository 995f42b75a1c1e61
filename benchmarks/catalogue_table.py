"""The catalogue as the README shows it: one row per policy, from results/catalogue.json.

    python benchmarks/catalogue_table.py            print the table
    python benchmarks/catalogue_table.py --readme   write it into README.md, between its marks

KL is in nats; perplexity is divided by the dense cache's on the same text, seed by seed; needles are the share found with one
hidden fact and with four. ± is half of a 95% t interval over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKS = ("<!-- catalogue -->", "<!-- /catalogue -->")
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> str:
    """"mean ± half" of a 95% t interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return f"{mean:.2f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def table(result: dict[str, Any]) -> str:
    """Markdown of a catalogue's rows: policies that meet shares, then those with a size of their own."""
    rows = result["rows"]
    dense = [v["perplexity"] for v in next(r for r in rows if r["policy"] == "Dense")["values"]]
    shares = sorted({r["target"] for r in rows if r["target"]}, reverse=True)
    by_policy: dict[str, dict[float, dict]] = {}
    for row in rows:
        if row["target"]:
            by_policy.setdefault(row["policy"], {})[row["target"]] = row
    middle = shares[len(shares) // 2]
    lines = [
        "| policy | " + " | ".join(f"KL at {s:.1%}".replace(".0%", "%") for s in shares)
        + f" | perplexity ×, {middle:.1%} | needle, {middle:.1%} | of four, {middle:.1%} |",
        "|---|" + "---|" * (len(shares) + 3),
    ]

    def order(item: tuple[str, dict[float, dict]]) -> tuple[bool, float]:
        row = item[1].get(middle)
        return row is None, row["kl"]["mean"] if row else 0.0

    for name, found in sorted(by_policy.items(), key=order):
        cells = [_figure(found.get(s), "kl") for s in shares]
        row = found.get(middle)
        lines.append(f"| {name} | " + " | ".join([*cells, _ratio(row, dense), _figure(row, "one"), _figure(row, "many")]) + " |")
    lines += ["", "| fixed size | stored | KL | perplexity × | needle | of four |", "|---|---|---|---|---|---|"]
    for row in sorted((r for r in rows if not r["target"]), key=lambda r: -r["share"]["mean"]):
        lines.append(f"| {row['policy']} | {row['share']['mean']:.1%} | {_figure(row, 'kl')} | {_ratio(row, dense)} | "
                     f"{_figure(row, 'one')} | {_figure(row, 'many')} |")
    return "\n".join(lines)


def _figure(row: dict | None, name: str) -> str:
    return "cannot" if row is None else interval([v[name] for v in row["values"]])


def _ratio(row: dict | None, dense: list[float]) -> str:
    return "cannot" if row is None else interval([v["perplexity"] / d for v, d in zip(row["values"], dense)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    text = table(json.loads((HERE / "results" / "catalogue.json").read_text()))
    if not options.readme:
        print(text)
        return
    whole = README.read_text(encoding="utf-8")
    before, rest = whole.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
