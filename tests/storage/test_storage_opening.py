"""Where the file is, how it is made, and every way in which it may be unusable."""

import os
import shutil
import stat
import sys

import duckdb
import numpy as np
import pytest
from storage import Store, StorageError, default_path, layout, migrations, rows
from storage.codec import same
from storage.migrations import MIGRATIONS, Migration, migrate

HOLD = """
import sys, time
from storage import Store
sys.path.insert(0, "tests/storage")
from conftest import sample_record
store = Store.open(sys.argv[1])
store.save(sample_record("held"))
print("ready", flush=True)
time.sleep(10_000)  # until it is killed
"""


def old_file(path, versions=1):
    """A file of an older version, with one run in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(path)) as db:
        migrate(db, path, MIGRATIONS[:versions])
        db.execute(
            "INSERT INTO runs (run_id, whole, saved_at, record_schema, name, tags, created, status, "
            "prompt_text) VALUES ('old-1', true, now()::TIMESTAMP, 1, 'old', ['a'], "
            "'2026-01-01T00:00:00Z', 'complete', 'hi')"
        )


# Where


def test_lab_data_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "x"))
    monkeypatch.setenv("SPACE_ID", "a/b")
    assert default_path() == tmp_path / "x" / "runs.duckdb"
    assert not (tmp_path / "x").exists()


def test_a_space_uses_its_disk_only_if_writable(monkeypatch, tmp_path):
    monkeypatch.delenv("LAB_DATA", raising=False)
    monkeypatch.setenv("SPACE_ID", "a/b")
    monkeypatch.setattr("storage.paths._SPACE_DISK", tmp_path)
    assert default_path() == tmp_path / "runs.duckdb"
    monkeypatch.setattr("storage.paths._SPACE_DISK", tmp_path / "absent")
    assert default_path() != tmp_path / "runs.duckdb"


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_DATA_HOME", "/xdg", "/xdg/attention-lab/runs.duckdb"),
        ("linux", "XDG_DATA_HOME", "relative", "~/.local/share/attention-lab/runs.duckdb"),
        ("darwin", "XDG_DATA_HOME", "/xdg", "~/Library/Application Support/attention-lab/runs.duckdb"),
        ("win32", "LOCALAPPDATA", "/local", "/local/attention-lab/runs.duckdb"),
    ],
)
def test_each_platform_has_its_folder(monkeypatch, platform, variable, value, expected):
    for name in ("LAB_DATA", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, value)
    assert str(default_path()) == os.path.expanduser(expected)


def test_open_without_a_path_uses_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    with Store.open() as store:
        assert store.path == tmp_path / "runs.duckdb" and store.notice is None


# Made


def test_a_new_file_is_private_and_nothing_lies_beside_it(path):
    Store.open(path).close()
    assert [p.name for p in path.parent.iterdir()] == ["runs.duckdb"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_file_becomes_a_database(path, make):
    path.parent.mkdir()
    path.touch()
    with Store.open(path) as store:
        store.save(make())


def test_a_log_left_by_a_database_that_was_moved_away_does_no_harm(path, make, tmp_path):
    log = path.with_name("runs.duckdb.wal")
    with Store.open(path) as store:
        store.save(make("lost"))
        shutil.copy(log, tmp_path / "kept.wal")
    path.unlink()
    shutil.copy(tmp_path / "kept.wal", log)
    with Store.open(path) as store:
        assert store.list() == []
        store.save(make())
    with Store.open(path) as store:
        assert len(store.list()) == 1


def test_two_stores_of_one_file_share_it(path, make):
    with Store.open(path) as one, Store.open(str(path)) as two:
        one.save(make("a"))
        assert two.list()[0]["run_id"] == "a"
        one.close()
        two.save(make("b"))
    with Store.open(path, read_only=True) as third:
        assert len(third.list()) == 2
        with pytest.raises(StorageError, match="only for reading"):
            third.save(make("c"))
        with pytest.raises(StorageError, match="Close the other store first"):
            Store.open(path)
    with Store.open(path) as writer, Store.open(path, read_only=True) as reader:
        writer.save(make("c"))
        assert len(reader.list()) == 3
        with pytest.raises(StorageError, match="only for reading"):
            reader.delete("c")


def test_a_closed_store_says_so(path):
    store = Store.open(path)
    store.close()
    store.close()
    with pytest.raises(StorageError, match="store is closed"):
        store.list()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_to_open_its_own(path, python):
    done = python(
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from storage import Store, StorageError\n"
        "store = Store.open(sys.argv[1]); store.list()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try: store.list()\n"
        "    except StorageError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0); print(store.list())\n",
        path,
    )
    assert "before this process was forked off" in done.stdout and done.stdout.endswith("[]\n"), done


# Older


def test_an_older_file_is_brought_up_to_date_and_keeps_its_runs(path):
    old_file(path)
    with Store.open(path) as store:
        assert store.get("old-1")[0]["prompt"]["text"] == "hi"
        assert store.delete("old-1") == 1 and store.undelete("old-1") == 1
    with duckdb.connect(str(path)) as db:
        assert migrations.version(db) == MIGRATIONS[-1].number
        assert db.execute("SELECT version FROM schema_version ORDER BY version").fetchall() == [
            (1,),
            (2,),
            (3,),
        ]


def without_columns(monkeypatch, version):
    """The tables' layout as it was at that version."""
    for step in MIGRATIONS[version:]:
        for name, paths in step.added.items():
            table = {"runs": layout.RUNS, "variants": layout.VARIANTS}[name]
            kept = tuple(field for field in table.fields if field.path not in paths)
            assert len(kept) == len(table.fields) - len(paths)
            monkeypatch.setitem(table.__dict__, "fields", kept)


