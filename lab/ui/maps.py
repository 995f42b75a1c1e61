"""What the attention map asks the server for: tiles, rows, cells, head figures and the cache map.

Each answer is a small JSON-able dict. All figures come from lab.inspect; this file only packs them.
"""
from __future__ import annotations

import base64
from typing import Any

import numpy as np

from lab.errors import LabError

from .opened import OpenRun

SIDE = 512
HEAD_FIGURES = ("entropy", "sink_rate", "mean_distance", "local_mass", "far_mass", "previous")
LOG_FLOOR = 1e-5  # darkest shade of the logarithmic scale


def head_of(value: Any) -> int | str:
    """A head as the browser names it: a number or a reduction."""
    return value if value in ("mean", "max", "rollout") else int(value)


def _lens(run: OpenRun, ask: dict[str, Any]) -> Any:
    return run.lens(str(ask["letter"]), int(ask["layer"]), head_of(ask["head"]), str(ask.get("minus") or "") or None)


def pack(array: np.ndarray) -> str:
    """An array's bytes as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def shade(values: np.ndarray, log: bool) -> tuple[np.ndarray, float]:
    """Weights as bytes 1..255 (0 = nothing there) and the weight at 255. A transfer format, not a measurement."""
    there = np.isfinite(values)
    top = float(values[there].max()) if there.any() else 0.0
    if top <= 0:
        return np.where(there, 1, 0).astype(np.uint8), top
    shown = np.where(there, values, 0.0)
    if log:
        low = min(LOG_FLOOR, top / 10)
        part = np.log(np.clip(shown, low, top) / low) / np.log(top / low)
    else:
        part = shown / top
    return np.where(there, 1 + np.rint(part * 254), 0).astype(np.uint8), top


def _shade_signed(values: np.ndarray, log: bool) -> tuple[np.ndarray, float]:
    """Differences as bytes: 0 = nothing there, 128 = none, 1 and 255 = the largest, which is returned."""
    size, top = shade(np.abs(values), log)
    half = np.rint((size.astype(np.float32) - 1) / 2)
    signed = 128 + np.where(values < 0, -half, half)
    return np.where(size == 0, 0, np.clip(signed, 1, 255)).astype(np.uint8), top


def tile(run: OpenRun, ask: dict[str, Any], progress: Any = None, cancel: Any = None) -> dict[str, Any]:
    """One window of the map as ≤ 512 x 512 bytes.

    `ask`: letter, minus (letter or nothing), layer, head, rows [r0, r1), cols [c0, c1), width, height, pool
    'max'|'mean', log bool.
    """
    lens = _lens(run, ask)
    seen = lens.view(_span(ask["rows"], lens.tokens), _span(ask["cols"], lens.tokens),
                     min(int(ask.get("width") or SIDE), SIDE), min(int(ask.get("height") or SIDE), SIDE),
                     "mean" if ask.get("pool") == "mean" else "max", progress, cancel)
    shades, top = (_shade_signed if ask.get("minus") else shade)(seen.values, bool(ask.get("log", True)))
    answer = {"h": int(shades.shape[0]), "w": int(shades.shape[1]), "data": pack(shades), "top": top,
              "rows": list(seen.rows), "cols": list(seen.cols), "row_step": seen.row_step, "col_step": seen.col_step}
    if seen.evicted.any():
        answer["evicted"] = pack(seen.evicted)
    return answer


def _span(pair: Any, tokens: int) -> tuple[int, int]:
    """A half-open range cut to the run; the browser may ask a little beyond the edge while dragging."""
    a = min(max(int(pair[0]), 0), tokens - 1)
    return a, min(max(int(pair[1]), a + 1), tokens)


def cell(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """The exact weight of one row on one column, its rank, and what the cache had kept."""
    lens = _lens(run, ask)
    found = lens.cell(int(ask["row"]), int(ask["col"]))
    both = [side.cell(found.row, found.col).weight for side in (lens.a, lens.b)] if ask.get("minus") else None
    return {"both": both, "row": int(ask["row"]), "col": int(ask["col"]), "weight": found.weight, "rank": found.rank,
            "of": found.visible, "bits": found.bits, "why": found.why}


def row(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Where one row looks: its largest weights, the mass of all others, and a profile for the token strip.

    Of a difference: the largest changes, and no mass of others.
    """
    letter, layer, i, head = str(ask["letter"]), int(ask["layer"]), int(ask["row"]), head_of(ask["head"])
    lens, signed, rolled = _lens(run, ask), bool(ask.get("minus")), head == "rollout"
    weights = lens.row(i)
    known = np.where(np.isfinite(weights), weights, 0.0)
    most = min(int(ask.get("top") or 12), 64)
    best = [int(j) for j in np.argsort(-np.abs(known), kind="stable")[:most] if known[j] != 0]
    lost = None if rolled else run.evicted_at(letter, layer, head, i)
    a, b = _span(ask.get("strip") or (0, lens.tokens), lens.tokens)
    b = min(b, a + 2000)
    tail = None if signed or not np.isfinite(weights).any() else float(max(0.0, 1.0 - float(known[best].sum())))
    return {"row": i, "bars": [{"col": j, "weight": float(known[j]),
                                "bits": None if rolled else run.bits_at(letter, layer, head, i, j)} for j in best],
            "tail": tail, "others": 0 if signed else int(np.isfinite(weights).sum()) - len(best),
            "lost": None if lost is None else int(lost.sum()),
            "strip": [a, b], "profile": [round(float(x), 5) for x in known[a:b]],
            "gone": [] if lost is None else [int(j) for j in np.flatnonzero(lost[a:b]) + a]}


