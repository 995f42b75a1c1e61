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
from .controller import Lab
from .format import esc
from .opened import OpenRun
from .tasks import Task, Told

SIDE = 512
FRAMES = 48
MOST_BYTES = 3 * 1024 * 1024  # of zoom levels, packed
CARD = 6  # largest weights told for each row of the token strip
PACKED = ("data", "evicted", "bits")


def _squeeze(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _tile(run: OpenRun, ask: dict[str, Any], rows: tuple[int, int], cols: tuple[int, int], told: Told,
          progress: Any = None) -> dict[str, Any]:
    asked = {**ask, "rows": rows, "cols": cols, "width": SIDE, "height": SIDE}
    found = maps.tile(run, asked, progress, told.cancelled)
    for name in PACKED:
        if name in found:
            found[name] = _squeeze(base64.b64decode(found[name]))
    return found


def _bytes(tile: dict[str, Any]) -> int:
    return sum(len(tile.get(name) or "") for name in PACKED)


def _levels(run: OpenRun, ask: dict[str, Any], tokens: int, told: Told) -> tuple[list[dict[str, Any]], int]:
    """The whole run, ever finer tiles of the lower triangle while they fit, and the newest rows exactly.

    Returns the tiles and the tokens per cell of the finest level that covers the whole run.
    """
    tiles = [_tile(run, ask, (0, tokens), (0, tokens), told, lambda f: told.progress(0.5 * f))]
    step, used = tiles[0]["row_step"], _bytes(tiles[0])
    least = tiles[0]["group"]
    if tiles[0]["stored"]:
        return tiles, step
    while step > least:
        finer, side = max(1, step // 4), SIDE * max(1, step // 4)
        level = _level(run, ask, tokens, side, MOST_BYTES - used, told)
        if level is None:
            break
        tiles, used, step = tiles + level, used + sum(map(_bytes, level)), finer
    if step > 1 and least == 1:
        last = max(0, tokens - SIDE)
        tiles += [_tile(run, ask, (last, tokens), (c, min(c + SIDE, tokens)), told) for c in range(0, tokens, SIDE)]
    return tiles, step


def _level(run: OpenRun, ask: dict[str, Any], tokens: int, side: int, room: int, told: Told) -> list[dict[str, Any]] | None:
    """Tiles of ``side`` tokens over the lower triangle, or None when they take more than ``room`` bytes."""
    level, size = [], 0
    for r in range(0, tokens, side):
        for c in range(0, min(r + side, tokens), side):
            if size > room:
                return None
            level.append(_tile(run, ask, (r, min(r + side, tokens)), (c, min(c + side, tokens)), told))
            size += _bytes(level[-1])
            told.progress(max(told.fraction, 0.5 + 0.3 * min(1.0, size / max(room, 1))))
    return level


def _cache(run: OpenRun, letter: str) -> dict[str, Any] | None:
    """States of the cache map at a few dozen steps, the first and the last among them; None when not recorded."""
    try:
        last = maps.cache(run, {"letter": letter, "row": None, "width": 1024})
    except LabError:
        return None
    stops = last["stops"]
    if len(stops) > FRAMES:
        stops = [stops[int(i)] for i in np.linspace(0, len(stops) - 1, FRAMES)]
    frames = [maps.cache(run, {"letter": letter, "row": row, "width": 1024}) for row in stops]
    return {"h": last["h"], "w": last["w"], "rows": stops, "totals": [f["totals"] for f in frames],
            "data": _squeeze(b"".join(base64.b64decode(f["data"]) for f in frames)), "lives": _lives(run, letter)}


def _lives(run: OpenRun, letter: str) -> dict[str, Any]:
    """Per token, packed int32 [5, N]: entries lost, first and last row of a loss, entries narrowed, the commonest target."""
    history = run.cache_map(letter)
    n = history.tokens
    death, demoted = (x.reshape(-1, n).astype(np.int64) for x in (history.death, history.demoted))
    lost = death < 2**31 - 1
    told = np.zeros((5, n), np.int32)
    told[0], told[3] = lost.sum(0), ((demoted < 2**31 - 1) & ~lost).sum(0)
    told[1] = np.where(lost, death, 2**31 - 1).min(0)
    told[2], told[4] = np.where(lost, death, -1).max(0), -1
    if history.merged is not None:
        into = history.merged.reshape(-1, n)
        for j in np.flatnonzero((into >= 0).any(0)):
            told[4, j] = np.bincount(into[into[:, j] >= 0, j]).argmax()
    return {"entries": int(death.shape[0]), "data": _squeeze(told.tobytes())}


def _looks(run: OpenRun, ask: dict[str, Any], rows: list[int]) -> dict[int, list[list[float]]]:
    """The largest weights of some rows, exact."""
    found = {}
    for i in rows:
        bars = maps.row(run, {**ask, "row": i, "top": CARD, "strip": [0, 1]})["bars"]
        found[i] = [[b["col"], round(b["weight"], 4)] for b in bars]
    return found


def page(run: OpenRun, ask: dict[str, Any], told: Told | None = None) -> tuple[str, str]:
    """(file name, HTML) of one variant's map, text, cache map and figures.

    `ask`: letter, minus, layer, over, head, pool and log, as the map is set now.
    """
    from .attention import words

    told = told or Told()
    letter, minus = str(ask["letter"]), str(ask.get("minus") or "")
    lens = run.lens(letter, maps.layer_of(ask), maps.head_of(ask["head"]), minus or None)
    tiles, finest = _levels(run, ask, lens.tokens, told)
    told.progress(0.85)
    prompt = len((run.record.get("prompt") or {}).get("tokens") or [])
    most = 512 if lens.tokens <= 2048 else 192  # an exact row costs up to 30 ms at 8k tokens on two cores
    last = list(range(max(0, lens.tokens - most), lens.tokens))
    titles = {v["letter"]: str(v.get("title") or v.get("spec") or "") for v in run.record["variants"]}
    rolled, where = ask["head"] == "rollout", maps.captioned(run, ask)
    stored, group = tiles[0]["stored"], tiles[0]["group"]
    looks = {} if stored or group > 1 else _looks(run, ask, last)
    told.progress(0.95)
    data = {"tokens": words(run, letter)[: lens.tokens], "prompt": prompt, "n": lens.tokens, "tiles": tiles, "finest": finest,
            "letter": letter, "minus": minus, "pool": tiles[0]["pool"],
            "log": bool(ask.get("log", True)), "rolled": rolled, "stored": stored, "group": group,
            "floor": maps.floor_of(maps.head_of(ask["head"])), "looks": looks, "cache": _cache(run, letter)}
    blob = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for bad, good in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        blob = blob.replace(bad, good)
    name = str(run.record.get("name") or run.record.get("run_id") or "run")
    view = f"{letter} − {minus}" if minus else f"{letter} · {titles.get(letter, '')}"
    texts = "".join(
        f"<article><h3>{esc(v['letter'])} · {esc(titles[v['letter']])} <small>{esc(v.get('spec') or 'dense')}</small></h3>"
        f"<p class=text>{esc(v.get('text') or v.get('error') or '')}</p></article>" for v in run.record["variants"])
    parts = {"TITLE": esc(f"{name}: {view}, {where}"), "NAME": esc(name), "FACTS": esc(_facts(run.record)),
             "VIEW": esc(f"{view}, {where}"), "TEXTS": texts, "COSTS": tables.costs(run.record),
             "PROMPT": esc((run.record.get("prompt") or {}).get("text") or "")}
    template = (assets.FOLDER / "export" / "page.html").read_text(encoding="utf-8")
    for key, text in parts.items():
        template = template.replace(f"@@{key}@@", text.replace("@@", "@\u200b@"), 1)
    head, tail = template.split("@@DATA@@", 1)
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
    return f"{safe}-{letter}-layer-{maps.layer_of(ask)}-head-{ask['head']}.html", head + blob + tail


def _facts(record: dict[str, Any]) -> str:
    model = record.get("model") or {}
    made = str(record.get("created") or "")[:16].replace("T", " ")
    version = (record.get("environment") or {}).get("lab")
    parts = (model.get("id"), f"{model.get('weights')} weights", record.get("device"), made, f"lab {version}")
    return " · ".join(str(x) for x in parts if x)


def follow(lab: Lab, run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Start or follow an export: {"fraction"} while it lasts, then {name, type, data}; `drop` gives it up."""
    key = ("page", ask.get("id"))
    task = run.tasks.get(key)
    if ask.get("drop"):
        if task is not None:
            task.cancel()
            run.tasks.pop(key, None)
        return {"idle": True}
    if task is None:
        task = run.tasks[key] = Task(lab, lambda told: page(run, ask, told))
    task.join(0.3)
    if task.running:
        return {"fraction": task.fraction}
    run.tasks.pop(key, None)
    if task.problem is not None:
        return {"error": task.problem}
    name, text = task.result
    return {"name": name, "type": "text/html", "data": base64.b64encode(text.encode("utf-8")).decode("ascii")}
