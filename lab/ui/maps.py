"""What the attention map asks the server for: tiles, rows, cells, head figures and the cache map.

Each answer is a small JSON-able dict. All figures come from lab.inspect; this file only packs them.
"""
from __future__ import annotations

import base64
from typing import Any

import numpy as np

from lab.errors import LabError

from .opened import COMBINED, OpenRun, seen_name

SIDE = 512
HEAD_FIGURES = ("entropy", "sink_rate", "mean_distance", "local_mass", "far_mass", "previous")
LOG_FLOOR, ROLLOUT_FLOOR = 1e-5, 1e-7  # darkest shade of the logarithmic scale
PROMPT_STOPS = 64  # changes while the prompt is read that the time slider stops at
MOST_EVENTS = 400  # lines of one token's life
LARGEST = 24  # cells in the table behind the map


def head_of(value: Any) -> int | str:
    """A head as the browser names it: a number or a reduction."""
    return value if value in ("mean", "max", "rollout") else int(value)


def layer_of(ask: dict[str, Any]) -> int | str:
    """The layer a browser asks for, or how it wants all captured layers combined."""
    return ask["over"] if ask.get("over") in COMBINED else int(ask["layer"])


def _lens(run: OpenRun, ask: dict[str, Any]) -> Any:
    minus = str(ask.get("minus") or "") or None
    return run.lens(str(ask["letter"]), layer_of(ask), head_of(ask["head"]), minus, bool(ask.get("exact")))


def captioned(run: OpenRun, ask: dict[str, Any]) -> str:
    """What a view shows, in words: layer and head, or which reduction of which layers."""
    head, layer = head_of(ask["head"]), layer_of(ask)
    heads = f"{head} over heads" if isinstance(head, str) else f"query head {head}"
    if head != "rollout" and isinstance(layer, int):
        return f"layer {layer}, {heads}"
    letter = str(ask["letter"])
    have, total = run.layers(letter) or run.seen_layers(letter, layer, head), (run.record.get("model") or {}).get("layers")
    which = f"all {total} layers" if len(have) == total else f"captured layers {', '.join(map(str, have))}"
    return f"rollout of {which}" if head == "rollout" else f"{layer} over {which}, {heads}"


def pack(array: np.ndarray) -> str:
    """An array's bytes as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def floor_of(head: int | str) -> float:
    """Darkest shade of the logarithmic scale: all but a few tokens hold very little of a rollout."""
    return ROLLOUT_FLOOR if head == "rollout" else LOG_FLOOR


def lowest(top: float, floor: float) -> float:
    """The weight of a logarithmic scale's first shade, which all smaller ones share."""
    return min(floor, top / 10)


def shade(values: np.ndarray, log: bool, floor: float = LOG_FLOOR) -> tuple[np.ndarray, float]:
    """Weights as bytes 1..255 (0 = nothing there) and the weight at 255. A transfer format, not a measurement."""
    there = np.isfinite(values)
    top = float(values[there].max()) if there.any() else 0.0
    if top <= 0:
        return np.where(there, 1, 0).astype(np.uint8), top
    shown = np.where(there, values, 0.0)
    if log:
        low = lowest(top, floor)
        part = np.log(np.clip(shown, low, top) / low) / np.log(top / low)
    else:
        part = shown / top
    return np.where(there, 1 + np.rint(part * 254), 0).astype(np.uint8), top


def _shade_signed(values: np.ndarray, log: bool, floor: float) -> tuple[np.ndarray, float]:
    """Differences as bytes: 0 = nothing there, 128 = none, 1 and 255 = the largest, which is returned."""
    size, top = shade(np.abs(values), log, floor)
    half = np.rint((size.astype(np.float32) - 1) / 2)
    signed = 128 + np.where(values < 0, -half, half)
    return np.where(size == 0, 0, np.clip(signed, 1, 255)).astype(np.uint8), top


