"""Is this a run record? The first fault is named with its place, as in `variants[1].tokens[3].id`."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from .errors import StorageError

__all__ = ["RECORD_SCHEMA", "STATUSES", "check", "check_name", "check_tags"]

RECORD_SCHEMA = 1
STATUSES = ("complete", "partial", "interrupted", "cancelled", "failed")  # partial: one variant failed, another did not
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_NUMBER = (int, float)
_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    _NUMBER: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
# Types of the keys where they are present and not null; what must be present is in _REQUIRED.
_TYPES: dict[str, dict[Any, str]] = {
    "record": {str: "device", dict: "model environment settings prompt", list: "variants"},
    "model": {
        str: "id source revision architecture dtype weights device",
        list: "layer_types",
        _NUMBER: "weights_kl",
        int: "parameters layers heads kv_heads head_dim context vocab sliding_window kv_bytes_per_token",
    },
    "settings": {int: "max_new_tokens top_k samples", _NUMBER: "temperature top_p seed", str: "timing"},
    "prompt": {str: "text", list: "token_ids tokens"},
    "variants": {
        str: "letter spec title text finish error",
        list: "techniques token_ids tokens fidelity layers",
        _NUMBER: "ttft_ms tpot_ms kv_bytes kv_bytes_dense slack_bytes kept_fraction read_fraction kl_mean "
        "top1_agreement perplexity first_divergence",
        bool: "simulated",
    },
    "tokens": {
        int: "id",
        str: "text",
        _NUMBER: "logprob entropy step_ms kv_bytes kept",
        list: "alternatives",
    },
    "fidelity": {_NUMBER: "kl agree ref_prob var_prob", list: "top"},
    "layers": {int: "layer", _NUMBER: "kv_bytes", dict: "bits"},
}
_REQUIRED = {
    "record": "schema run_id name tags created status model prompt variants",
    "prompt": "text",
    "variants": "letter spec",
    "tokens": "id text",
    "layers": "layer",
}
_REQUIRED_WHEN_COMPLETE = {
    "record": "settings",
    "model": "id",
    "prompt": "token_ids tokens",
    "variants": "text token_ids tokens",
}
_OBJECTS = ("model", "settings", "prompt")
_LISTS = {"record": ("variants",), "variants": ("tokens", "fidelity", "layers")}
_ITEMS: dict[str, dict[str, Any]] = {
    "variants": {"token_ids": int},
    "prompt": {"token_ids": int, "tokens": str},
}


def check(record: Any, where: str = "", deep: bool = False) -> None:
    """Raise StorageError unless `record` is a run record of this schema.

    Shallow looks at what storage itself relies on (the keys at the top). Deep looks at every value whose type
    the record format fixes, and is for files from elsewhere. Unknown keys are allowed: they are kept.
    """
    _object(record, where.rstrip(".") or "The record")
    if "schema" not in record:
        raise _fault(f"{where}schema", "is missing", f"Expected {RECORD_SCHEMA}")
    if record["schema"] != RECORD_SCHEMA or isinstance(record["schema"], bool):
        raise _fault(
            f"{where}schema",
            f"is {record['schema']!r}",
            f"Expected {RECORD_SCHEMA}, the record format this version reads",
            "Use the Attention Lab that wrote it",
        )
    _require(record, "record", where)
    if not isinstance(record["run_id"], str) or not _RUN_ID.fullmatch(record["run_id"]):
        raise _fault(
            f"{where}run_id",
            f"is {record['run_id']!r}",
            "Expected up to 100 letters, digits, '.', '_' or '-'",
        )
    if not _is_time(record["created"]):
        raise _fault(f"{where}created", f"is {record['created']!r}", "Expected an ISO 8601 time as text")
    if record["status"] not in STATUSES:
        raise _fault(f"{where}status", f"is {record['status']!r}", f"Expected one of {', '.join(STATUSES)}")
    check_name(record["name"], f"{where}name")
    check_tags(record["tags"], f"{where}tags")
    if deep:
        _level(record, "record", where, record["status"] == "complete")


def check_name(name: Any, where: str = "The name") -> None:
    """Raise StorageError unless it can name a run."""
    if not isinstance(name, str) or not _plain(name, 200):
        raise _fault(where, f"is {_short(name)}", "Expected text of at most 200 characters")


def check_tags(tags: Any, where: str = "The list of tags") -> None:
    """Raise StorageError unless it is a list of tags."""
    if not isinstance(tags, list) or len(tags) > 50:
        raise _fault(where, f"is {_short(tags)}", "Expected a list of at most 50 tags")
    for i, tag in enumerate(tags):
        if not isinstance(tag, str) or not _plain(tag, 60):
            raise _fault(f"{where}[{i}]", f"is {_short(tag)}", "Expected text of at most 60 characters")


def _plain(text: str, longest: int) -> bool:
    return len(text) <= longest and not any("\ud800" <= char <= "\udfff" for char in text)


def _is_time(text: Any) -> bool:
    try:
        return isinstance(text, str) and datetime.fromisoformat(text) is not None
    except ValueError:
        return False


def _level(obj: dict[str, Any], level: str, where: str, complete: bool) -> None:
    _require(obj, level, where)
    if complete:
        _require(obj, level, where, _REQUIRED_WHEN_COMPLETE)
    for kind, keys in _TYPES[level].items():
        for key in keys.split():
            if obj.get(key) is not None and not _is(obj[key], kind):
                raise _fault(f"{where}{key}", f"is {_short(obj[key])}", f"Expected {_NAMES[kind]} or null")
    for key, kind in _ITEMS.get(level, {}).items():
        for i, item in enumerate(obj.get(key) or ()):
            if not _is(item, kind):
                raise _fault(f"{where}{key}[{i}]", f"is {_short(item)}", f"Expected {_NAMES[kind]}")
    if level == "record":
        for key in _OBJECTS:
            if obj.get(key) is not None:
                _level(obj[key], key, f"{where}{key}.", complete)
            elif key in _REQUIRED["record"].split():
                raise _fault(f"{where}{key}", "is null", "Expected an object")
    for key in _LISTS.get(level, ()):
        for i, item in enumerate(obj.get(key) or ()):
            _object(item, f"{where}{key}[{i}]")
            _level(item, key, f"{where}{key}[{i}].", complete)
    for key in ("alternatives", "top"):
        for i, item in enumerate(obj.get(key) or () if level in ("tokens", "fidelity") else ()):
            if not (
                isinstance(item, list)
                and len(item) == 3
                and _is(item[0], int)
                and isinstance(item[1], str)
                and (item[2] is None or _is(item[2], _NUMBER))
            ):
                raise _fault(
                    f"{where}{key}[{i}]", f"is {_short(item)}", "Expected [token id, text, probability]"
                )


def _require(obj: dict[str, Any], level: str, where: str, table: dict[str, str] = _REQUIRED) -> None:
    for key in table.get(level, "").split():
        if key not in obj:
            raise _fault(f"{where}{key}", "is missing", f"Expected every {_one(level)} to have {key!r}")


def _one(level: str) -> str:
    return {"record": "run", "variants": "variant", "tokens": "token", "layers": "layer"}.get(level, level)


def _is(value: Any, kind: Any) -> bool:
    # A mean agreement is a number and a single one is true or false; elsewhere true is no number.
    if kind is _NUMBER:
        return isinstance(value, (int, float))
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _fault(where, f"is {_short(value)}", "Expected an object")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _fault(where: str, what: str, expected: str, fix: str | None = None) -> StorageError:
    return StorageError(f"{where} {what}", expected, fix, reason="invalid")
