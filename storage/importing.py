"""Exported runs read back from a file. Everything is checked before anything is returned."""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from pathlib import Path
from typing import Any

import duckdb

from .codec import Packed, loads, normalise, unpack
from .connection import side_connection
from .errors import StorageError, explain
from .exporting import EXTRA_COLUMNS, JSON_FORMAT
from .validate import check

__all__ = ["load", "read_file"]

Run = tuple[dict[str, Any], list[Packed]]


def load(path: str | Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs of an exported file as `(record, arrays)`, without any database."""
    return [(record, {a.name: unpack(a) for a in arrays}) for record, arrays in read_file(Path(path))]


def read_file(path: Path) -> list[Run]:
    """The runs of a Parquet or JSON export (or of a record written by the command line's --json), all valid.

    Raises StorageError naming the first fault.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(b"PAR1"):
            runs = _parquet(path)
        elif head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            runs = _json(path)
        elif not head:
            raise StorageError(f"{path.name} is empty", "Expected runs exported by Attention Lab", reason="invalid")
        else:
            csv = head.startswith((b"run_id,", b"\xef\xbb\xbfrun_id,"))
            raise StorageError(
                f"{path.name} is {'a CSV table' if csv else 'neither Parquet nor JSON'}",
                "Expected runs exported by Attention Lab as Parquet or JSON"
                + (" (CSV leaves out most of a run)" if csv else ""),
                "Export the runs again as Parquet",
                reason="invalid",
            )
    except (OSError, MemoryError, duckdb.OutOfMemoryException) as exc:
        raise explain(exc, path) from exc
    except RecursionError:
        raise StorageError(
            f"{path.name} is nested too deeply", "Expected a run record", reason="invalid"
        ) from None
    if not runs:
        raise StorageError(f"{path.name} holds no runs", "Expected at least one", reason="invalid")
    return runs


def _checked(record: Any, arrays: list[Packed], where: str) -> Run:
    check(record, f"{where}.", deep=True)
    record = normalise(record, where)
    seen = set()
    for array in arrays:
        if array.name in seen:
            raise StorageError(
                f"{where} has two arrays named {array.name!r}", "Expected each name once", reason="invalid"
            )
        seen.add(array.name)
        unpack(array)
    return record, arrays


def _json(path: Path) -> list[Run]:
    try:
        content = loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as exc:
        raise StorageError(
            f"{path.name} is not valid JSON: {exc.msg} in line {exc.lineno}, column {exc.colno}",
            "Expected a whole JSON file",
            "It may have been cut off: export or copy it again",
            reason="invalid",
        ) from None
    except (ValueError, TypeError) as exc:  # Also text that is not UTF-8.
        raise StorageError(
            f"{path.name} is not valid JSON: {exc}", "Expected JSON in UTF-8", reason="invalid"
        ) from None
    if (
        isinstance(content, dict)
        and "format" not in content
        and ("run_id" in content or "variants" in content)
    ):
        return [_checked(content, [], "record")]
    if not isinstance(content, dict) or content.get("format") != JSON_FORMAT:
        raise StorageError(
            f"{path.name} is JSON, but no export of Attention Lab",
            f'Expected an object with "format": "{JSON_FORMAT}", or a run record',
            reason="invalid",
        )
    if content.get("version") != 1:
        raise StorageError(
            f"version is {content.get('version')!r} in {path.name}",
            "Expected 1",
            "Use the Attention Lab that wrote it",
            reason="newer",
        )
    if not isinstance(content.get("runs"), list):
        raise StorageError(
            f"runs is missing or no list in {path.name}", "Expected a list of runs", reason="invalid"
        )
    return [_json_run(run, f"runs[{i}]") for i, run in enumerate(content["runs"])]


def _json_run(run: Any, where: str) -> Run:
    if not isinstance(run, dict) or "record" not in run:
        raise StorageError(
            f"{where}.record is missing", 'Expected {"record": …, "arrays": […]}', reason="invalid"
        )
    arrays = run.get("arrays", [])
    if not isinstance(arrays, list):
        raise StorageError(f"{where}.arrays is no list", "Expected a list of arrays", reason="invalid")
    return _checked(
        run["record"],
        [_json_array(a, f"{where}.arrays[{i}]") for i, a in enumerate(arrays)],
        f"{where}.record",
    )


def _json_array(array: Any, where: str) -> Packed:
    for key, kind in (("name", str), ("dtype", str), ("shape", list), ("codec", str), ("data", str)):
        if not isinstance(array, dict) or not isinstance(array.get(key), kind):
            raise StorageError(
                f"{where}.{key} is missing or of another type",
                f"Expected {'a list of sizes' if kind is list else 'text'}",
                reason="invalid",
            )
    try:
        data = base64.b64decode(array["data"], validate=True)
    except (binascii.Error, ValueError):
        raise StorageError(
            f"{where}.data is not base64", "Expected the array's bytes in base64", reason="invalid"
        ) from None
    return Packed(array["name"], array["dtype"], array["shape"], array["codec"], data)


def _parquet(path: Path) -> list[Run]:
    with tempfile.TemporaryDirectory(prefix="attention-lab-", ignore_cleanup_errors=True) as folder:
        # DuckDB reads a path with * ? or [ as a pattern, so the file gets a plain name; and nothing else is
        # readable.
        plain = Path(folder) / "runs.parquet"
        try:
            plain.symlink_to(path.absolute())
        except OSError:
            plain.write_bytes(path.read_bytes())
        with side_connection(Path(folder)) as connection:
            connection.execute("SET memory_limit = '4GB'")
            connection.execute(
                "SET allowed_paths = [?]".replace("?", "'" + str(plain).replace("'", "''") + "'")
            )
            connection.execute("SET enable_external_access = false")
            try:
                return _parquet_runs(connection, str(plain), path.name)
            except duckdb.OutOfMemoryException:
                raise
            except duckdb.Error as exc:
                raise StorageError(
                    f"{path.name} is not a whole Parquet file: {_said(exc, plain, path)}",
                    "Expected runs exported by Attention Lab",
                    "It may have been cut off: export or copy it again",
                    reason="invalid",
                ) from exc


def _said(exc: duckdb.Error, copy: Path, path: Path) -> str:
    """The first line of what DuckDB says, of the file that the person gave and without the name of the kind of error."""
    return str(exc).splitlines()[0].replace(str(copy), path.name).split(" Error: ", 1)[-1]


def _parquet_runs(connection: duckdb.DuckDBPyConnection, file: str, name: str) -> list[Run]:
    columns = {
        row[0]: row[1]
        for row in connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [file]).fetchall()
    }
    for column, kind in {"kind": "VARCHAR", "run_id": "VARCHAR", **EXTRA_COLUMNS}.items():
        if columns.get(column) != kind:
            raise StorageError(
                f"The column {column} is missing in {name} or has another type",
                f"Expected it as {kind}",
                "Only Parquet files exported by Attention Lab can be imported",
                reason="invalid",
            )
    arrays: dict[str, list[Packed]] = {}
    for run_id, *parts in connection.execute(
        "SELECT run_id, array_name, dtype, shape, codec, data FROM read_parquet(?) WHERE kind = 'array'",
        [file],
    ).fetchall():
        if any(part is None for part in parts):
            raise StorageError(
                f"An array of the run {run_id!r} in {name} is incomplete",
                "Expected array_name, dtype, shape, codec and data",
                reason="invalid",
            )
        arrays.setdefault(run_id, []).append(Packed(*parts))
    runs: list[Run] = []
    for i, (run_id, text) in enumerate(
        connection.execute("SELECT run_id, record FROM read_parquet(?) WHERE kind = 'run'", [file]).fetchall()
    ):
        try:
            record = loads(text or "")
        except (ValueError, TypeError) as exc:
            raise StorageError(
                f"runs[{i}].record in {name} is not valid JSON: {exc}",
                "Expected a run record",
                reason="invalid",
            ) from None
        runs.append(_checked(record, arrays.pop(run_id, []), f"runs[{i}].record"))
    if arrays:
        raise StorageError(
            f"{name} has arrays of a run that is not in it: {next(iter(arrays))!r}",
            "Expected the record of every run",
            reason="invalid",
        )
    return runs
