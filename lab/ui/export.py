"""One self-contained HTML file of what the Attention tab shows: opens without the lab and without a network."""
from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np

from lab.errors import LabError

from . import assets, maps
from .components import tables
from .format import esc
from .opened import OpenRun

SIDE = 512
FRAMES = 48
MOST_BYTES = 3 * 1024 * 1024  # of zoom levels, packed
CARD = 6  # largest weights told for each row of the token strip


def _squeeze(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _tile(run: OpenRun, ask: dict[str, Any], rows: tuple[int, int], cols: tuple[int, int], told: Any) -> dict[str, Any]:
    found = maps.tile(run, {**ask, "rows": rows, "cols": cols, "width": SIDE, "height": SIDE}, None, told and told.cancelled)
    for name in ("data", "evicted"):
        if name in found:
            found[name] = _squeeze(base64.b64decode(found[name]))
    return found


def _levels(run: OpenRun, ask: dict[str, Any], tokens: int, told: Any) -> tuple[list[dict[str, Any]], int]:
    """The whole run, then ever finer tiles of the lower triangle while they fit. Also the finest tokens per cell."""
    tiles = [_tile(run, ask, (0, tokens), (0, tokens), told)]
    step, used = tiles[0]["row_step"], len(tiles[0]["data"])
    while step > 1:
        finer, side = max(1, step // 4), SIDE * max(1, step // 4)
        level, size = [], 0
        for r in range(0, tokens, side):
            for c in range(0, min(r + side, tokens), side):
                if used + size > MOST_BYTES:
                    return tiles, step
                one = _tile(run, ask, (r, min(r + side, tokens)), (c, min(c + side, tokens)), told)
                size += len(one["data"]) + len(one.get("evicted") or "")
                level.append(one)
        tiles, used, step = tiles + level, used + size, finer
    return tiles, step


def _cache(run: OpenRun, letter: str) -> dict[str, Any] | None:
    """States of the cache map at a few dozen steps, the first and the last among them; None when not recorded."""
    try:
        last = maps.cache(run, {"letter": letter, "row": None, "width": 1024})
    except LabError:
        return None
    stops = sorted({0, last["rows"] - 1, *last["stops"], *(max(0, s - 1) for s in last["stops"])})
    if len(stops) > FRAMES:
        stops = [stops[int(i)] for i in np.linspace(0, len(stops) - 1, FRAMES)]
    frames = [maps.cache(run, {"letter": letter, "row": row, "width": 1024}) for row in stops]
    return {"h": last["h"], "w": last["w"], "rows": stops, "totals": [f["totals"] for f in frames],
            "data": _squeeze(b"".join(base64.b64decode(f["data"]) for f in frames))}


def _looks(run: OpenRun, ask: dict[str, Any], rows: list[int]) -> dict[int, list[list[float]]]:
    """The largest weights of some rows, exact."""
    found = {}
    for i in rows:
        bars = maps.row(run, {**ask, "row": i, "top": CARD, "strip": [0, 1]})["bars"]
        found[i] = [[b["col"], round(b["weight"], 4)] for b in bars]
    return found


def page(run: OpenRun, ask: dict[str, Any], told: Any = None) -> tuple[str, str]:
    """(file name, HTML) of one variant's map, text, cache map and figures.

    `ask`: letter, minus, layer, head, pool and log, as the map is set now.
    """
    letter, minus = str(ask["letter"]), str(ask.get("minus") or "")
    lens = run.lens(letter, int(ask["layer"]), maps.head_of(ask["head"]), minus or None)
    tiles, finest = _levels(run, ask, lens.tokens, told)
    prompt = len((run.record.get("prompt") or {}).get("tokens") or [])
    from .attention import words

    most = 512 if lens.tokens <= 2048 else 192  # an exact row costs up to 30 ms at 8k tokens on two cores
    last = list(range(max(0, lens.tokens - most), lens.tokens))
    titles = {v["letter"]: str(v.get("title") or v.get("spec") or "") for v in run.record["variants"]}
    rolled = ask["head"] == "rollout"
    where = (f"rollout of captured layers {', '.join(map(str, run.layers(letter)))}" if rolled else
             f"layer {int(ask['layer'])}, " + (f"{ask['head']} over heads" if isinstance(ask["head"], str) else f"query head {ask['head']}"))
    data = {"tokens": words(run, letter)[: lens.tokens], "prompt": prompt, "n": lens.tokens, "tiles": tiles, "finest": finest,
            "letter": letter, "minus": minus, "pool": "mean" if ask.get("pool") == "mean" else "max", "log": bool(ask.get("log", True)),
            "rolled": rolled, "looks": {} if rolled and lens.tokens > 512 else _looks(run, ask, last), "cache": _cache(run, letter)}
    blob = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    name = str(run.record.get("name") or run.record.get("run_id") or "run")
    view = f"{letter} − {minus}" if minus else f"{letter} · {titles.get(letter, '')}"
    texts = "".join(f"<article><h3>{esc(v['letter'])} · {esc(titles[v['letter']])} <small>{esc(v.get('spec') or 'dense')}</small></h3>"
                    f"<p class=text>{esc(v.get('text') or v.get('error') or '')}</p></article>" for v in run.record["variants"])
    model = run.record.get("model") or {}
    facts = " · ".join(str(x) for x in (model.get("id"), f"{model.get('weights')} weights", run.record.get("device"),
                                        str(run.record.get("created") or "")[:16].replace("T", " "), f"lab {(run.record.get('environment') or {}).get('lab')}") if x)
    template = (assets.FOLDER / "export" / "page.html").read_text(encoding="utf-8")
    parts = {"TITLE": esc(f"{name}: {view}, {where}"), "NAME": esc(name), "FACTS": esc(facts), "VIEW": esc(f"{view}, {where}"),
             "TEXTS": texts, "COSTS": tables.costs(run.record), "PROMPT": esc((run.record.get("prompt") or {}).get("text") or ""),
             "DATA": blob}
    for key in ("TITLE", "NAME", "FACTS", "VIEW", "TEXTS", "COSTS", "PROMPT"):
        template = template.replace(f"@@{key}@@", parts[key].replace("@@", "@\u200b@"), 1)
    head, tail = template.split("@@DATA@@", 1)
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
    return f"{safe}-{letter}-layer{int(ask['layer'])}-head{ask['head']}.html", head + parts["DATA"] + tail
