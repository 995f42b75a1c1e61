"""How one value of a record becomes one column of a table, and back.

A kind is best effort in one direction: a value that its column cannot hold becomes NULL or the nearest value,
and `shred` then keeps the exact value beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .codec import dumps, loads

__all__ = ["KINDS", "Kind"]


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    """`sql` is the column's type; `take` turns a record's value into what a SELECT would
    return, `give` turns that back into the record's value.

    Where DuckDB does not accept as a parameter what it returns, `bind` converts it to the type `parameter`,
    and the SQL function `wrap` makes the column's type of that.
    """

    sql: str
    take: Callable[[Any], Any]
    give: Callable[[Any], Any] = _unchanged
    bind: Callable[[Any], Any] = _unchanged
    parameter: str = ""
    wrap: str = ""


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _bool(value: Any) -> bool | None:
    return (
        bool(value) if isinstance(value, bool) or (type(value) in (int, float) and value in (0, 1)) else None
    )


def _list_of(take: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> list[Any] | None:
        return [take(item) for item in value] if isinstance(value, list) else None

    return convert


def _choices(value: Any) -> list[dict[str, Any]] | None:
    if not isinstance(value, list) or not all(isinstance(item, list) and len(item) == 3 for item in value):
        return None
    return [{"id": _int(i), "text": _text(text), "prob": _float(prob)} for i, text, prob in value]


def _choices_back(value: list[dict[str, Any]] | None) -> list[list[Any]] | None:
    return None if value is None else [[item["id"], item["text"], item["prob"]] for item in value]


def _tally(value: Any) -> dict[str, Any] | None:
    return {key: _int(count) for key, count in value.items()} if isinstance(value, dict) else None


def _tally_entries(value: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    return None if value is None else [{"k": key, "v": count} for key, count in value.items()]


KINDS: dict[str, Kind] = {
    "text": Kind("VARCHAR", _text),
    "int": Kind("BIGINT", _int),
    "float": Kind("DOUBLE", _float),
    "bool": Kind("BOOLEAN", _bool),
    "texts": Kind("VARCHAR[]", _list_of(_text)),
    "ints": Kind("BIGINT[]", _list_of(_int)),
    # JSON null and SQL NULL are one here: both come back as None.
    "json": Kind(
        "JSON",
        lambda value: None if value is None else dumps(value),
        lambda text: None if text is None else loads(text),
    ),
    "choices": Kind("STRUCT(id BIGINT, text VARCHAR, prob DOUBLE)[]", _choices, _choices_back),
    "tally": Kind(
        "MAP(VARCHAR, BIGINT)",
        _tally,
        bind=_tally_entries,
        parameter="STRUCT(k VARCHAR, v BIGINT)[]",
        wrap="map_from_entries",
    ),
}
