"""What storage says when something is wrong: what it was, what was expected, and what to do."""

from __future__ import annotations

import errno
import re

import duckdb

__all__ = ["StorageError", "explain", "is_fatal"]


class StorageError(Exception):
    """A failure a person can read. `str()` is up to three sentences.

    Args:
        what: what was wrong, as a sentence.
        expected: what would have been right, as a sentence, or None.
        fix: what to do about it, as a sentence, or None.
        reason: a word for programs: locked, corrupt, newer, full, denied, missing, invalid or error.
    """

    def __init__(
        self, what: str, expected: str | None = None, fix: str | None = None, *, reason: str = "error"
    ):
        self.what = _sentence(what)
        self.expected = _sentence(expected) if expected else None
        self.fix = _sentence(fix) if fix else None
        self.reason = reason
        super().__init__(" ".join(part for part in (self.what, self.expected, self.fix) if part))


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


_FULL = (
    "no space left on device",
    "file too large",
    "disk quota exceeded",
    "not enough space",
    "out of disk",
    "max_temp_directory_size",
)
_CORRUPT = (
    "corrupt",
    "checksum",
    "not a valid duckdb database",
    "could not read enough bytes",
    "replaying wal",
    "failed to deserialize",
    "serialization error",
    "serialized data",
)
_DENIED = ("permission denied", "read-only file system", "access is denied", "operation not permitted")
_ABSENT = ("no such file", "does not exist")
_LOCKED = ("could not set lock", "being used by another process", "conflicting lock")


def is_fatal(exc: BaseException) -> bool:
    """Whether DuckDB has shut the open database after this error, so that it must be opened again."""
    return isinstance(exc, (duckdb.FatalException, duckdb.InternalException)) or any(
        word in str(exc) for word in ("invalidated", "already closed")
    )


def explain(exc: BaseException, where: object = None) -> StorageError:
    """The StorageError for an exception of DuckDB or of the operating system.

    `where` is the file concerned. An exception nobody foresaw keeps its own first line, so nothing is hidden.
    """
    if isinstance(exc, StorageError):
        return exc
    text = str(exc)
    low = text.lower()
    place = f" {where}" if where else ""
    code = getattr(exc, "errno", None)

    def has(words: tuple[str, ...]) -> bool:
        return any(word in low for word in words)

    if has(_LOCKED):
        found = re.search(r"PID (\d+)", text)
        who = f"another process (PID {found.group(1)})" if found else "another process"
        return StorageError(
            f"The run database{place} is in use by {who}",
            "Expected to be its only user: while one process writes, DuckDB lets no other in, not even "
            "to read",
            "Close the other program, or keep these runs elsewhere: --db FILE, or LAB_DATA for another folder. Meanwhile "
            "the command line lists, shows, compares and exports the runs of a copy",
            reason="locked",
        )
    if has(_FULL) or code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"The disk has no room left for{place or ' this'}",
            "Expected free space to write to",
            "Free some space (or set LAB_DATA to another disk) and try again; all saved before is intact",
            reason="full",
        )
    if "version number" in low or "newer version of duckdb" in low:
        return StorageError(
            f"The run database{place} was written by another version of DuckDB",
            f"Expected one that DuckDB {duckdb.__version__} reads",
            "Upgrade duckdb to the version that wrote it, or set LAB_DATA to another folder",
            reason="newer",
        )
    if has(_CORRUPT):
        return StorageError(
            f"The run database{place} is damaged or is not a database",
            "Expected a DuckDB file written by Attention Lab",
            "Move it away (but keep it: it may be mended) and start again; a new one is made",
            reason="corrupt",
        )
    if has(_DENIED) or isinstance(exc, PermissionError):
        return StorageError(
            f"There is no permission to use{place or ' the file'}",
            "Expected a file and folder this user may write to",
            "Change its permissions, or set LAB_DATA to a folder of yours",
            reason="denied",
        )
    if "is a directory" in low or isinstance(exc, IsADirectoryError):
        return StorageError(
            f"{where} is a folder",
            "Expected the name of a file",
            "Give a file name inside it",
            reason="invalid",
        )
    if isinstance(exc, FileNotFoundError) or low.startswith("io error") and has(_ABSENT):
        return StorageError(
            f"There is no file{place}", "Expected an existing file", "Check the name", reason="missing"
        )
    if isinstance(exc, (NotADirectoryError, FileExistsError)):
        return StorageError(
            f"A part of the path{place} is a file",
            "Expected folders up to the last name",
            "Give another path",
            reason="invalid",
        )
    if isinstance(exc, (MemoryError, duckdb.OutOfMemoryException)):
        return StorageError(
            "There is not enough memory for this",
            "Expected a smaller run or file",
            "Close other programs, or take fewer runs at once",
        )
    first = text.strip().splitlines()[0] if text.strip() else type(exc).__name__
    return StorageError(
        f"The run database{place} could not do that: {first}",
        None,
        "Nothing was changed; if it happens again, report this sentence",
    )
