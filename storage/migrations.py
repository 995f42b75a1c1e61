"""The tables, and how a file of an older version becomes one of this version.

A migration is never edited once a file may exist that has it: a change is a new one at the end. There are no
keys and no indexes: one writer per process checks what they would, and DuckDB's eager index checks refuse the
replacing of a row within one transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import duckdb

from .errors import StorageError
from .shred import with_added

__all__ = ["MIGRATIONS", "Migration", "migrate", "version"]


class Migration(NamedTuple):
    """One step, from version `number - 1` to `number`. `added`: the record's keys that get columns by it."""

    number: int
    title: str
    statements: tuple[str, ...]
    added: dict[str, tuple[tuple[str, ...], ...]] = {}


_FIRST = (
    """CREATE TABLE runs (
        run_id VARCHAR NOT NULL, owner VARCHAR, whole BOOLEAN NOT NULL, saved_at TIMESTAMP NOT NULL,
        record_schema BIGINT, name VARCHAR, tags VARCHAR[], created VARCHAR, status VARCHAR, device VARCHAR,
        model_id VARCHAR, model_source VARCHAR, model_revision VARCHAR, model_architecture VARCHAR,
        model_parameters BIGINT, model_layers BIGINT, model_heads BIGINT, model_kv_heads BIGINT,
        model_head_dim BIGINT, model_context BIGINT, model_vocab BIGINT, model_dtype VARCHAR,
        model_weights VARCHAR, model_device VARCHAR, model_sliding_window BIGINT, model_layer_types VARCHAR[],
        model_kv_bytes_per_token BIGINT, model_weights_kl DOUBLE,
        environment JSON,
        settings_max_new_tokens BIGINT, settings_temperature DOUBLE, settings_top_k BIGINT,
        settings_top_p DOUBLE,
        settings_seed BIGINT, settings_timing VARCHAR, settings_samples BIGINT,
        prompt_text VARCHAR, prompt_token_ids BIGINT[], prompt_tokens VARCHAR[],
        rest JSON)""",
    """CREATE TABLE variants (
        run_id VARCHAR NOT NULL, place INTEGER NOT NULL,
        letter VARCHAR, spec VARCHAR, title VARCHAR, techniques JSON, text VARCHAR, token_ids BIGINT[],
        finish VARCHAR, error VARCHAR, ttft_ms DOUBLE, tpot_ms DOUBLE,
        kv_bytes BIGINT, kv_bytes_dense BIGINT, slack_bytes BIGINT,
        kept_fraction DOUBLE, read_fraction DOUBLE,
        simulated BOOLEAN, kl_mean DOUBLE, top1_agreement DOUBLE, perplexity DOUBLE, first_divergence BIGINT,
        rest JSON)""",
    """CREATE TABLE tokens (
        run_id VARCHAR NOT NULL, variant INTEGER NOT NULL, place INTEGER NOT NULL,
        token_id BIGINT, text VARCHAR, logprob DOUBLE, entropy DOUBLE, step_ms DOUBLE,
        kv_bytes BIGINT, kept DOUBLE,
        alternatives STRUCT(id BIGINT, text VARCHAR, prob DOUBLE)[],
        rest JSON)""",
    """CREATE TABLE fidelity (
        run_id VARCHAR NOT NULL, variant INTEGER NOT NULL, place INTEGER NOT NULL,
        kl DOUBLE, agree BOOLEAN, ref_prob DOUBLE, var_prob DOUBLE,
        top STRUCT(id BIGINT, text VARCHAR, prob DOUBLE)[],
        rest JSON)""",
    """CREATE TABLE layers (
        run_id VARCHAR NOT NULL, variant INTEGER NOT NULL, place INTEGER NOT NULL,
        layer BIGINT, kv_bytes BIGINT, bits MAP(VARCHAR, BIGINT),
        rest JSON)""",
    """CREATE TABLE maps (
        run_id VARCHAR NOT NULL, name VARCHAR NOT NULL, dtype VARCHAR NOT NULL, shape BIGINT[] NOT NULL,
        codec VARCHAR NOT NULL, data BLOB NOT NULL)""",
)

_OURS = ("runs", "variants", "tokens", "fidelity", "layers", "maps")

