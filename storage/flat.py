"""A run as a flat table with a row per token: what spreadsheets and data frames want."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from .kinds import KINDS

__all__ = ["COLUMNS", "token_rows"]

# Column, its type, and where its value comes from. `forced_` figures are teacher-forced: they belong to the
# reference variant's token at this place, not to the token that this variant itself wrote.
_SOURCES: tuple[tuple[str, str, str, str], ...] = (
    ("run_id", "text", "run", "run_id"),
    ("name", "text", "run", "name"),
    ("created", "text", "run", "created"),
    ("status", "text", "run", "status"),
    ("model", "text", "model", "id"),
    ("device", "text", "run", "device"),
    ("seed", "int", "settings", "seed"),
    ("letter", "text", "variant", "letter"),
    ("spec", "text", "variant", "spec"),
    ("place", "int", "place", "place"),
    ("token_id", "int", "token", "id"),
    ("text", "text", "token", "text"),
    ("logprob", "float", "token", "logprob"),
    ("entropy", "float", "token", "entropy"),
    ("step_ms", "float", "token", "step_ms"),
    ("kv_bytes", "int", "token", "kv_bytes"),
    ("kept", "float", "token", "kept"),
    ("forced_kl", "float", "fidelity", "kl"),
    ("forced_agree", "bool", "fidelity", "agree"),
    ("forced_ref_prob", "float", "fidelity", "ref_prob"),
    ("forced_var_prob", "float", "fidelity", "var_prob"),
)
COLUMNS: dict[str, str] = {column: KINDS[kind].sql for column, kind, _, _ in _SOURCES}


def token_rows(record: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Rows with the columns of COLUMNS. A variant without tokens has one row, with an empty place."""
    for variant in _list(record.get("variants")):
        variant = _dict(variant)
        pairs = list(zip_longest(_list(variant.get("tokens")), _list(variant.get("fidelity"))))
        for place, (token, fidelity) in enumerate(pairs or [(None, None)]):
            parts = {
                "run": record,
                "model": _dict(record.get("model")),
                "settings": _dict(record.get("settings")),
                "variant": variant,
                "token": _dict(token),
                "fidelity": _dict(fidelity),
                "place": {"place": place if pairs else None},
            }
            yield tuple(KINDS[kind].take(parts[part].get(key)) for _, kind, part, key in _SOURCES)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
