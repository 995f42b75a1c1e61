"""One open DuckDB file: shared by everyone in this process, a cursor per thread, one writer at a time."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, TypeVar

import duckdb

from .errors import StorageError, explain, is_fatal
from .migrations import migrate

__all__ = ["Cursor", "Database", "quoted", "side_connection"]

Result = TypeVar("Result")
Cursor = duckdb.DuckDBPyConnection

# No query can reach a file, the network or an extension, whatever text it was made of; the lock keeps it so.
_SAFE = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
    "threads": "2",
}


def side_connection(temporary: Path) -> Cursor:
    """A connection to an empty database in memory, the only kind that may touch other files."""
    return duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "threads": "2",
            "temp_directory": str(temporary),
        },
    )


class Database:
    """An open database. Use `acquire` and `release`: two stores of one path share one of these.

    `read(fn)` and `write(fn)` call `fn(cursor)` within a transaction; every failure is a StorageError. When
    DuckDB shuts the database after an error (a full disk during a checkpoint does that), it is opened again
    by itself. Sentences name the file `called`, which is the one that a person knows where `path` is a copy of it.
    """

    _shared: ClassVar[dict[str, Database]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, path: Path | None, read_only: bool = False, copy_of: Path | None = None, called: Path | None = None
    ) -> None:
        self.path, self.read_only, self.called = path, read_only, called or path
        self._writing = threading.Lock()
        self._gate = threading.Condition()
        self._busy, self._reopening, self._broken = 0, False, False
        self._threads = threading.local()
        self._generation = 0
        self._users = 0
        self._pid = os.getpid()
        self._connection: Cursor | None = self._connect() if path else _in_memory(copy_of, called)

    @classmethod
    def acquire(cls, path: Path, read_only: bool = False, called: Path | None = None) -> Database:
        """The process's database for this file, opened (and made, or migrated) if it is not open yet."""
        key = os.path.realpath(path)
        with cls._guard:
            found = cls._shared.get(key)
            if found is None:
                found = cls._shared[key] = cls(Path(key), read_only, called=called or path)
            elif found.read_only and not read_only:
                raise StorageError(
                    f"The run database {path} is open only for reading in this program",
                    "Expected it to be closed, or open for writing",
                    "Close the other store first",
                )
            found._users += 1
            return found

    @classmethod
    def memory(cls, copy_of: Path | None = None, called: Path | None = None) -> Database:
        """A database that lives as long as it is open, empty or with all that the file `copy_of` holds."""
        database = cls(None, copy_of=copy_of, called=called)
        database._users = 1
        return database

    def release(self) -> None:
        """Give it back; the last one closes the file, once all work in other threads has ended."""
        with self._guard:
            self._users -= 1
            # A forked child must not touch its parent's file.
            if self._users > 0 or os.getpid() != self._pid:
                return
            if self.path is not None:
                self._shared.pop(str(self.path), None)
            with self._gate:
                self._gate.wait_for(lambda: not self._busy and not self._reopening)
                connection, self._connection = self._connection, None
            try:
                connection.close()
            except duckdb.Error:
                pass  # Closing only tidies up: what was committed is in the file or its log.

    def read(self, work: Callable[[Cursor], Result]) -> Result:
        """`work` within one transaction, so that all its queries see one state of the tables."""
        return self._run(work, repeatable=True)

    def write(self, work: Callable[[Cursor], Result]) -> Result:
        """`work` within one transaction: all of it is kept, or nothing."""
        with self._writing:
            return self._run(work)

    def checkpoint(self) -> None:
        """Return the space of purged rows to the file. Does nothing while another transaction is open."""
        with self._writing:
            with self._using() as (generation, cursor):
                try:
                    cursor.execute("CHECKPOINT")
                    return
                except duckdb.TransactionException:
                    return
                except duckdb.Error as exc:
                    problem = exc
            if is_fatal(problem):
                self._reopen(generation)
            raise explain(problem, self.called) from problem

    def _run(self, work: Callable[[Cursor], Result], repeatable: bool = False) -> Result:
        for attempt in (1, 2):
            begun = False
            with self._using() as (generation, cursor):
                try:
                    cursor.execute("BEGIN")
                    begun = True
                    result = work(cursor)
                    cursor.execute("COMMIT")
                    return result
                except (duckdb.Error, OSError, MemoryError) as exc:
                    _rollback(cursor)
                    problem = exc
                except BaseException:
                    _rollback(cursor)
                    raise
            lost = is_fatal(problem) or generation != self._generation
            if lost:
                self._reopen(generation)
            # Another thread's error may have shut the database under this work: it deserves a second try.
            if attempt == 2 or not lost or (begun and not repeatable):
                raise explain(problem, self.called) from problem
        raise AssertionError("unreachable")

    @contextmanager
    def _using(self) -> Iterator[tuple[int, Cursor]]:
        """This thread's cursor, and the opening it belongs to. The database is not closed meanwhile."""
        if os.getpid() != self._pid:
            raise StorageError(
                "The run database was opened before this process was forked off",
                "Expected each process to open its own",
                "Save from the parent process",
            )
        if self._broken:
            self._reopen(self._generation)
        with self._gate:
            self._gate.wait_for(lambda: not self._reopening)
            if self._connection is None:
                raise StorageError("The run database is closed", "Expected an open store", "Open it again")
            self._busy += 1
        try:
            kept = getattr(self._threads, "kept", None)
            if kept is None or kept[0] != self._generation:
                kept = self._threads.kept = (self._generation, self._connection.cursor())
            yield kept
        finally:
            with self._gate:
                self._busy -= 1
                self._gate.notify_all()

    def _reopen(self, generation: int) -> None:
        """Open the file again, unless another thread has done so since `generation`."""
        with self._gate:
            self._gate.wait_for(lambda: not self._reopening)
            if self._generation != generation or self.path is None or self._connection is None:
                return
            self._reopening = self._broken = True
            self._gate.wait_for(lambda: not self._busy)  # DuckDB refuses to close what is in use.
        try:
            self._connection.close()  # A second time too, if the last attempt found no way to open it again.
            self._connection = self._connect()
            self._generation += 1
            self._broken = False
        finally:
            with self._gate:
                self._reopening = False
                self._gate.notify_all()

    def _connect(self) -> Cursor:
        assert self.path is not None
        try:
            if not self.read_only:
                _make(self.path)
            connection = duckdb.connect(str(self.path), read_only=self.read_only, config=_SAFE)
            try:
                migrate(connection, self.called, read_only=self.read_only)
            except BaseException:
                connection.close()
                raise
            return connection
        except (duckdb.Error, OSError, MemoryError) as exc:
            raise explain(exc, self.called) from exc


