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
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.intervals import interval  # noqa: E402

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKS = ("<!-- catalogue -->", "<!-- /catalogue -->")


def grouped(rows: list[dict[str, Any]]) -> tuple[list[float], list[float], dict[str, dict[float, dict]]]:
    """(the dense perplexities, the shares from the largest, rows by policy and share)."""
    dense = [v["perplexity"] for v in next(r for r in rows if r["policy"] == "Dense")["values"]]
    by_policy: dict[str, dict[float, dict]] = {}
    for row in rows:
        if row["target"]:
            by_policy.setdefault(row["policy"], {})[row["target"]] = row
    return dense, sorted({r["target"] for r in rows if r["target"]}, reverse=True), by_policy


def shown(values: list[float]) -> str:
    """"mean ± half" of a 95% t interval."""
    mean, half = interval(values)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def figure(row: dict | None, name: str) -> str:
    """Mean ± half of a figure, or that the share cannot be met."""
    return "cannot" if row is None else shown([v[name] for v in row["values"]])


def ratio(row: dict | None, dense: list[float]) -> str:
    """Perplexity over the dense one's on the same text."""
    return "cannot" if row is None else shown([v["perplexity"] / d for v, d in zip(row["values"], dense)])


def place(text: str, marks: tuple[str, str]) -> None:
    """Write `text` into README.md, between its marks."""
    before, rest = README.read_text(encoding="utf-8").split(marks[0])
    README.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Markdown of a catalogue's rows: policies that meet shares, then those with a size of their own."""
    rows = result["rows"]
    dense, shares, by_policy = grouped(rows)
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
        cells = [figure(found.get(s), "kl") for s in shares]
        row = found.get(middle)
        lines.append(f"| {name} | " + " | ".join([*cells, ratio(row, dense), figure(row, "one"), figure(row, "many")]) + " |")
    lines += ["", "| fixed size | stored | KL | perplexity × | needle | of four |", "|---|---|---|---|---|---|"]
    for row in sorted((r for r in rows if not r["target"]), key=lambda r: -r["share"]["mean"]):
        lines.append(f"| {row['policy']} | {row['share']['mean']:.1%} | {figure(row, 'kl')} | {ratio(row, dense)} | "
                     f"{figure(row, 'one')} | {figure(row, 'many')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    text = table(json.loads((HERE / "results" / "catalogue.json").read_text()))
    if options.readme:
        place(text, MARKS)
    else:
        print(text)


if __name__ == "__main__":
    main()