def test_runs_of_an_older_file_come_back_exactly(path, make, monkeypatch):
    """Also where a key has become a column since: there, absent, of another type, or gone with its dict."""
    records = [make("all"), make("none"), make("odd"), make("no settings", settings=None), make("gone")]
    for part, keys in (("settings", ("chat", "fidelity")), ("variants", ("samples", "saves"))):
        for place in records[1]["variants"] if part == "variants" else [records[1][part]]:
            for key in keys:
                del place[key]
    records[2]["settings"].update(chat="yes", fidelity=None)
    records[2]["variants"][0].update(samples={"a": 1}, saves=None)
    del records[4]["settings"]
    path.parent.mkdir()
    with monkeypatch.context() as patch, duckdb.connect(str(path)) as db:
        without_columns(patch, 2)
        migrate(db, path, MIGRATIONS[:2])
        for record in records:
            rows.insert(db, record, None, whole=True)
    with Store.open(path) as store:
        for record in records:
            assert same(store.get(record["run_id"])[0], record)


def test_an_older_file_is_not_changed_when_only_reading(path):
    old_file(path)
    with pytest.raises(StorageError, match="Open it once for writing"):
        Store.open(path, read_only=True)
    with duckdb.connect(str(path)) as db:
        assert migrations.version(db) == 1


def test_a_migration_that_fails_leaves_the_old_version(path, monkeypatch):
    old_file(path, len(MIGRATIONS))
    bad = Migration(
        len(MIGRATIONS) + 1, "bad", ("ALTER TABLE runs ADD COLUMN extra INTEGER", "SELECT * FROM nowhere")
    )
    with duckdb.connect(str(path)) as db:
        with pytest.raises(duckdb.Error):
            migrate(db, path, (*MIGRATIONS, bad))
        assert migrations.version(db) == len(MIGRATIONS)
    with Store.open(path) as store:
        assert len(store.list()) == 1


# Unusable


def newer(path):
    old_file(path, len(MIGRATIONS))
    with duckdb.connect(str(path)) as db:
        db.execute("INSERT INTO schema_version VALUES (99, 'from the future', now()::TIMESTAMP)")


def foreign(path):
    path.parent.mkdir(parents=True)
    with duckdb.connect(str(path)) as db:
        db.execute("CREATE TABLE bank (money INTEGER)")


def junk(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"This is no database. " * 1000)


def truncated(path):
    old_file(path, len(MIGRATIONS))
    with duckdb.connect(str(path)) as db:
        db.execute(
            "INSERT INTO tokens (run_id, variant, place, text) "
            "SELECT 'r' || i, 0, 0, 'x' || i FROM range(99999) t(i)"
        )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path):
    old_file(path, len(MIGRATIONS))
    content = bytearray(path.read_bytes())
    content[4096:12288] = bytes(range(256)) * 32
    path.write_bytes(content)


UNUSABLE = [
    (newer, "newer", "written by a newer Attention Lab"),
    (foreign, "invalid", "not one of Attention Lab"),
    (junk, "corrupt", "damaged or is not a database"),
    (truncated, "corrupt", "damaged or is not a database"),
    (overwritten, "corrupt", "damaged or is not a database"),
]


