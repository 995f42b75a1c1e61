"""Saved runs: a DuckDB file, its tables and its questions. Knows records and arrays, not models."""

from .compare import MOST_COMPARED
from .errors import StorageError
from .exporting import FORMATS
from .importing import load
from .paths import default_path
from .saving import new_run_id
from .store import Store

__all__ = ["FORMATS", "MOST_COMPARED", "Store", "StorageError", "default_path", "load", "new_run_id"]