def _rollback(cursor: Cursor) -> None:
    try:
        cursor.execute("ROLLBACK")
    except duckdb.Error:
        pass  # A failed COMMIT, or a shut database, has already ended the transaction.


def _in_memory(copy_of: Path | None, called: Path | None) -> Cursor:
    connection = duckdb.connect(":memory:", config={"threads": "2"})
    try:
        if copy_of is not None:
            connection.execute(f"ATTACH {quoted(copy_of)} AS original")
            connection.execute("COPY FROM DATABASE original TO memory")
            connection.execute("DETACH original")
        for name, value in _SAFE.items():
            if name != "lock_configuration":
                connection.execute(f"SET {name} = {value}")
        migrate(connection, called or "in memory")
        connection.execute("SET lock_configuration = true")
        return connection
    except BaseException as exc:
        connection.close()
        if isinstance(exc, (duckdb.Error, OSError, MemoryError)):
            raise explain(exc, called) from exc
        raise


def quoted(path: Path) -> str:
    """A path as SQL text, for the statements that take no parameter there."""
    return "'" + str(path).replace("'", "''") + "'"


def _make(path: Path) -> None:
    """Make the database file if there is none. It appears whole: a kill here leaves no half-made file."""
    try:
        if path.stat().st_size:
            return
        path.unlink()  # Of size 0: nobody's data, and DuckDB refuses to open it.
    except FileNotFoundError:
        pass
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = path.with_name(path.name + ".wal")
    if log.exists():  # Left by a database file that was moved away; it belongs to that one.
        log.replace(log.with_name(log.name + ".orphan"))
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with duckdb.connect(str(new)) as connection:
            migrate(connection, path)
        new.chmod(0o600)
        try:
            os.link(new, path)
        except FileExistsError:
            pass  # Another process was first.
        except OSError:
            new.replace(path)  # A disk without links.
    finally:
        new.unlink(missing_ok=True)
        new.with_name(new.name + ".wal").unlink(missing_ok=True)