def stats(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Entropy, sink rate and mean distance of every head of one layer."""
    found = run.stats(str(ask["letter"]), int(ask["layer"]))
    return {name: [float(x) if np.isfinite(x) else None for x in getattr(found, name)] for name in HEAD_FIGURES}


def cache(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Layers x tokens after a step: the bits of each entry, 0 = evicted, 255 = not written yet.

    `ask`: letter, row (last row fed), kv 'all' or a KV head, cols, width. Where several entries share a pixel,
    the most frequent state is shown.
    """
    from lab.inspect.cachemap import NOT_YET

    history = run.cache_map(str(ask["letter"]))
    n = history.tokens
    a, b = _span(ask.get("cols") or (0, n), n)
    at = min(max(int(ask["row"]) if ask.get("row") is not None else n - 1, 0), n - 1)
    entries = history.entries(at)[:, :, a:b]
    if ask.get("kv") not in (None, "all"):
        entries = entries[:, [int(ask["kv"])]]
    width = max(1, min(int(ask.get("width") or 1024), 2048, b - a))
    starts = np.linspace(0, b - a, width + 1).astype(int)[:-1]
    levels = np.unique(entries)
    seen = np.stack([np.add.reduceat((entries == level).sum(axis=1), starts, axis=1) for level in levels])
    every, times = np.unique(history.entries(at), return_counts=True)
    totals = {str(bits): int(n) for bits, n in zip(every, times, strict=True) if bits != NOT_YET}
    return {"h": int(entries.shape[0]), "w": int(width), "data": pack(levels[seen.argmax(axis=0)]), "cols": [a, b],
            "row": at, "rows": n, "totals": totals, "stops": [int(x) for x in history.change_rows()[:2000]]}


def life(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """What befell one token, summed over heads and layers: [{row, what, bits, entries}] in the order of rows."""
    told: dict[tuple[int, str, int], int] = {}
    for event in run.cache_map(str(ask["letter"])).life(int(ask["token"])):
        key = (event.row, event.what, event.bits)
        told[key] = told.get(key, 0) + 1
    return {"token": int(ask["token"]),
            "events": [{"row": r, "what": w, "bits": b, "entries": n} for (r, w, b), n in sorted(told.items())]}