def tile(run: OpenRun, ask: dict[str, Any], progress: Any = None, cancel: Any = None) -> dict[str, Any]:
    """One window of the map as ≤ 512 x 512 bytes.

    `ask`: letter, minus (letter or nothing), layer, over ("mean"|"max" over layers or nothing), head, rows [r0, r1), cols
    [c0, c1), width, height, pool 'max'|'mean', log bool, exact (a rollout's single tokens). In the answer, `top` and `floor`:
    weights of the last shade and of the first; `pool`: how it was pooled; `group`: columns of which only the mean is known;
    `coarse`: single tokens can be had by asking exactly; `stored`: an overview kept with the run, whose queries and keys are
    gone.
    """
    from lab.inspect.rollout import MOST_ROWS
    from lab.inspect.stored import is_kept

    lens = _lens(run, ask)
    rows = _span(ask["rows"], lens.tokens)
    seen = lens.view(rows, _span(ask["cols"], lens.tokens),
                     min(int(ask.get("width") or SIDE), SIDE), min(int(ask.get("height") or SIDE), SIDE),
                     "mean" if ask.get("pool") == "mean" else "max", progress, cancel)
    how, log, floor = _shade_signed if ask.get("minus") else shade, bool(ask.get("log", True)), floor_of(head_of(ask["head"]))
    shades, top = how(seen.values, log, floor)
    answer = {"h": int(shades.shape[0]), "w": int(shades.shape[1]), "data": pack(shades), "top": top,
              "rows": list(seen.rows), "cols": list(seen.cols), "row_step": seen.row_step, "col_step": seen.col_step}
    answer["floor"] = lowest(top, floor) if log else 0.0
    answer |= {"pool": seen.pool, "group": seen.group, "stored": is_kept(lens)}
    answer["coarse"] = seen.group > 1 and rows[1] - rows[0] <= MOST_ROWS and not (answer["stored"] or ask.get("minus"))
    if not answer["stored"] and rows == (0, lens.tokens):
        remember(run, ask, lens)
    if seen.evicted.any():
        answer["evicted"] = pack(seen.evicted)
    if seen.bits is not None and not ask.get("minus") and (seen.bits < 16).any():
        answer["bits"] = pack(seen.bits)
    return answer


def remember(run: OpenRun, ask: dict[str, Any], lens: Any) -> None:
    """Keep a small version of a view of all layers with a run that cannot keep its queries and keys."""
    from lab.inspect.stored import encode
    from lab.inspect.survey import SIDE as KEPT

    letter, layer, head = str(ask["letter"]), layer_of(ask), head_of(ask["head"])
    name = seen_name(letter, layer, head)
    if ask.get("minus") or isinstance(layer, int) and head != "rollout" or not run.must_keep(letter):
        return
    old = run.result(name)
    if old is not None and set(old[0].get("layers") or ()) >= set(run.layers(letter)):
        return  # what is kept tells at least as much: a replay of one layer gives way to one of all
    small = lens.view((0, lens.tokens), (0, lens.tokens), KEPT, KEPT, "mean" if ask.get("pool") == "mean" else "max")
    about = {"tokens": lens.tokens, "row_step": small.row_step, "col_step": small.col_step, "pool": small.pool,
             "group": small.group, "layers": run.layers(letter)}
    run.remember(name, about, {"cells": encode(small.values)})