MIGRATIONS: tuple[Migration, ...] = (
    Migration(1, "runs, variants, tokens, fidelity, layers, maps", _FIRST),
    Migration(
        2,
        "deleting with undo, and sharing by address",
        (
            "ALTER TABLE runs ADD COLUMN deleted_at TIMESTAMP",
            "ALTER TABLE runs ADD COLUMN shared BOOLEAN DEFAULT false",
        ),
    ),
    Migration(
        3,
        "chat and fidelity settings, several samples, what a variant saves",
        (
            "ALTER TABLE runs ADD COLUMN settings_chat BOOLEAN",
            "ALTER TABLE runs ADD COLUMN settings_fidelity BOOLEAN",
            "ALTER TABLE variants ADD COLUMN samples VARCHAR[]",
            "ALTER TABLE variants ADD COLUMN saves VARCHAR[]",
        ),
        {
            "runs": (("settings", "chat"), ("settings", "fidelity")),
            "variants": (("samples",), ("saves",)),
        },
    ),
)


def version(con: duckdb.DuckDBPyConnection) -> int | None:
    """The file's version; 0 for a database without tables; None for one that is not Attention Lab's."""
    tables = {
        name
        for (name,) in con.execute(
            "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database()"
        ).fetchall()
    }
    if "schema_version" not in tables:
        return None if tables else 0
    ((found,),) = con.execute("SELECT max(version) FROM schema_version").fetchall()
    return found or 0


def migrate(
    con: duckdb.DuckDBPyConnection,
    where: object = "",
    migrations: Sequence[Migration] = MIGRATIONS,
    read_only: bool = False,
) -> None:
    """Bring the open database to the newest version, a transaction each step. A failed step changes nothing.

    Raises StorageError for a file of a newer version, of another program, or (read only) of an older version.
    """
    have, newest = version(con), migrations[-1].number
    if have is None:
        raise StorageError(
            f"{where} is a DuckDB database, but not one of Attention Lab",
            "Expected a file that Attention Lab made",
            "Give another file name; this one is left as it is",
            reason="invalid",
        )
    if have > newest:
        raise StorageError(
            f"The run database {where} was written by a newer Attention Lab (its version is {have})",
            f"Expected version {newest} or older",
            "Upgrade Attention Lab, or set LAB_DATA to another folder; the file is left as it is",
            reason="newer",
        )
    if read_only and have < newest:
        raise StorageError(
            f"The run database {where} has the older version {have}",
            f"Expected version {newest}",
            "Open it once for writing, which brings it up to date",
            reason="older",
        )
    for step in migrations:
        if step.number > have:
            _apply(con, step)
    # DuckDB loads tables when they are first used; damage shall show now, not in the middle of somebody's
    # work.
    for table in _OURS if have else ():
        con.execute(f"SELECT count(DISTINCT run_id) FROM {table}").fetchall()


def _apply(con: duckdb.DuckDBPyConnection, step: Migration) -> None:
    con.execute("BEGIN")
    try:
        con.execute(
            "CREATE TABLE IF NOT EXISTS schema_version "
            "(version INTEGER NOT NULL, title VARCHAR NOT NULL, applied TIMESTAMP NOT NULL)"
        )
        for statement in step.statements:
            con.execute(statement)
        for table, paths in step.added.items():
            _mark_added(con, table, paths)
        con.execute(
            "INSERT INTO schema_version VALUES (?, ?, ?)",
            [step.number, step.title, datetime.now(UTC).replace(tzinfo=None)],
        )
        con.execute("COMMIT")
    except BaseException:
        try:
            con.execute("ROLLBACK")
        except duckdb.Error:
            pass  # A failed COMMIT has already ended the transaction.
        raise


def _mark_added(con: duckdb.DuckDBPyConnection, table: str, paths: tuple[tuple[str, ...], ...]) -> None:
    """Let rows written before a key had a column say in `rest` whether they have it: `get` stays exact."""
    for rowid, rest in con.execute(f"SELECT rowid, rest FROM {table}").fetchall():
        con.execute(
            f"UPDATE {table} SET rest = CAST(? AS JSON) WHERE rowid = ?", [with_added(rest, paths), rowid]
        )
