"""What a visitor's text can reach: nothing but the tables. And what this room may import."""

import ast
import sys
from pathlib import Path

import pytest
import storage
from storage import Store, StorageError

FORBIDDEN = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "COPY runs TO 'stolen.csv'",
    "ATTACH 'other.duckdb'",
    "EXPORT DATABASE 'x'",
    "INSTALL httpfs",
    "LOAD '/tmp/x.duckdb_extension'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET lock_configuration = false",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_a_store_reaches_no_file_but_its_own(path, statement):
    for where in (path, ":memory:"):
        with Store.open(where) as store, pytest.raises(StorageError, match="disabled|locked|Cannot"):
            store._database.read(lambda cursor: cursor.execute(statement).fetchall())
    with Store.open(path, read_only=True) as store, pytest.raises(StorageError):
        store._database.read(lambda cursor: cursor.execute("DELETE FROM runs"))


def test_text_is_never_sql(store, make):
    evil = "'; DROP TABLE runs; --"
    store.save(make("a", name=evil, tags=[evil]), {evil: [1.0]}, owner=evil)
    assert store.list(search=evil, tags=[evil], status=evil, owner=evil) == []
    assert store.list(search=evil, tags=[evil], owner=evil)[0]["name"] == evil
    assert store.array("a", evil, owner=evil).tolist() == [1.0]
    for call in (
        store.get,
        store.delete,
        store.undelete,
        lambda i: store.array("a", i),
        lambda i: store.get("a", i),
    ):
        with pytest.raises(StorageError):
            call(evil + "x")
    store.rename("a", evil + "2")
    assert store.get("a")[0]["name"] == evil + "2"


def test_the_room_imports_duckdb_and_numpy_only():
    for file in Path(storage.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in ("duckdb", "numpy"), (
                    f"{file.name} imports {name}"
                )


def test_every_error_says_what_to_expect_or_to_do():
    error = StorageError("It broke", "Expected it whole", "Mend it", reason="x")
    assert str(error) == "It broke. Expected it whole. Mend it." and error.reason == "x"
    assert str(StorageError("Why?")) == "Why?"
