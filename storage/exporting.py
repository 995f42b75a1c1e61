"""Runs written to a file. The file appears whole or not at all.

Parquet: one table. Rows of kind "token" are the flat table of `flat`; a row of kind "run" holds the exact
record as JSON; rows of kind "array" hold the arrays. JSON: the records and arrays. Both can be imported again
without loss. CSV: the flat table alone, for spreadsheets.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from .codec import Packed, dumps
from .connection import quoted, side_connection
from .errors import StorageError, explain
from .flat import COLUMNS, token_rows
from .whole import appears_whole

__all__ = ["EXTRA_COLUMNS", "FORMATS", "JSON_FORMAT", "format_of", "write"]

FORMATS = ("parquet", "csv", "json")
JSON_FORMAT = "attention-lab-runs"
EXTRA_COLUMNS = {
    "record": "VARCHAR",
    "array_name": "VARCHAR",
    "dtype": "VARCHAR",
    "shape": "BIGINT[]",
    "codec": "VARCHAR",
    "data": "BLOB",
}
Run = tuple[dict[str, Any], Sequence[Packed]]
_BATCH = 5000


def format_of(path: Path, chosen: str | None) -> str:
    """The format chosen, or else the one that the file's name ends in."""
    name = (chosen or path.suffix.removeprefix(".")).lower()
    if name not in FORMATS:
        raise StorageError(
            f"{chosen or path.name!r} names no export format"
            if chosen or path.suffix
            else f"The name {path.name!r} does not say the format",
            f"Expected one of {', '.join(FORMATS)}",
            reason="invalid",
        )
    return name


def write(runs: Iterator[Run], path: Path, form: str) -> None:
    """Write runs to `path`, replacing a file of that name only when all is written; a device or a pipe is written to."""
    maker: Callable[[Iterator[Run], Path], None] = {"parquet": _parquet, "csv": _csv, "json": _json}[form]
    try:
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        with appears_whole(path, f".{form}") as part:
            maker(runs, part)
    except (duckdb.Error, OSError, MemoryError) as exc:
        raise explain(exc, path) from exc


def _table(runs: Iterator[Run], connection: duckdb.DuckDBPyConnection, full: bool) -> None:
    extra = {"kind": "VARCHAR", **EXTRA_COLUMNS} if full else {}
    columns = {**({"kind": "VARCHAR"} if full else {}), **COLUMNS, **extra}
    connection.execute(f"CREATE TABLE rows ({', '.join(f'{name} {kind}' for name, kind in columns.items())})")
    for record, arrays in runs:
        tokens = list(token_rows(record))
        if full:
            connection.execute(
                "INSERT INTO rows (kind, run_id, name, created, status, record) "
                "VALUES ('run', ?, ?, ?, ?, ?)",
                [*(record[key] for key in ("run_id", "name", "created", "status")), dumps(record)],
            )
        else:
            tokens = [tuple(map(_cell, row)) for row in tokens]
        for start in range(0, len(tokens), _BATCH):
            lists = [list(column) for column in zip(*tokens[start : start + _BATCH])]
            marks = [f"unnest(CAST(? AS {kind}[]))" for kind in COLUMNS.values()]
            connection.execute(
                f"INSERT INTO rows ({'kind, ' if full else ''}{', '.join(COLUMNS)}) "
                f"SELECT {chr(39) + 'token' + chr(39) + ', ' if full else ''}{', '.join(marks)}",
                lists,
            )
        for a in arrays if full else ():
            connection.execute(
                "INSERT INTO rows (kind, run_id, array_name, dtype, shape, codec, data) "
                "VALUES ('array', ?, ?, ?, CAST(? AS BIGINT[]), ?, ?)",
                [record["run_id"], a.name, a.dtype, a.shape, a.codec, a.data],
            )


def _parquet(runs: Iterator[Run], path: Path) -> None:
    _copy(runs, path, True, "FORMAT parquet, COMPRESSION zstd")


def _csv(runs: Iterator[Run], path: Path) -> None:
    _copy(runs, path, False, "FORMAT csv, HEADER true")


def _copy(runs: Iterator[Run], path: Path, full: bool, options: str) -> None:
    with tempfile.TemporaryDirectory(prefix="attention-lab-", ignore_cleanup_errors=True) as spill:
        with side_connection(Path(spill)) as connection:
            _table(runs, connection, full)
            connection.execute(f"COPY rows TO {quoted(path.absolute())} ({options})")


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if isinstance(value, str) and len(value) > 1 and value[0] in "=+-@\t\r":
        return "'" + value
    return value


def _json(runs: Iterator[Run], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        head = {
            "format": JSON_FORMAT,
            "version": 1,
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file.write(json.dumps(head)[:-1] + ', "runs": [')
        for i, (record, arrays) in enumerate(runs):
            described = [
                {
                    "name": a.name,
                    "dtype": a.dtype,
                    "shape": a.shape,
                    "codec": a.codec,
                    "data": base64.b64encode(a.data).decode("ascii"),
                }
                for a in arrays
            ]
            file.write(
                (",\n" if i else "\n") + f'{{"record": {dumps(record)}, "arrays": {json.dumps(described)}}}'
            )
        file.write("\n]}\n")