@pytest.mark.parametrize(("damage", "reason", "words"), UNUSABLE)
def test_an_unusable_file_is_explained_and_left_alone(path, damage, reason, words, make):
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=words) as info:
        Store.open(path)
    error = info.value
    assert error.reason == reason and str(path) in error.what and error.expected and error.fix
    with Store.open(path, fallback=True) as store:
        assert words in store.notice and "in memory only" in store.notice and store.path is None
        store.save(make())
        assert len(store.list()) == 1
    assert path.read_bytes() == before


def test_damage_found_only_while_reading_is_explained(path, make):
    noise = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8)
    with Store.open(path) as store:
        store.save(make("good"))
        store.save(make("bad"), {"noise": noise})
    content = path.read_bytes()
    at = content.index(noise[500_000:500_064].tobytes())
    path.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with Store.open(path) as store:
        with pytest.raises(StorageError) as info:
            store.array("bad", "noise")
        assert info.value.reason == "corrupt"
        assert store.get("good")[0] == make("good")


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        Store.open(tmp_path / "x")


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(StorageError, match="part of the path .* is a file"):
        Store.open(tmp_path / "x" / "runs.duckdb")


def test_reading_what_is_not_there(tmp_path):
    for open_it in (lambda p: Store.open(p, read_only=True), Store.open_snapshot):
        with pytest.raises(StorageError, match="There is no file"):
            open_it(tmp_path / "none.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # The tests may run as root, who has every permission.
    with pytest.raises(StorageError, match="no permission to use .* LAB_DATA") as info:
        Store.open(tmp_path / "x" / "runs.duckdb")
    assert info.value.reason == "denied"


# Held by another process


def test_a_file_held_by_another_process(path, holder, make):
    process = holder(HOLD, path)
    assert process.first_line == "ready"
    for read_only in (False, True):
        with pytest.raises(StorageError) as info:
            Store.open(path, read_only=read_only)
        text = str(info.value)
        assert info.value.reason == "locked" and f"PID {process.pid}" in text and "not even to read" in text
    with Store.open_snapshot(path) as look:
        assert [row["run_id"] for row in look.list()] == ["held"]
        assert look.get("held")[0] == make("held") and "as they were" in look.notice
        copy = look._opened.snapshot.path
        assert copy.exists()
        with pytest.raises(StorageError, match="only for reading"):
            look.rename("held", "x")
    assert not copy.parent.exists()


HOLD_FOREIGN = """
import duckdb, sys, time
held = duckdb.connect(sys.argv[1])
held.execute("CREATE TABLE IF NOT EXISTS bank (money INTEGER)")
print("ready", flush=True)
time.sleep(10_000)
"""


def test_a_held_file_of_another_program_is_called_by_its_own_name(path, holder):
    path.parent.mkdir()
    holder(HOLD_FOREIGN, path)
    with pytest.raises(StorageError) as locked:
        Store.open(path)
    with pytest.raises(StorageError) as foreign:
        Store.open_snapshot(path)
    for told in (str(locked.value), str(foreign.value)):
        assert str(path) in told and "copy.duckdb" not in told and "Store" not in told
    assert "in use by another process" in str(locked.value) and "not one of Attention Lab" in str(foreign.value)


def test_falling_back_to_memory_shows_what_the_other_process_saved(path, holder, make):
    holder(HOLD, path)
    with Store.open(path, fallback=True) as store:
        assert "in use by another process" in store.notice and "shown as they were" in store.notice
        assert store.get("held")[0] == make("held")
        store.save(make("mine"))
        store.delete("held")
        assert [row["run_id"] for row in store.list()] == ["mine"]
        with pytest.raises(StorageError, match="file system operations are disabled"):
            store._database.read(lambda cursor: cursor.execute("ATTACH 'x.db'"))
    with Store.open_snapshot(path) as look:
        assert [row["run_id"] for row in look.list()] == ["held"]


def test_falling_back_is_empty_where_the_copy_would_be_too_large(path, holder, monkeypatch):
    holder(HOLD, path)
    monkeypatch.setattr("storage.opening._MOST_IN_MEMORY", 0)
    with Store.open(path, fallback=True) as store:
        assert store.list() == [] and "in use by another process" in store.notice


def test_a_snapshot_of_a_file_that_never_stands_still(path, monkeypatch):
    Store.open(path).close()
    monkeypatch.setattr("storage.snapshot._PAUSE_S", 0)
    states = iter(range(1000))
    original = __import__("storage.snapshot", fromlist=["_state"])._state
    monkeypatch.setattr("storage.snapshot._state", lambda p: {name: next(states) for name in original(p)})
    with pytest.raises(StorageError, match="changed while it was being copied"):
        Store.open_snapshot(path)
