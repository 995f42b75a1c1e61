"""Questions about many runs: who may see one, the table of runs, and the table of runs."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from .connection import Cursor
from .errors import StorageError

__all__ = ["ORDERS", "Found", "find", "listing", "owner_key", "peek"]

ORDERS = {
    "created": "created",
    "name": "lower(name)",
    "model": "lower(model_id)",
    "status": "status",
    "saved": "saved_at",
    "kl": "kl_worst",
    "kv": "kv_smallest",
}

_LISTING = """
    SELECT run_id, name, tags, created, status, model_id AS model, device, prompt_text AS prompt,
           shared, owner IS NOT NULL AS visitor, whole, saved_at,
           v.specs, v.titles, v.kl_worst, v.kv_smallest, v.tokens
    FROM runs LEFT JOIN (
        SELECT run_id, list(spec ORDER BY place) AS specs, list(title ORDER BY place) AS titles,
               max(kl_mean) AS kl_worst, min(kv_bytes / nullif(kv_bytes_dense, 0)) AS kv_smallest,
               sum(len(token_ids))::BIGINT AS tokens
        FROM variants GROUP BY run_id) AS v USING (run_id)"""


def owner_key(token: str | None) -> str | None:
    """What is stored of a visitor's token: enough to recognise it, not enough to pretend to have it."""
    return (
        None if token is None else hashlib.sha256(f"attention-lab visitor {token}".encode()).hexdigest()[:32]
    )


class Found(NamedTuple):
    """What storage knows of a run beside its record."""

    run_id: str
    owner: str | None
    whole: bool
    deleted_at: datetime | None
    shared: bool


def peek(cursor: Cursor, run_id: str) -> Found | None:
    """The run of that id, whoever owns it and deleted or not; None if there is none."""
    row = cursor.execute(
        "SELECT run_id, owner, whole, deleted_at, shared FROM runs WHERE run_id = ?", [run_id]
    ).fetchone()
    return Found(*row) if row else None


def find(
    cursor: Cursor, run_id: str, owner: str | None, *, change: bool = False, deleted: bool = False
) -> Found:
    """The run of that id, if whoever asks may see it (or `change` it).

    Raises StorageError if not, in the same words as for a run that does not exist; and, unless `deleted`, for
    a deleted one.
    """
    found = peek(cursor, run_id) if isinstance(run_id, str) else None
    if found is None or not (owner is None or found.owner == owner or (found.shared and not change)):
        near = difflib.get_close_matches(str(run_id), _ids(cursor, owner), n=3, cutoff=0.7)
        raise StorageError(
            f"There is no run {run_id!r}",
            "Expected the id of a saved run",
            f"Did you mean {' or '.join(near)}?" if near else "The list of runs shows their ids",
            reason="missing",
        )
    if found.deleted_at is not None and not deleted:
        raise StorageError(
            f"The run {run_id} was deleted",
            "Expected a run that is still there",
            "Undo the deletion first",
            reason="missing",
        )
    return found


def _ids(cursor: Cursor, owner: str | None) -> list[str]:
    return [
        run_id
        for (run_id,) in cursor.execute(
            "SELECT run_id FROM runs WHERE deleted_at IS NULL AND (? IS NULL OR owner = ?) "
            "ORDER BY created DESC LIMIT 1000",
            [owner, owner],
        ).fetchall()
    ]


def listing(
    cursor: Cursor,
    *,
    search: str | None = None,
    tags: Sequence[str] | None = None,
    status: str | None = None,
    limit: int | None = 100,
    offset: int = 0,
    order: str = "-created",
    owner: str | None = None,
    deleted: bool = False,
) -> list[dict[str, Any]]:
    """Rows for a table of runs; see `Store.list`."""
    column = ORDERS.get(order.removeprefix("-"))
    if column is None:
        raise StorageError(
            f"Runs cannot be ordered by {order!r}",
            f"Expected one of {', '.join(ORDERS)}, or one of them after a minus sign",
            reason="invalid",
        )
    for window in (0 if limit is None else limit, offset):
        if type(window) is not int or window < 0:
            raise StorageError(
                f"{window!r} is no number of runs",
                "Expected whole numbers from 0 for limit and offset",
                reason="invalid",
            )
    where, values = ["deleted_at IS NOT NULL" if deleted else "deleted_at IS NULL"], []
    if owner is not None:
        where.append("owner = ?")
        values.append(owner)
    if status is not None:
        where.append("status = ?")
        values.append(status)
    for tag in tags or ():
        where.append("list_contains(tags, ?)")
        values.append(tag)
    for word in (search or "").split():
        where.append(
            "contains(lower(concat_ws(' ', run_id, name, model_id, prompt_text, array_to_string(tags, ' '), "
            "array_to_string(specs, ' '))), lower(?))"
        )
        values.append(word)
    direction = "DESC" if order.startswith("-") else "ASC"
    window = "" if limit is None else f"LIMIT {limit}"
    cursor.execute(
        f"{_LISTING} WHERE {' AND '.join(where)} ORDER BY {column} {direction} NULLS LAST, run_id "
        f"{direction} {window} OFFSET {offset}",
        values,
    )
    names = [description[0] for description in cursor.description]
    return [dict(zip(names, row)) for row in cursor.fetchall()]
