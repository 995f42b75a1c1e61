"""Where runs are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["FILE_NAME", "default_path"]

FILE_NAME = "runs.duckdb"
_SPACE_DISK = Path("/data")


def default_path() -> Path:
    """The run database's file: in LAB_DATA if set; on a Hugging Face Space in /data if that can be written;
    else in the user's data folder. Nothing is created."""
    chosen = os.environ.get("LAB_DATA", "").strip()
    if chosen:
        return Path(chosen).expanduser() / FILE_NAME
    if os.environ.get("SPACE_ID") and _SPACE_DISK.is_dir() and os.access(_SPACE_DISK, os.W_OK):
        return _SPACE_DISK / FILE_NAME
    return _user_data() / "attention-lab" / FILE_NAME


def _user_data() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    # The XDG rules say that a relative path here must be ignored.
    shared = Path(os.environ.get("XDG_DATA_HOME", ""))
    return shared if shared.is_absolute() else Path.home() / ".local" / "share"