def largest(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """The table behind the map: the largest cells of a window, each by its own largest weight, token 0's column apart.

    Returns {cells: [{row, col, weight}], sink: mean weight on token 0 in sight or None}.
    """
    lens = _lens(run, ask)
    seen = lens.view(_span(ask["rows"], lens.tokens), _span(ask["cols"], lens.tokens), SIDE, SIDE, "max")
    size = np.where(np.isfinite(seen.values), np.abs(seen.values), -1.0)
    if seen.cols[0] == 0 and size.shape[1] > 1:
        size[:, 0] = -1.0  # the sink would fill the table
    cells = []
    for at in np.argsort(-size, axis=None, kind="stable")[:LARGEST]:
        y, x = divmod(int(at), size.shape[1])
        if size[y, x] > 0:
            (r0, r1), (c0, c1) = seen.tokens_of(y, x)
            cells.append({"rows": [r0, r1], "cols": [c0, c1], "weight": float(seen.values[y, x])})
    return {"cells": cells, "exact": seen.exact}


def _span(pair: Any, tokens: int) -> tuple[int, int]:
    """A half-open range cut to the run; the browser may ask a little beyond the edge while dragging."""
    a = min(max(int(pair[0]), 0), tokens - 1)
    return a, min(max(int(pair[1]), a + 1), tokens)


def cell(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """The exact weight of one row on one column, its rank, and what the cache had kept."""
    from lab.inspect.stored import is_kept

    lens = _lens(run, ask)
    if is_kept(lens):
        return _kept_cell(lens, ask)
    found = lens.cell(int(ask["row"]), int(ask["col"]))
    both = [side.cell(found.row, found.col).weight for side in (lens.a, lens.b)] if ask.get("minus") else None
    return {"both": both, "row": int(ask["row"]), "col": int(ask["col"]), "weight": found.weight, "rank": found.rank,
            "of": found.visible, "bits": found.bits, "why": found.why}


def _kept_cell(lens: Any, ask: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the place of one weight: a whole cell's, and how many tokens it stands for."""
    i, j = int(ask["row"]), int(ask["col"])
    seen = lens.view((i, i + 1), (j, j + 1), SIDE, SIDE, "mean" if ask.get("pool") == "mean" else "max")
    value, there = float(seen.values[0, 0]), bool(np.isfinite(seen.values[0, 0]))
    why = None if there else "future" if j > i else "evicted" if seen.evicted[0, 0] else "not visible"
    return {"row": i, "col": j, "weight": value if there else None, "kept": [seen.row_step, seen.col_step], "pool": seen.pool,
            "why": why, "bits": None}


def row(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Where one row looks: its largest weights, the mass of all others, and a profile for the token strip.

    Of a difference: the largest changes, and no mass of others.
    """
    letter, layer, i, head = str(ask["letter"]), layer_of(ask), int(ask["row"]), head_of(ask["head"])
    lens, signed, rolled = _lens(run, ask), bool(ask.get("minus")), head == "rollout"
    if rolled and hasattr(lens, "groups"):
        return _shares(lens, ask, i)
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


def _shares(lens: Any, ask: dict[str, Any], i: int) -> dict[str, Any]:
    """What a row of a rollout is made of: the largest groups of tokens, single tokens where these are known."""
    step, shares = lens.groups(i)
    best = [int(k) for k in np.argsort(-shares, kind="stable")[: min(int(ask.get("top") or 12), 64)] if shares[k] > 0]
    a, b = _span(ask.get("strip") or (0, lens.tokens), lens.tokens)
    b = min(b, a + 2000)
    known = np.nan_to_num(lens.row(i)[a:b])
    return {"row": i, "bars": [{"col": k * step, "cols": [k * step, min(k * step + step, i + 1)], "weight": float(shares[k]),
                                "bits": None} for k in best], "group": step,
            "tail": float(max(0.0, 1.0 - float(shares[best].sum()))), "others": i // step + 1 - len(best), "lost": None,
            "strip": [a, b], "profile": [round(float(x), 5) for x in known], "gone": []}


def stats(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Entropy, sink rate and mean distance of every head of one layer."""
    letter, layer = str(ask["letter"]), int(ask["layer"])
    if layer not in run.layers(letter) and (kept := _kept_stats(run, letter, layer)) is not None:
        return kept
    found = run.stats(letter, layer)
    return {name: [float(x) if np.isfinite(x) else None for x in getattr(found, name)] for name in HEAD_FIGURES}


def _kept_stats(run: OpenRun, letter: str, layer: int) -> dict[str, Any] | None:
    """The same figures as the grid kept them, as far as it holds them."""
    found = run.result(f"{letter}/grid")
    if found is None:
        return None
    try:
        at = found[1]["heads"][:, 0] == layer
        columns = {name: found[1]["values"][at, n] for n, name in enumerate(found[0]["measures"])}
        if not at.any():
            return None
        return {name: [float(x) if np.isfinite(x) else None for x in columns[name]] for name in HEAD_FIGURES if name in columns}
    except (KeyError, IndexError, TypeError):
        return None


def cache(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """Layers x tokens after a step: the bits of each entry, 0 = evicted, 255 = not written yet.

    `ask`: letter, row (last row fed), kv 'all' or a KV head, cols, width. Where several entries share a pixel,
    the most frequent state is shown. `totals` counts all entries, `layers` those of each layer.
    """
    from lab.inspect.cachemap import NOT_YET

    history = run.cache_map(str(ask["letter"]))
    n = history.tokens
    a, b = _span(ask.get("cols") or (0, n), n)
    at = min(max(int(ask["row"]) if ask.get("row") is not None else n - 1, 0), n - 1)
    whole = history.entries(at)
    entries = whole[:, :, a:b]
    if ask.get("kv") not in (None, "all"):
        kv = int(ask["kv"])
        if not 0 <= kv < entries.shape[1]:
            raise LabError(f"KV head {kv} does not exist", f"This model has KV heads 0 to {entries.shape[1] - 1}")
        entries = entries[:, [kv]]
    width = max(1, min(int(ask.get("width") or 1024), 2048, b - a))
    starts = np.linspace(0, b - a, width + 1).astype(int)[:-1]
    levels = np.unique(entries)
    seen = np.stack([np.add.reduceat((entries == level).sum(axis=1), starts, axis=1) for level in levels])
    every = [level for level in np.unique(whole) if level != NOT_YET]
    layers = {str(level): [int(x) for x in (whole == level).sum(axis=(1, 2))] for level in every}
    return {"h": int(entries.shape[0]), "w": int(width), "data": pack(levels[seen.argmax(axis=0)]), "cols": [a, b],
            "row": at, "rows": n, "totals": {level: sum(count) for level, count in layers.items()}, "layers": layers,
            "stops": stops(run, history, n)}


def stops(run: OpenRun, history: Any, n: int) -> list[int]:
    """Rows that the time slider stops at: before and after changes while the prompt was read, its end, every decode step."""
    prompt = min(len((run.record.get("prompt") or {}).get("tokens") or []), n)
    early = [int(r) for r in history.change_rows() if r < prompt - 1]
    if len(early) > PROMPT_STOPS:
        early = [early[int(i)] for i in np.linspace(0, len(early) - 1, PROMPT_STOPS)]
    return sorted({0, max(0, prompt - 1), *early, *(max(0, r - 1) for r in early), *range(prompt, n)})


def life(run: OpenRun, ask: dict[str, Any]) -> dict[str, Any]:
    """What befell one token: summed over heads and layers, and then each entry's own story.

    Returns {token, events: [{row, what, bits, entries, into: [[position, entries]], targets, shared}], detail: [{row, layer, kv,
    what, bits, into: [[first, last]]}]}; `targets` counts the positions that any of the entries went to, `shared` the most that
    one was shared among. The detail leaves out the writing, which is the same for all.
    """
    told: dict[tuple[int, str, int], list[tuple[int, ...]]] = {}
    happened = run.cache_map(str(ask["letter"])).life(int(ask["token"]))
    for event in happened:
        told.setdefault((event.row, event.what, event.bits), []).append(event.shared)
    events = []
    for (row_, what, bits), into in sorted(told.items()):
        found, times = np.unique([x for many in into for x in many], return_counts=True)
        targets = sorted(zip(map(int, found), map(int, times), strict=True), key=lambda x: (-x[1], x[0]))
        events.append({"row": row_, "what": what, "bits": bits, "entries": len(into), "into": [list(t) for t in targets[:8]],
                       "targets": len(targets), "shared": max(map(len, into))})
    detail = [{"row": e.row, "layer": e.layer, "kv": e.kv_head, "what": e.what, "bits": e.bits, "into": _runs(e.shared)}
              for e in happened if e.what != "written"]
    return {"token": int(ask["token"]), "events": events, "detail": detail[:MOST_EVENTS],
            "more": max(0, len(detail) - MOST_EVENTS)}


def _runs(positions: tuple[int, ...]) -> list[list[int]]:
    """Ascending positions as [first, last] of each unbroken run."""
    out: list[list[int]] = []
    for p in positions:
        if out and p == out[-1][1] + 1:
            out[-1][1] = p
        else:
            out.append([p, p])
    return out
