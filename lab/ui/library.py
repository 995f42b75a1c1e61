"""Saved runs as the Runs tab needs them: storage.Store behind a few verbs, each one call."""
from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import storage

KINDS = {"json": "application/json", "csv": "text/csv", "parquet": "application/vnd.apache.parquet"}


class StoreLibrary:
    """The run database. `owner` "" means that everything may be seen (one's own machine)."""

    def __init__(self, store: storage.Store) -> None:
        self.store = store

    @classmethod
    def open(cls, path: str | Path | None = None) -> StoreLibrary:
        """The store at a path (None: the default place); a file that cannot be used gives one in memory that says why."""
        return cls(storage.Store.open(path, fallback=True))

    @classmethod
    def memory(cls) -> StoreLibrary:
        """Runs that are kept until the process ends."""
        return cls(storage.Store.open(":memory:"))

    @property
    def note(self) -> str:
        """Why runs may not be kept, or nothing."""
        return str(self.store.notice or "")

    def begin(self, record: dict[str, Any], owner: str = "") -> None:
        """Note that a run starts, so that a crash leaves it marked interrupted."""
        self.store.begin(record, owner or None)

    def checkpoint(self, record: dict[str, Any], owner: str = "") -> None:
        """Keep what a run that goes on has so far."""
        self.store.checkpoint(record, owner or None)

    def save(self, record: dict[str, Any], arrays: dict[str, Any], owner: str = "") -> None:
        """Save a run whole."""
        self.store.save(record, arrays, owner or None)

    def attach(self, run_id: str, prefix: str, arrays: dict[str, Any], owner: str = "") -> None:
        """Keep what was computed from a saved run with it."""
        self.store.attach(run_id, prefix, arrays, owner or None)

    def load(self, run_id: str, owner: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
        """Record and arrays. Raises StorageError when it is not there or not this visitor's."""
        record, names = self.store.get(run_id, owner or None)
        return record, {name: self.store.array(run_id, name, owner or None) for name in names}

    def status(self, run_id: str, owner: str = "") -> str:
        """How a run ended. Raises StorageError when it is not there or not this visitor's."""
        return str(self.store.get(run_id, owner or None)[0]["status"])

    def rows(self, owner: str = "") -> list[dict[str, Any]]:
        """The runs table, newest first."""
        return [{"run_id": row["run_id"], "name": row["name"] or "", "tags": list(row["tags"] or []),
                 "created": str(row["created"]), "status": row["status"], "model": str(row["model"] or "").split("/")[-1],
                 "prompt": " ".join(str(row["prompt"] or "").split())[:160], "titles": list(row["titles"] or []),
                 "specs": list(row["specs"] or []), "kl": row["kl_worst"], "kv": row["kv_smallest"], "tokens": row["tokens"],
                 "shared": bool(row["shared"])}
                for row in self.store.list(limit=500, owner=owner or None)]

    def rename(self, run_id: str, name: str, owner: str = "") -> None:
        """Give a run a name."""
        self.store.rename(run_id, name, owner or None)

    def tag(self, run_id: str, tags: list[str], owner: str = "") -> None:
        """Replace a run's tags."""
        self.store.tag(run_id, tags, owner or None)

    def share(self, run_id: str, shared: bool, owner: str = "") -> None:
        """Let anyone who knows the run's id read it, or no longer."""
        self.store.share(run_id, shared, owner or None)

    def delete(self, run_id: str, owner: str = "") -> None:
        """Delete a run so that `restore` can bring it back."""
        self.store.delete(run_id, owner or None)

    def restore(self, run_id: str, owner: str = "") -> None:
        """Undo a deletion."""
        self.store.undelete(run_id, owner or None)

    def compare(self, ids: list[str], only_differences: bool, owner: str = "") -> dict[str, Any]:
        """Up to ten runs field by field."""
        return self.store.compare(ids, only_differences, owner or None)

    def export(self, run_id: str, form: str, owner: str = "") -> tuple[str, str, bytes]:
        """(file name, media type, bytes) of one run."""
        with tempfile.TemporaryDirectory(prefix="lab-export-") as folder:
            path = self.store.export([run_id], Path(folder) / f"{run_id}.{form}", form, owner or None)
            return path.name, KINDS.get(form, "application/octet-stream"), path.read_bytes()

    def take(self, name: str, data: bytes, owner: str = "") -> dict[str, Any]:
        """Import an exported file's bytes: {run_id: the first run's, added: runs that are new, there: runs that were not}."""
        had = {row["run_id"] for row in self.store.list(limit=None, owner=owner or None)}
        with tempfile.TemporaryDirectory(prefix="lab-import-") as folder:
            path = Path(folder) / re.sub(r"[^\w.-]", "_", name)[-80:].lstrip(".") or "file"
            path.write_bytes(data)
            ids = self.store.import_(path, owner or None)
        there = sum(run_id in had for run_id in ids)
        return {"run_id": ids[0], "added": len(ids) - there, "there": there}
