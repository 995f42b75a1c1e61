"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["appears_whole"]


@contextmanager
def appears_whole(path: Path, suffix: str) -> Iterator[Path]:
    """A path to write to; when the block ends well, what lies there becomes `path`, replacing a file of that name.

    A link stays a link, and a device or a pipe is written to: /dev/null is not to be replaced by a file. Raises OSError.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    stream = path.exists() and not path.is_file()
    goal = path if stream else Path(os.path.realpath(path))
    # Beside its goal, so that the last step is a rename on one disk; a plain name, so that DuckDB sees no pattern.
    part = Path(tempfile.gettempdir() if stream else goal.parent) / f".export-{uuid.uuid4().hex}{suffix}"
    try:
        yield part
        if stream:
            with part.open("rb") as made, goal.open("wb") as out:
                shutil.copyfileobj(made, out)
        else:
            part.replace(goal)
    finally:
        with suppress(OSError):  # the error that stopped the writing says more
            part.unlink(missing_ok=True)
