"""Where models are kept on this machine, and how a folder appears there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError

Progress = Callable[[float, str], None]

_WAIT_NOTICE_SECONDS = 0.5


@dataclass(frozen=True)
class Located:
    """A model folder that is ready to load, and how to name it in a record.

    Attributes:
        folder: holds config.json, safetensors and the tokenizer.
        id: the hub id or the name of the folder or file.
        source: what the user asked for.
        revision: commit, release or content mark; enough to tell two versions apart.
    """

    folder: Path
    id: str
    source: str
    revision: str

    @property
    def key(self) -> str:
        """A short file-name-safe mark of this model's exact weights."""
        return hashlib.sha256(f"{self.id}\n{self.revision}".encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """The lab's own cache: ``LAB_CACHE`` if set, else ``attention-lab`` in the user's cache directory."""
    chosen = os.environ.get("LAB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "attention-lab"


def nothing(fraction: float, text: str) -> None:
    """A progress listener that ignores what it is told."""


def part(progress: Progress, start: float, stop: float) -> Progress:
    """A listener for a sub-task that covers [start, stop] of ``progress``."""
    return lambda fraction, text: progress(round(start + (stop - start) * min(max(fraction, 0.0), 1.0), 6), text)


@contextmanager
def locked(name: str, progress: Progress = nothing) -> Iterator[None]:
    """Hold the lock ``name`` of the cache; a second process waits and says so.

    The lock is the operating system's, so a killed process leaves nothing to clean up.
    """
    from filelock import FileLock, Timeout

    folder = writable(cache_dir() / "locks")
    lock = FileLock(folder / f"{name}.lock")
    waited = False
    while True:
        try:
            lock.acquire(timeout=_WAIT_NOTICE_SECONDS)
            break
        except Timeout:
            if not waited:
                progress(0.0, "Another process is preparing this model; waiting for it")
            waited = True
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends well and vanishes when it does not.

    Call it while holding the target's lock: what a killed process left of an earlier attempt is swept first. The
    rename is atomic, so a reader sees the finished folder or none.
    """
    parent = writable(target.parent)
    for stale in parent.glob(f".{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = parent / f".{target.name}-{os.getpid()}"
    try:
        work.mkdir()
        yield work
        if target.exists():
            shutil.rmtree(target)  # an unusable older folder
        os.replace(work, target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` for what is needed only while building; gone when the block ends."""
    inner = folder / "scratch"
    inner.mkdir()
    try:
        yield inner
    finally:
        shutil.rmtree(inner, ignore_errors=True)


def writable(folder: Path) -> Path:
    """``folder``, created if missing.

    Raises:
        LabError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder


def disk_error(error: OSError, where: Path) -> LabError:
    """The user's sentence for a failed write below ``where``."""
    return LabError(
        f"The model cache {where} could not be written ({error.strerror or error})",
        "It needs a writable folder with about 1 GB free",
        "Free some space, or set LAB_CACHE to another folder",
    )
