"""The read side of the catalogue as the README shows it, from results/catalogue_read.json and catalogue_prefill.json.

    python benchmarks/catalogue_read_table.py            print both tables
    python benchmarks/catalogue_read_table.py --readme   write them into README.md, between their marks

Columns are those of the stored side; "to choose" is the part of what is read that only serves to choose (of a dense step's
bytes; for prompts, work of choosing over that of dense attention). ± is half of a 95% t interval over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.catalogue_table import figure, grouped, place, ratio  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = {"catalogue_read": "of a dense step's bytes", "catalogue_prefill": "of a dense prompt's pairs"}


def marks(name: str) -> tuple[str, str]:
    """Where a table begins and ends in the README."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def table(result: dict[str, Any], of: str) -> str:
    """Markdown of one result: policies that meet shares, then those that read what they read. `of` says what a share is of."""
    rows = result["rows"]
    dense, shares, by_policy = grouped(rows)
    for name, share in result["unreached"]:
        by_policy.setdefault(name, {})
    last = shares[-1]
    percent = [f"{s:.1%}".replace(".0%", "%") for s in shares]
    lines = [f"| policy, at shares {of} | " + " | ".join(f"KL at {p}" for p in percent)
             + "".join(f" | {name}, {percent[-1]}" for name in ("perplexity ×", "needle", "of four", "read")) + " | to choose |",
             "|---|" + "---|" * (len(shares) + 5)]

    def order(item: tuple[str, dict[float, dict]]) -> tuple[int, float]:
        reached = [s for s in shares if s in item[1]]
        return len(shares) - len(reached), item[1][reached[-1]]["kl"]["mean"] if reached else 0.0

    for name, found in sorted(by_policy.items(), key=order):
        row = found.get(last)
        cells = [*(figure(found.get(s), "kl") for s in shares), ratio(row, dense), figure(row, "one"), figure(row, "many"),
                 "cannot" if row is None else f"{row['share']['mean']:.1%}"]
        choose = [r["choose"]["mean"] for r in found.values()]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{statistics.mean(choose):.1%}" if any(choose) else "–"]) + " |")
    fixed = [r for r in rows if not r["target"]]
    if len(fixed) > 1:
        lines += ["", "| without a budget | read | stored | KL | perplexity × | needle | of four | to choose |",
                  "|---|" + "---|" * 7]
        for row in sorted(fixed, key=lambda r: r["kl"]["mean"]):
            choose = row["choose"]["mean"]
            lines.append(f"| {row['policy']} | {row['share']['mean']:.1%} | {row['stored']['mean']:.1%} | {figure(row, 'kl')} | "
                         f"{ratio(row, dense)} | {figure(row, 'one')} | {figure(row, 'many')} | "
                         f"{f'{choose:.1%}' if choose else '–'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    for name, of in TABLES.items():
        text = table(json.loads((RESULTS / f"{name}.json").read_text()), of)
        if options.readme:
            place(text, marks(name))
        else:
            print(text, end="\n\n")


if __name__ == "__main__":
    main()
