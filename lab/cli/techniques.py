"""`techniques`: what can be switched on."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("techniques", help="list the techniques and their parameters")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README")
    parser.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    rows = describe()
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    if args.markdown:
        print(markdown())
        return 0
    for row in rows:
        print(f"{row['name']:<20} {row['title']} · {', '.join(row['slots'])} · saves {row['saves']}")
        print(f"{'':<20} {row['paper']['title']} ({row['paper']['arxiv']}, {row['paper']['year']})")
        for p in row["parameters"]:
            print(f"{'':<22}{p['name']}={p['default']}  {p['help']}")
    return 0


def describe() -> list[dict[str, Any]]:
    """The registry as plain values: {name, title, paper, slots, help, saves, does_not_save, parameters}."""
    from lab.techniques import registry

    return [
        {
            "name": cls.name, "title": cls.title,
            "paper": {"title": cls.paper.title, "arxiv": cls.paper.arxiv, "year": cls.paper.year, "url": cls.paper.url},
            "slots": list(cls.slots), "help": cls.help, "saves": cls.saves, "does_not_save": cls.does_not_save,
            "parameters": [
                {"name": p.name, "type": p.type, "default": p.default, "min": p.min, "max": p.max, "help": p.help,
                 "choices": list(p.choices) if p.choices else None, "unit": p.unit}
                for p in cls.parameters()
            ],
        }
        for cls in registry().values()
    ]


def markdown() -> str:
    """The registry as the README's table."""
    lines = ["| technique | name | slots | saves | paper |", "|---|---|---|---|---|"]
    for row in describe():
        paper = row["paper"]
        source = f"[{paper['arxiv']}]({paper['url']})" if paper["url"] else paper["arxiv"]
        lines.append(f"| {row['title']} | `{row['name']}` | {', '.join(row['slots'])} | {row['saves']} | {source} |")
    return "\n".join(lines)
