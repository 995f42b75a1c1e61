"""A nested record as flat rows, exactly reversible.

Every row has the columns of `layout` and one more, `rest`: the difference between what the columns alone
would give back and what the record really holds (unknown keys, missing keys, values of an unforeseen type). A
record that keeps to the contract has no differences and `rest` is NULL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .codec import dumps, loads, same
from .layout import CHILD_TABLES, RUNS, Table

__all__ = ["join", "split", "with_added"]

Place = tuple[int, ...]
Rows = dict[str, list[tuple[Any, ...]]]


def split(record: dict[str, Any]) -> Rows:
    """Rows for each table, keyed by its name: `(keys…, fields…, rest)`, without the leading run_id."""
    rows: Rows = {}
    _split(record, RUNS, (), rows)
    return rows


def join(rows: Rows) -> dict[str, Any]:
    """The record that `split` was given; `rows` in the form and order in which `split` made them."""
    below: dict[str, dict[Place, list[tuple[Any, ...]]]] = {}
    for table in CHILD_TABLES:
        groups = below.setdefault(table.name, {})
        for row in rows.get(table.name, ()):
            groups.setdefault(row[: len(table.keys) - 2], []).append(row)
    (row,) = rows[RUNS.name]
    return _join(row, RUNS, (), below)


def with_added(rest: str | None, paths: Iterable[tuple[str, ...]]) -> str:
    """The `rest` of a row that was written before there were fields at `paths`, now that there are."""
    change = loads(rest) if rest else {}
    for *outer, key in paths:
        inner = change
        for name in outer:
            if name in inner.get("set", {}) or name in inner.get("drop", ()):
                break  # The dict around it is kept, or left out, as a whole.
            inner = inner.setdefault("in", {}).setdefault(name, {})
        else:
            if key not in inner.get("set", {}):
                inner.setdefault("drop", []).append(key)
    return dumps(change)


def _split(obj: dict[str, Any], table: Table, place: Place, rows: Rows) -> None:
    taken = [f.kind.take(_at(obj, f.path)) for f in table.fields]
    plain = [f.kind.give(value) for f, value in zip(table.fields, taken)]
    skeleton = _skeleton(plain, table)
    for key, child in table.children.items():
        items = obj.get(key)
        regular = isinstance(items, list) and all(isinstance(item, dict) for item in items)
        skeleton[key] = items if regular else []
        rows.setdefault(child.name, [])
        for i, item in enumerate(skeleton[key]):
            _split(item, child, (*place, i), rows)
    rest = None if same(skeleton, obj) else dumps(_difference(skeleton, obj))
    rows.setdefault(table.name, []).append((*place, *taken, rest))


def _join(row: tuple[Any, ...], table: Table, place: Place, below: dict[str, Any]) -> dict[str, Any]:
    plain = [f.kind.give(value) for f, value in zip(table.fields, row[len(place) : -1])]
    obj = _skeleton(plain, table)
    for key, child in table.children.items():
        found = below[child.name].get(place, [])
        obj[key] = [_join(item, child, (*place, i), below) for i, item in enumerate(found)]
    return obj if row[-1] is None else _patched(obj, loads(row[-1]))


def _at(obj: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(obj, dict):
            return None
        obj = obj.get(key)
    return obj


def _skeleton(values: list[Any], table: Table) -> dict[str, Any]:
    """The object that the columns alone describe: every field present, None where the column is NULL."""
    obj: dict[str, Any] = {}
    for f, value in zip(table.fields, values):
        inner = obj
        for key in f.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[f.path[-1]] = value
    return obj


def _difference(base: dict[str, Any], goal: dict[str, Any]) -> dict[str, Any]:
    """What turns `base` into `goal`: keys to set, keys to drop, and changes within dicts that both have."""
    change: dict[str, Any] = {"set": {}, "in": {}, "drop": [key for key in base if key not in goal]}
    for key, value in goal.items():
        if key in base and same(base[key], value):
            continue
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            change["in"][key] = _difference(base[key], value)
        else:
            change["set"][key] = value
    return {name: part for name, part in change.items() if part}


def _patched(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    dropped = set(change.get("drop", ()))
    out = {key: value for key, value in base.items() if key not in dropped}
    out.update(change.get("set", {}))
    for key, inner in change.get("in", {}).items():
        out[key] = _patched(base[key], inner)
    return out
