"""Saved runs beside each other: the store's fields in words, with units, and as multiples of the first run's."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..format import DASH, count, decimal, duration, missing, percent, ratio, short_count, size

Show = Callable[[Any], str]
GROUPS = {"": "Run", "settings": "Settings", "prompt": "Prompt", "model": "Model", "environment": "Machine and versions"}
VARIANT = re.compile(r"variants\.([^.]+)\.(.+)")
ENDED = {"stop": "the model ended it", "length": "as many new tokens as asked for", "cancelled": "stopped by hand",
         "failed": "an error", "interrupted": "interrupted"}


def _text(value: Any) -> str:
    return str(value).strip(" ,") or DASH  # a list of empty texts is joined by commas


def _switch(value: Any) -> str:
    return "yes" if value else "no"


def _moment(value: Any) -> str:
    return str(value)[:16].replace("T", " ") + " UTC"


def _nats(value: Any) -> str:
    return f"{decimal(value)} nats"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return _switch(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


# field: (words, how a value is shown, whether a multiple of the first run's says something)
FIELDS: dict[str, tuple[str, Show, bool]] = {
    "created": ("made", _moment, False), "status": ("status", _text, False), "device": ("device", _text, False),
    "tags": ("tags", _text, False), "prompt.text": ("prompt", _text, False),
    "settings.max_new_tokens": ("new tokens, at most", count, False), "settings.temperature": ("temperature", _plain, False),
    "settings.top_k": ("top k (0: off)", count, False), "settings.top_p": ("top p", _plain, False),
    "settings.seed": ("seed", str, False), "settings.timing": ("variants timed", _text, False),
    "settings.samples": ("continuations", count, False), "settings.chat": ("prompt as a chat turn", _switch, False),
    "settings.fidelity": ("compared with the reference", _switch, False),
    "model.id": ("model", _text, False), "model.source": ("comes from", _text, False),
    "model.revision": ("revision", _text, False), "model.architecture": ("architecture", _text, False),
    "model.parameters": ("parameters", short_count, True),
    "model.heads": ("query heads", count, False), "model.kv_heads": ("KV heads", count, False),
    "model.head_dim": ("numbers in a head", count, False), "model.context": ("longest text, tokens", count, False),
    "model.vocab": ("vocabulary, tokens", count, False), "model.dtype": ("computes in", _text, False),
    "model.weights": ("weights held as", _text, False), "model.device": ("model's device", _text, False),
    "model.sliding_window": ("sliding window, tokens", count, False), "model.layer_types": ("kinds of layers", _text, False),
    "model.kv_bytes_per_token": ("dense KV cache of a token", size, True),
    "model.weights_kl": ("KL that the weights' format costs", _nats, False),
    "environment.python": ("Python", _text, False), "environment.torch": ("PyTorch", _text, False),
    "environment.transformers": ("Transformers", _text, False), "environment.triton": ("Triton", _text, False),
    "environment.cpu": ("processor", _text, False), "environment.threads": ("threads", count, False),
    "environment.gpu": ("GPU", _text, False), "environment.lab": ("Attention Lab", _text, False),
}
OF_VARIANT: dict[str, tuple[str, Show, bool]] = {
    "title": ("techniques", _text, False), "spec": ("spec", _text, False), "ttft_ms": ("time to first token", duration, True),
    "tpot_ms": ("per token", duration, True), "kv_bytes": ("KV cache", size, True),
    "kv_bytes_dense": ("dense KV cache", size, True), "slack_bytes": ("allocated, empty", size, True),
    "kept_fraction": ("entries kept", percent, True), "read_fraction": ("entries read by the newest step", percent, True),
    "reads.attend": ("bytes read to attend, of a dense step's", percent, True),
    "reads.choose": ("bytes read to choose, of a dense step's", percent, True),
    "reads.pays": ("choosing costs less than it saves", _switch, False),
    "kl_mean": ("mean KL from the reference", _nats, True),
    "top1_agreement": ("agreement with the reference", lambda v: decimal(v, 2), True),
    "perplexity": ("perplexity of the reference's text", lambda v: decimal(v, 2), True),
    "first_divergence": ("texts part at new token", lambda v: count(v + 1), False),
    "finish": ("ended by", lambda v: ENDED.get(v, _text(v)), False), "error": ("error", _text, False),
    "simulated": ("memory simulated, not freed", _switch, False), "saves": ("saves", _text, False),
    "text": ("text", _text, False), "samples": ("further continuations", _text, False),
}


def readable(table: dict[str, Any], only_differences: bool) -> dict[str, Any]:
    """The store's comparison of all fields in groups a person can read.

    Returns {run_ids, names, groups: [{title, rows: [{name, field, cells, differs}]}]}, each cell [text, multiple of the first
    run or ""]; a field without words of its own goes by its name, and is never left out.
    """
    groups: dict[str, dict[str, Any]] = {title: {"title": title, "rows": []} for title in GROUPS.values()}
    for row in table["rows"]:
        field, values = row["field"], row["values"]
        if field == "name":
            continue  # the head of the table
        title, (name, show, scales) = _place(field)
        group = groups.setdefault(title, {"title": title, "rows": []})
        if VARIANT.fullmatch(field) and field.endswith(".title") and not row["differs"]:
            group["title"] = f"{title} · {_text(values[0])}"
        if row["differs"] or not only_differences:
            cells = [[_said(v, show), ratio(v, values[0]) if scales and i and _numbers(v, values[0]) else ""]
                     for i, v in enumerate(values)]
            group["rows"].append({"name": name, "field": field, "cells": cells, "differs": row["differs"]})
    for group in groups.values():
        group["rows"].sort(key=lambda row: _rank(row["field"]))
    variants = [g for title, g in groups.items() if title not in GROUPS.values()]
    asked, about = [groups[t] for t in ("Prompt", "Settings", "Model")], [groups[t] for t in ("Run", "Machine and versions")]
    shown = [g for g in (*asked, *variants, *about) if g["rows"]]
    return {"run_ids": table["run_ids"], "names": table["names"], "groups": shown}


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) for v in values)


def _said(value: Any, show: Show) -> str:
    try:
        return DASH if missing(value) else show(value)
    except (TypeError, ValueError):  # an imported record may hold anything
        return _plain(value)


def _place(field: str) -> tuple[str, tuple[str, Show, bool]]:
    """(group, (words, how shown, whether it scales)) of a field."""
    found = VARIANT.fullmatch(field)
    if found:
        return f"Variant {found[1]}", OF_VARIANT.get(found[2], (_words(found[2]), _plain, False))
    first = field.partition(".")[0] if "." in field else ""
    return GROUPS.get(first, "Run"), FIELDS.get(field, (_words(field), _plain, False))


def _rank(field: str) -> int:
    """Fields with words stand in the order they are written down here, all others after them."""
    found = VARIANT.fullmatch(field)
    known, name = (OF_VARIANT, found[2]) if found else (FIELDS, field)
    return list(known).index(name) if name in known else len(known)


def _words(field: str) -> str:
    return field.rpartition(".")[2].replace("_", " ")
