"""Putting a run into the tables, in the caller's transaction: what may replace what, and under which id."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from . import catalog, rows
from .codec import Packed, same
from .connection import Cursor
from .errors import StorageError

__all__ = ["DERIVED", "add", "attach", "new_run_id", "put", "start"]

DERIVED = "look/"
"""Arrays whose name begins so were computed from a run after it was saved; they do not make it another run."""

Record = dict[str, Any]


def new_run_id() -> str:
    """An id for a run, such as 20261124-105236-3fa9: the time (UTC), and a few random digits."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def start(cursor: Cursor, record: Record, owner: str | None) -> str:
    """Insert a run whose end is still to come. Raises StorageError if its id is taken."""
    if catalog.peek(cursor, record["run_id"]):
        raise StorageError(
            f"There is a run {record['run_id']} already",
            "Expected a new id",
            "Leave run_id out and one is made",
            reason="exists",
        )
    rows.insert(cursor, record, owner, whole=False)
    return record["run_id"]


def put(
    cursor: Cursor, record: Record, arrays: Sequence[Packed], owner: str | None, whole: bool, replace: bool
) -> str:
    """Insert a run or replace the one it continues; see `Store.save`. `arrays` are sorted by name."""
    run_id = record["run_id"]
    old = catalog.peek(cursor, run_id)
    if old is None:
        rows.insert(cursor, record, owner, whole)
        rows.insert_arrays(cursor, run_id, arrays)
        return run_id
    if owner is not None and old.owner != owner:
        raise StorageError(
            f"The id {run_id} belongs to another run",
            "Expected a new id",
            "Save it under another",
            reason="exists",
        )
    before = rows.read(cursor, run_id)
    if old.whole and not replace:
        if whole and _alike(before, record) and _own(rows.read_arrays(cursor, run_id)) == _own(arrays):
            return run_id
        raise StorageError(
            f"The run {run_id} is saved already, with other content",
            "Expected a run that is not finished, or replace=True",
            "Save it under a new run_id",
            reason="exists",
        )
    rows.remove(cursor, run_id)
    kept = {"name": record["name"] or before["name"], "tags": record["tags"] or before["tags"]}
    rows.insert(cursor, {**record, **kept}, old.owner, whole, shared=old.shared, deleted_at=old.deleted_at)
    rows.insert_arrays(cursor, run_id, arrays)
    return run_id


def add(cursor: Cursor, record: Record, arrays: Sequence[Packed], owner: str | None) -> str:
    """Insert an imported run; see `Store.import_`. Returns the id it has now."""
    run_id = record["run_id"]
    arrays = sorted(arrays, key=lambda array: array.name)
    old = catalog.peek(cursor, run_id)
    if old is not None:
        mine = owner is None or old.owner == owner
        if mine and _alike(rows.read(cursor, run_id), record) and _own(rows.read_arrays(cursor, run_id)) == _own(arrays):
            cursor.execute("UPDATE runs SET deleted_at = NULL WHERE run_id = ?", [run_id])
            return run_id
        while catalog.peek(cursor, run_id) is not None:
            run_id = new_run_id()
    rows.insert(cursor, {**record, "run_id": run_id}, owner, whole=True)
    rows.insert_arrays(cursor, run_id, arrays)
    return run_id


def attach(cursor: Cursor, run_id: str, prefix: str, arrays: Sequence[Packed], owner: str | None) -> None:
    """Put derived arrays in the place of those of the same prefix; see `Store.attach`."""
    for name in [prefix, *(array.name for array in arrays)]:
        if not name.startswith(DERIVED) or not name.startswith(prefix):
            raise StorageError(
                f"{name!r} is no name for an array that was derived from a run",
                f"Expected {DERIVED}… and one prefix for all of them",
                reason="invalid",
            )
    catalog.find(cursor, run_id, owner, change=True)
    rows.remove_arrays(cursor, run_id, prefix)
    rows.insert_arrays(cursor, run_id, arrays)


def _own(arrays: Sequence[Packed]) -> list[Packed]:
    return [array for array in arrays if not array.name.startswith(DERIVED)]


def _alike(a: Record, b: Record) -> bool:
    """Whether two records tell the same run; its name and tags may have been changed since."""
    return same({**a, "name": "", "tags": []}, {**b, "name": "", "tags": []})
