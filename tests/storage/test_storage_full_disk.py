"""No room left: one sentence, nothing lost, and saving works again when there is room."""

import pytest
from storage import StorageError
from storage.errors import explain

pytest.importorskip("resource", reason="file size limits are a matter of POSIX")

# A limit on the size of files stands for a full disk: writing fails in the same places. A write past it sends
# a signal that Python ignores.
FULL = """
import os, resource, sys, threading
sys.path.insert(0, "tests/storage")
from conftest import sample_record
import numpy as np
from storage import Store, StorageError
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def noise(size):
    return {"noise": np.frombuffer(os.urandom(size), np.uint8)}
path, target = sys.argv[1:]
store = Store.open(path)
store.save(sample_record("before"), noise(1000))
"""

COMMIT = (
    FULL
    + """
limit(2_000_000)
for attempt in range(2):
    try: store.save(sample_record("big"), noise(5_000_000)); print("saved?")
    except StorageError as error: print(error.reason, "|", error)
    assert [r["run_id"] for r in store.list()] == ["before"], store.list()
limit(resource.RLIM_INFINITY)
store.save(sample_record("big"), noise(5_000_000))
store.close()
with Store.open(path) as store:
    assert sorted(r["run_id"] for r in store.list()) == ["before", "big"]
    assert store.get("before")[0] == sample_record("before")
"""
)

# Small commits fit the log, but the checkpoint that moves them into the file does not: DuckDB shuts the
# database, for the threads that are reading too.
CHECKPOINT = (
    FULL
    + """
store.save(sample_record("large"), noise(2_000_000))
store.close()
store = Store.open(path)
limit(os.path.getsize(path) + 300_000)
for i in range(3):
    store.save(sample_record(f"r{i}"), noise(400_000))
failures, done = [], threading.Event()
def read():
    while not done.is_set():
        try: assert store.get("before")[0] == sample_record("before")
        except StorageError as error: failures.append(str(error))
readers = [threading.Thread(target=read, daemon=True) for _ in range(int(sys.argv[2][-1]))]
for reader in readers: reader.start()
store.delete("r2")
for attempt in range(100_000):  # until no reader was in the way once
    try:
        store.purge()
        store._database.checkpoint()  # Does nothing while another thread is reading.
    except StorageError as error:
        print(error.reason, "|", error)
        break
assert store.get("before")[0] == sample_record("before")
store.rename("large", "still writing")
done.set()
for reader in readers: reader.join()
assert len(failures) <= len(readers), failures
limit(resource.RLIM_INFINITY)
store.save(sample_record("after"), noise(3_000_000))
store.close()
with Store.open(path) as store:
    assert sorted(r["run_id"] for r in store.list()) == ["after", "before", "large", "r0", "r1"], store.list()
"""
)

EXPORT = (
    FULL
    + """
store.save(sample_record("big"), noise(3_000_000))
open(target, "w").write("what was here before")
limit(100_000)
for form in ("parquet", "json"):
    try: store.export(None, target, form); print("exported?")
    except StorageError as error: print(error.reason, "|", error)
assert open(target).read() == "what was here before"
assert len(os.listdir(os.path.dirname(target))) == 1, os.listdir(os.path.dirname(target))
"""
)

OPENING = """
import resource, sys
from storage import Store, StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: Store.open(sys.argv[1])
except StorageError as error: print(error.reason, "|", error)
with Store.open(sys.argv[1], fallback=True) as store: assert store.notice and store.list() == []
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Store.open(sys.argv[1]) as store: assert store.notice is None
"""


@pytest.mark.parametrize(
    ("code", "errors", "name"),
    [
        (COMMIT, 2, "x"),
        (CHECKPOINT, 1, "readers-0"),
        (CHECKPOINT, 1, "readers-3"),
        (EXPORT, 2, "x"),
        (OPENING, 1, "x"),
    ],
    ids=["commit", "checkpoint", "checkpoint while reading", "export", "opening"],
)
def test_a_full_disk(path, python, tmp_path, code, errors, name):
    (tmp_path / "out").mkdir()
    done = python(code, path, tmp_path / "out" / name)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == errors, done.stdout
    for line in lines:
        assert line.startswith("full | The disk has no room left for ") and "is intact" in line


def test_a_database_that_could_not_be_opened_again_is_tried_again(store, make, monkeypatch):
    store.save(make())
    database = store._database
    monkeypatch.setattr(database, "_connect", lambda: (_ for _ in ()).throw(StorageError("Not now")))
    for _ in range(2):
        with pytest.raises(StorageError, match="Not now"):
            database._reopen(0)
        with pytest.raises(StorageError, match="Not now"):
            store.list()
    monkeypatch.undo()
    assert len(store.list()) == 1
    store.rename(make()["run_id"], "works")


def test_the_words_of_the_system_are_known():
    import errno

    assert explain(OSError(errno.ENOSPC, "No space left on device"), "/x").reason == "full"
    assert explain(OSError(errno.EDQUOT, "Disk quota exceeded"), "/x").reason == "full"
    odd = explain(OSError(errno.EIO, "Input/output error"), "/x")
    assert isinstance(odd, StorageError) and "Input/output error" in str(odd)
    assert "not enough memory" in str(explain(MemoryError()))
