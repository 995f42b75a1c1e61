"""The store: the one object that the rest of the lab talks to."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from . import catalog, exporting, importing, rows, saving, validate
from . import compare as comparing
from .catalog import owner_key
from .codec import Packed, normalise, pack, unpack
from .connection import Cursor, Database
from .errors import StorageError
from .opening import Opened, open_file, open_snapshot
from .saving import new_run_id

__all__ = ["Store"]

Record = dict[str, Any]
Ids = str | Iterable[str]
Result = TypeVar("Result")


class Store:
    """Saved runs in one DuckDB file. `Store.open` makes one; use it from any thread; close it (or `with`).

    Every method raises StorageError, whose text is for people. Wherever there is `owner`, it is a visitor's
    token: with it only that visitor's runs exist (and, for reading, runs that were shared); None is the local
    owner, for whom all runs exist.

    Attributes:
        path: the file, or None for a store in memory.
        notice: a sentence to show to the user, or None if all is as usual.
        read_only: whether saving is refused.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened: Opened | None = opened
        self.path, self.read_only, self.notice = opened.path, opened.read_only, opened.notice

    @classmethod
    def open(cls, path: str | Path | None = None, read_only: bool = False, fallback: bool = False) -> Store:
        """Open the run database at `path`, making it if need be.

        None is `default_path()`; ":memory:" keeps nothing. With `fallback` a file that cannot be used gives a
        store in memory instead of an error: it works until it is closed, and its `notice` says why and what
        to do. If another process holds the file, that store starts with the runs that were saved so far.
        """
        return cls(open_file(path, read_only, fallback))

    @classmethod
    def open_snapshot(cls, path: str | Path | None = None) -> Store:
        """A read-only look at a database that another process is using: a copy, as it was at this moment."""
        return cls(open_snapshot(path))

    def close(self) -> None:
        """Close the store. A second call does nothing."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Saving

    def begin(self, record: Mapping[str, Any], owner: str | None = None) -> str:
        """Note that a run starts, with what is known of it (model, settings, prompt, the variants' specs).

        Whatever happens then, it is found again with the status "interrupted". Missing schema, run_id,
        created, name, tags, model, prompt and variants are filled in. Returns the run's id.
        """
        record = {
            "schema": validate.RECORD_SCHEMA,
            "run_id": new_run_id(),
            "name": "",
            "tags": [],
            "created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "model": None,
            "prompt": None,
            "variants": [],
            **normalise(record),
            "status": "interrupted",
        }
        validate.check(record)
        return self._write(lambda cursor: saving.start(cursor, record, owner_key(owner)))

    def checkpoint(self, record: Mapping[str, Any], owner: str | None = None) -> None:
        """Keep what a begun run has so far, still marked interrupted.

        All of it is written anew (about 0.1 ms a token), so call it every few seconds, not every token.
        """
        record = {**normalise(record), "status": "interrupted"}
        validate.check(record)
        self._write(
            lambda cursor: saving.put(cursor, record, [], owner_key(owner), whole=False, replace=False)
        )

    def save(
        self,
        record: Mapping[str, Any],
        arrays: Mapping[str, Any] | None = None,
        owner: str | None = None,
        replace: bool = False,
    ) -> str:
        """Save a run whole, begun or not, in one transaction: if that fails, all is as it was before.

        `arrays` are NumPy arrays of numbers by name. Saving the same again does nothing; saving something
        else under the id of a finished run needs `replace`. A name or tags given while the run was going on
        are kept if the record has none. Returns the run's id.
        """
        record = normalise(record)
        validate.check(record)
        packed = [pack(name, array) for name, array in sorted((arrays or {}).items())]
        return self._write(
            lambda cursor: saving.put(cursor, record, packed, owner_key(owner), whole=True, replace=replace)
        )

    def attach(
        self, run_id: str, prefix: str, arrays: Mapping[str, Any], owner: str | None = None
    ) -> None:
        """Keep what was computed from a saved run with it, in the place of what was kept under `prefix` before.

        Names begin with `prefix`, which begins with "look/". The record and its other arrays stay as they are; the run
        counts as the same run. Only its owner may; raises StorageError for anybody else, as if it were not there.
        """
        packed = [pack(name, array) for name, array in sorted(arrays.items())]
        self._write(lambda cursor: saving.attach(cursor, run_id, prefix, packed, owner_key(owner)))

    # Reading

    def get(self, run_id: str, owner: str | None = None) -> tuple[Record, builtins.list[str]]:
        """The record, exactly as it was saved, and the names of its arrays."""

        def work(cursor: Cursor) -> tuple[Record, builtins.list[str]]:
            catalog.find(cursor, run_id, owner_key(owner))
            return rows.read(cursor, run_id), rows.array_names(cursor, run_id)

        return self._read(work)

    def array(self, run_id: str, name: str, owner: str | None = None) -> np.ndarray:
        """One array of a run, with the dtype and shape it was saved with."""

        def work(cursor: Cursor) -> Packed:
            catalog.find(cursor, run_id, owner_key(owner))
            packed = rows.read_array(cursor, run_id, name)
            if packed is None:
                have = rows.array_names(cursor, run_id)
                raise StorageError(
                    f"The run {run_id} has no array {name!r}",
                    f"Expected one of {', '.join(have)}" if have else "It was saved without arrays",
                    reason="missing",
                )
            return packed

        return unpack(self._read(work))

    def list(
        self,
        search: str | None = None,
        tags: Sequence[str] | None = None,
        limit: int | None = 100,
        order: str = "-created",
        owner: str | None = None,
        *,
        status: str | None = None,
        offset: int = 0,
        deleted: bool = False,
    ) -> builtins.list[dict[str, Any]]:
        """Rows for a table of runs, newest first.

        Args:
            search: words that must all occur in id, name, model, prompt, tags or specs, whatever their case.
            tags: tags that a run must have, all of them.
            limit, offset: the window of rows; a limit of None is all.
            order: created, name, model, status, saved, kl or kv; a minus sign before it turns it round.
            deleted: list the deleted runs instead.

        Each row has run_id, name, tags, created, status, model, device, prompt, shared, visitor (whether a
        visitor saved it), whole, saved_at, specs, titles, kl_worst (nats), kv_smallest (share of the dense
        bytes), tokens.
        """
        return self._read(
            lambda cursor: catalog.listing(
                cursor,
                search=search,
                tags=tags,
                status=status,
                limit=limit,
                offset=offset,
                order=order,
                owner=owner_key(owner),
                deleted=deleted,
            )
        )

    def compare(
        self, ids: Sequence[str], only_differences: bool = True, owner: str | None = None
    ) -> dict[str, Any]:
        """Up to ten runs field by field: see `storage.compare.compare` for the table that is returned."""

        def work(cursor: Cursor) -> builtins.list[Record]:
            return [rows.read(cursor, found.run_id, tokens=False) for found in self._find(cursor, ids, owner)]

        return comparing.compare(self._read(work), only_differences)

    # Changing

    def rename(self, run_id: str, name: str, owner: str | None = None) -> None:
        """Give a run a name (spaces around it are taken off; an empty name is none)."""
        validate.check_name(name)
        self._change(run_id, owner, "name = ?", name.strip())

    def tag(self, run_id: str, tags: Sequence[str], owner: str | None = None) -> builtins.list[str]:
        """Replace a run's tags. Returns them without empty and double ones."""
        if isinstance(tags, str):
            validate.check_tags(tags)
        cleaned = builtins.list(dict.fromkeys(str(tag).strip() for tag in tags if str(tag).strip()))
        validate.check_tags(cleaned)
        self._change(run_id, owner, "tags = CAST(? AS VARCHAR[])", cleaned)
        return cleaned

    def share(self, run_id: str, shared: bool = True, owner: str | None = None) -> None:
        """Let anyone who knows the run's id read it, or no longer. It is listed for nobody else."""
        self._change(run_id, owner, "shared = ?", bool(shared))

    def delete(self, ids: Ids, owner: str | None = None) -> int:
        """Delete runs so that `undelete` can bring them back. All or none; returns how many."""
        return self._change(ids, owner, "deleted_at = ?", rows.now())

    def undelete(self, ids: Ids, owner: str | None = None) -> int:
        """Bring deleted runs back. Returns how many."""
        return self._change(ids, owner, "deleted_at = ?", None, deleted=True)

    def purge(self, ids: Ids | None = None, owner: str | None = None) -> int:
        """Remove deleted runs for good: those named, or all. Returns how many."""
        key = owner_key(owner)

        def work(cursor: Cursor) -> int:
            if ids is None:
                found = [
                    catalog.peek(cursor, row["run_id"])
                    for row in catalog.listing(cursor, limit=None, owner=key, deleted=True)
                ]
            else:
                found = self._find(cursor, ids, owner, change=True, deleted=True)
            for one in found:
                if one.deleted_at is None:
                    raise StorageError(
                        f"The run {one.run_id} is not deleted",
                        "Expected a deleted run",
                        "Delete it first",
                        reason="invalid",
                    )
                rows.remove(cursor, one.run_id)
            return len(found)

        count = self._write(work)
        if count:
            self._database.checkpoint()
        return count

    # Files

    def export(
        self, ids: Ids | None, path: str | Path, format: str | None = None, owner: str | None = None
    ) -> Path:
        """Write runs (None: all that are listed) to a file: parquet, csv or json, by default as it ends.

        Parquet and JSON hold everything and can be imported; CSV has a row per token, for spreadsheets.
        """
        path = Path(path).expanduser()
        form = exporting.format_of(path, format)

        def choose(cursor: Cursor) -> builtins.list[str]:
            if ids is None:
                return [row["run_id"] for row in catalog.listing(cursor, limit=None, owner=owner_key(owner))]
            return [found.run_id for found in self._find(cursor, ids, owner)]

        chosen = self._read(choose)
        if not chosen:
            raise StorageError("There is no run to export", "Expected at least one", reason="invalid")

        def runs() -> Iterator[tuple[Record, Sequence[Packed]]]:
            for run_id in chosen:
                yield self._read(
                    lambda cursor, run_id=run_id: (
                        rows.read(cursor, run_id),
                        rows.read_arrays(cursor, run_id) if form != "csv" else [],
                    )
                )

        exporting.write(runs(), path, form)
        return path

    def import_(self, path: str | Path, owner: str | None = None) -> builtins.list[str]:
        """Add the runs of a Parquet or JSON export, all or none. Returns their ids.

        A run that is here already is left as it is (and brought back if it was deleted); one whose id is
        taken by another run gets a new id.
        """
        runs = importing.read_file(Path(path).expanduser())
        key = owner_key(owner)

        def work(cursor: Cursor) -> builtins.list[str]:
            return [saving.add(cursor, record, arrays, key) for record, arrays in runs]

        return self._write(work)

    # Within

    def _find(
        self, cursor: Cursor, ids: Ids, owner: str | None, **rights: bool
    ) -> builtins.list[catalog.Found]:
        ids = [ids] if isinstance(ids, str) else dict.fromkeys(ids)
        return [catalog.find(cursor, run_id, owner_key(owner), **rights) for run_id in ids]

    def _change(self, ids: Ids, owner: str | None, assignment: str, value: Any, deleted: bool = False) -> int:
        def work(cursor: Cursor) -> int:
            found = self._find(cursor, ids, owner, change=True, deleted=deleted)
            for one in found:
                cursor.execute(f"UPDATE runs SET {assignment} WHERE run_id = ?", [value, one.run_id])
            return len(found)

        return self._write(work)

    @property
    def _database(self) -> Database:
        if self._opened is None:
            raise StorageError("The store is closed", "Expected an open store", "Open it again")
        return self._opened.database

    def _read(self, work: Callable[[Cursor], Result]) -> Result:
        return self._database.read(work)

    def _write(self, work: Callable[[Cursor], Result]) -> Result:
        if self.read_only:
            raise StorageError(
                "This store is open only for reading",
                "Expected a store open for writing",
                "Close the other Attention Lab and start this one again",
                reason="denied",
            )
        return self._database.write(work)
