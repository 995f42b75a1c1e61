"""Runs in the tables: written, read and removed whole, within the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from . import shred
from .codec import Packed
from .connection import Cursor
from .layout import CHILD_TABLES, LEVELS, RUNS, Table

__all__ = [
    "array_names", "insert", "insert_arrays", "now", "read", "read_array", "read_arrays", "remove", "remove_arrays",
]

_TABLES = (*(table.name for table in LEVELS), "maps")


def insert(
    cursor: Cursor,
    record: dict[str, Any],
    owner: str | None,
    whole: bool,
    *,
    shared: bool = False,
    deleted_at: datetime | None = None,
) -> None:
    """Add a run that is not there yet. `whole` is False for one whose end is still to come."""
    rows = shred.split(record)
    own = {"owner": owner, "whole": whole, "saved_at": now(), "shared": shared, "deleted_at": deleted_at}
    columns = [*own, *(f.column for f in RUNS.fields), "rest"]
    marks = ["?"] * len(own) + [f"CAST(? AS {f.kind.sql})" for f in RUNS.fields] + ["CAST(? AS JSON)"]
    cursor.execute(
        f"INSERT INTO runs ({', '.join(columns)}) VALUES ({', '.join(marks)})",
        [*own.values(), *rows[RUNS.name][0]],
    )
    for table in CHILD_TABLES:
        if rows.get(table.name):
            _insert_rows(cursor, record["run_id"], table, rows[table.name])


def _insert_rows(cursor: Cursor, run_id: str, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """All rows in one statement, a list per column: row by row DuckDB takes a millisecond each."""
    places = table.keys[1:]
    names, parts, lists = ["run_id", *places], ["?"], [run_id]
    parts += ["unnest(CAST(? AS INTEGER[]))"] * len(places)
    columns = list(zip(*rows))
    lists += [list(column) for column in columns[: len(places)]]
    for f, column in zip(table.fields, columns[len(places) :]):
        names.append(f.column)
        parts.append(f"{f.kind.wrap}(unnest(CAST(? AS {f.kind.parameter or f.kind.sql}[])))")
        lists.append([f.kind.bind(value) for value in column])
    cursor.execute(
        f"INSERT INTO {table.name} ({', '.join(names)}, rest) "
        f"SELECT {', '.join(parts)}, unnest(CAST(? AS JSON[]))",
        [*lists, list(columns[-1])],
    )


def insert_arrays(cursor: Cursor, run_id: str, arrays: Sequence[Packed]) -> None:
    """Add the arrays of a run."""
    for array in arrays:
        cursor.execute(
            "INSERT INTO maps (run_id, name, dtype, shape, codec, data) "
            "VALUES (?, ?, ?, CAST(? AS BIGINT[]), ?, ?)",
            [run_id, array.name, array.dtype, array.shape, array.codec, array.data],
        )


def remove(cursor: Cursor, run_id: str) -> None:
    """Take a run out of every table."""
    for name in _TABLES:
        cursor.execute(f"DELETE FROM {name} WHERE run_id = ?", [run_id])


def remove_arrays(cursor: Cursor, run_id: str, prefix: str) -> None:
    """Take out a run's arrays whose name begins with ``prefix``."""
    cursor.execute("DELETE FROM maps WHERE run_id = ? AND starts_with(name, ?)", [run_id, prefix])


def read(cursor: Cursor, run_id: str, tokens: bool = True) -> dict[str, Any]:
    """The record of a run that exists; without `tokens` the lists below its variants stay empty."""
    found: shred.Rows = {}
    for table in LEVELS if tokens else LEVELS[:2]:
        names = [*table.keys[1:], *(f.column for f in table.fields), "rest"]
        order = f"ORDER BY {', '.join(table.keys[1:])}" if table.keys else ""
        found[table.name] = cursor.execute(
            f"SELECT {', '.join(names)} FROM {table.name} WHERE run_id = ? {order}", [run_id]
        ).fetchall()
    return shred.join(found)


def array_names(cursor: Cursor, run_id: str) -> list[str]:
    """The names of a run's arrays, sorted."""
    return [
        name
        for (name,) in cursor.execute(
            "SELECT name FROM maps WHERE run_id = ? ORDER BY name", [run_id]
        ).fetchall()
    ]


def read_array(cursor: Cursor, run_id: str, name: str) -> Packed | None:
    """One array, packed; None if the run has none of that name."""
    row = cursor.execute(
        "SELECT name, dtype, shape, codec, data FROM maps WHERE run_id = ? AND name = ?", [run_id, name]
    ).fetchone()
    return Packed(*row) if row else None


def read_arrays(cursor: Cursor, run_id: str) -> list[Packed]:
    """All arrays of a run, packed, sorted by name."""
    return [
        Packed(*row)
        for row in cursor.execute(
            "SELECT name, dtype, shape, codec, data FROM maps WHERE run_id = ? ORDER BY name", [run_id]
        ).fetchall()
    ]


def now() -> datetime:
    """The time as the tables hold it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
