"""A look at a database that another process holds: a copy of its files, taken while they stand still."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from .errors import StorageError, explain

__all__ = ["Snapshot"]

_TRIES = 8
_PAUSE_S = 0.15


class Snapshot:
    """A private copy of the database file `path` (and its log) in a temporary folder, removed by `close`.

    DuckDB locks a file by advice only, so reading it is possible; the copy is good if no file changed
    meanwhile. Raises StorageError if there is no such file, or if it kept changing.
    """

    def __init__(self, path: Path) -> None:
        self.source = path
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="attention-lab-", ignore_cleanup_errors=True)
            self.path = Path(self._folder.name) / "copy.duckdb"
            for _ in range(_TRIES):
                if self._copy():
                    return
                time.sleep(_PAUSE_S)
        except OSError as exc:
            self.close()
            raise explain(exc, path) from exc
        self.close()
        raise StorageError(
            f"The run database {path} changed while it was being copied, {_TRIES} times",
            "Expected a quiet moment",
            "Try again when the other process is not saving a run",
            reason="locked",
        )

    def close(self) -> None:
        """Remove the copy."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _copy(self) -> bool:
        before = _state(self.source)
        for name in before:
            shutil.copyfile(
                self.source.with_name(name),
                self.path.with_name(self.path.name + name[len(self.source.name) :]),
            )
        if _state(self.source) == before:
            return True
        for leftover in self.path.parent.iterdir():
            leftover.unlink()
        return False


def _state(path: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the database file and of its logs (`.wal`, `.wal.checkpoint`, `.wal.recovery`)."""
    files = [path, *sorted(p for p in path.parent.iterdir() if p.name.startswith(path.name + ".wal"))]
    found = {}
    for file in files:
        if file.name.endswith(".orphan"):
            continue
        try:
            info = file.stat()
        except FileNotFoundError:
            if file == path:
                raise
            continue
        found[file.name] = (info.st_size, info.st_mtime_ns)
    return found
