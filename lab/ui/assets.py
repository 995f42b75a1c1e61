"""Reads the app's static files: component scripts, style and presets."""
from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from lab.errors import LabError

FOLDER = Path(__file__).resolve().parents[2] / "assets"
CSS = FOLDER / "css" / "lab.css"


@cache
def script(*names: str) -> str:
    """A component's js_on_load: the shared helpers and the named files, as one function body."""
    return "\n".join((FOLDER / "js" / f"{name}.js").read_text(encoding="utf-8") for name in ("common", *names))


@cache
def head() -> str:
    """What the page runs before anything else: a queue stream that no event's answers are lost on, and memories of what was set
    and of the run that is going, for the page that comes after it."""
    scripts = ((FOLDER / "js" / f"{name}.js").read_text(encoding="utf-8") for name in ("stream", "draft", "remember"))
    return "".join(f"<script>{script}</script>" for script in scripts)


@cache
def presets() -> tuple[dict[str, Any], ...]:
    """assets/presets.json: [{id, title, about, prompt | passage, variants: [spec], settings}]."""
    return tuple(json.loads((FOLDER / "presets.json").read_text(encoding="utf-8")))


def preset(ident: str) -> dict[str, Any]:
    """One preset. Raises LabError when the id is unknown."""
    for entry in presets():
        if entry["id"] == ident:
            return entry
    raise LabError(f'There is no preset "{ident}"', fix="Choose one from the list")


def prompt_of(entry: dict[str, Any]) -> str:
    """A preset's prompt: its own text, or long prose from Python's help topics around its own sentences.

    `passage`: {"topics": [names in pydoc_data.topics], "words": n, "needle": sentence, "at": 0..1, "question": text}.
    """
    if "prompt" in entry:
        return entry["prompt"]
    from pydoc_data.topics import topics

    ask = entry["passage"]
    prose = " ".join(topics[name] for name in ask["topics"] if name in topics)
    words = re.sub(r"[*=~^`-]{3,}|[*`]", "", prose).split()  # headings' underlines and emphasis marks are no prose
    words = words[: int(ask["words"])]
    if ask.get("needle"):
        words.insert(int(len(words) * float(ask.get("at", 0.5))), ask["needle"])
    return " ".join(words) + "\n\n" + ask["question"]
