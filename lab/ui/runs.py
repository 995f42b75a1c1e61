"""The Runs tab: saved runs as a table with search, tags, comparison, export, import and undo."""
from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

import gradio as gr

from lab.errors import LabError

from . import assets
from .compare import owner_of
from .components import comparison
from .controller import Lab, sentence
from .format import decimal, percent, when

MOST_IMPORT = 256 * 1024 * 1024


def functions(lab: Lab) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Server functions of the table; each answers {"error": sentence} instead of failing."""

    def guarded(work: Callable[[dict[str, Any], str], dict[str, Any]], ask: dict[str, Any] | None) -> dict[str, Any]:
        try:
            return work(ask or {}, owner_of(lab, ask or {}))
        except Exception as problem:
            return {"error": sentence(problem)}

    def listing(ask: dict[str, Any]) -> dict[str, Any]:
        def work(_: dict[str, Any], owner: str) -> dict[str, Any]:
            going = lab.under_way()
            rows = [{**row, "when": when(row["created"]), "kl_text": decimal(row["kl"], 3), "kv_text": percent(row["kv"]),
                     "status": "being generated" if row["run_id"] in going else row["status"]}
                    for row in lab.library.rows(owner)]
            return {"rows": rows, "note": lab.library.note}
        return guarded(work, ask)

    def rename(ask: dict[str, Any]) -> dict[str, Any]:
        return guarded(lambda a, who: lab.rename(str(a["run_id"]), str(a["name"]), who) or {"ok": True}, ask)

    def tag(ask: dict[str, Any]) -> dict[str, Any]:
        def work(a: dict[str, Any], who: str) -> dict[str, Any]:
            tags = [str(t).strip().lstrip("#").strip()[:40] for t in a["tags"]]  # the sign belongs to the search
            lab.library.tag(str(a["run_id"]), [t for t in tags if t][:20], who)
            return {"ok": True}
        return guarded(work, ask)

    def share(ask: dict[str, Any]) -> dict[str, Any]:
        def work(a: dict[str, Any], who: str) -> dict[str, Any]:
            lab.library.share(str(a["run_id"]), bool(a.get("shared", True)), who)
            return {"public": lab.public}
        return guarded(work, ask)

    def delete(ask: dict[str, Any]) -> dict[str, Any]:
        return guarded(lambda a, who: lab.library.delete(str(a["run_id"]), who) or {"ok": True}, ask)

    def restore(ask: dict[str, Any]) -> dict[str, Any]:
        return guarded(lambda a, who: lab.library.restore(str(a["run_id"]), who) or {"ok": True}, ask)

    def compare(ask: dict[str, Any]) -> dict[str, Any]:
        def work(a: dict[str, Any], who: str) -> dict[str, Any]:
            table = lab.library.compare([str(i) for i in a["ids"]][:10], False, who)
            return comparison.readable(table, bool(a.get("only", True)))
        return guarded(work, ask)

    def export(ask: dict[str, Any]) -> dict[str, Any]:
        def work(a: dict[str, Any], who: str) -> dict[str, Any]:
            name, kind, data = lab.library.export(str(a["run_id"]), str(a["format"]), who)
            return {"name": name, "type": kind, "data": base64.b64encode(data).decode("ascii")}
        return guarded(work, ask)

    def take(ask: dict[str, Any]) -> dict[str, Any]:
        def work(a: dict[str, Any], who: str) -> dict[str, Any]:
            text = str(a["data"])
            if len(text) > MOST_IMPORT * 4 // 3:
                raise LabError("The file is larger than 256 MB", fix="Import it with: python -m lab runs import FILE")
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise LabError("The file did not arrive whole", fix="Try again") from None
            return lab.library.take(str(a["name"]), data, who)
        return guarded(work, ask)
    return [listing, rename, tag, share, delete, restore, compare, export, take]


def build(lab: Lab) -> gr.HTML:
    """The table. It triggers 'open' with {run_id}; everything else it does by itself."""
    return gr.HTML({"current": "recorded"}, html_template="", apply_default_css=False, elem_id="runs",
                   js_on_load=assets.script("comparison", "runs"), server_functions=functions(lab))
