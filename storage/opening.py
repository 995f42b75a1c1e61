"""Ways to come by an open database: the file itself, a copy of it, or one in memory that stands in for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .connection import Database
from .errors import StorageError
from .paths import default_path
from .snapshot import Snapshot

__all__ = ["Opened", "open_file", "open_snapshot"]

_MOST_IN_MEMORY = 256 << 20


@dataclass
class Opened:
    """An open database, and what its user should know about it. Close it with `close`."""

    database: Database
    path: Path | None
    read_only: bool = False
    notice: str | None = None
    snapshot: Snapshot | None = None

    def close(self) -> None:
        """Give the database back and remove the copy, if it is one."""
        self.database.release()
        if self.snapshot is not None:
            self.snapshot.close()


def open_file(path: str | Path | None, read_only: bool, fallback: bool) -> Opened:
    """See `Store.open`."""
    if str(path) == ":memory:":
        return Opened(Database.memory(), None, read_only)
    path = _path(path)
    try:
        return Opened(Database.acquire(path, read_only), path, read_only)
    except StorageError as exc:
        if not fallback:
            raise
        return _stand_in(path, exc)


def open_snapshot(path: str | Path | None) -> Opened:
    """See `Store.open_snapshot`."""
    path = _path(path)
    snapshot = Snapshot(path)
    try:
        # Opened for writing, to replay its log and bring it up to date: it is nobody else's.
        database = Database.acquire(snapshot.path, called=path)
    except BaseException:
        snapshot.close()
        raise
    notice = f"These are the runs of {path} as they were at {_clock()}; nothing can be saved here."
    return Opened(database, path, read_only=True, notice=notice, snapshot=snapshot)


def _path(path: str | Path | None) -> Path:
    return default_path() if path is None else Path(path).expanduser()


def _clock() -> str:
    return f"{datetime.now():%H:%M:%S}"


def _stand_in(path: Path, problem: StorageError) -> Opened:
    notice = (
        f"{problem} Until then runs are kept in memory only: export those you want to keep before you "
        "close the lab."
    )
    if problem.reason == "locked":
        try:
            if path.stat().st_size <= _MOST_IN_MEMORY:
                database = _copy_in_memory(path)
                notice += f" The runs saved before are shown as they were at {_clock()}."
                return Opened(database, None, notice=notice)
        except (StorageError, OSError):
            pass  # The first problem is the one to report, and an empty store still works.
    return Opened(Database.memory(), None, notice=notice)


def _copy_in_memory(path: Path) -> Database:
    snapshot = Snapshot(path)
    try:
        return Database.memory(copy_of=snapshot.path, called=path)
    finally:
        snapshot.close()
