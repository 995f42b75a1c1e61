"""kill -9 at any moment: the file opens, and holds whole runs only."""

import random
import time

import pytest
from storage import Store

BEGIN_AND_DIE = """
import os, signal, sys
sys.path.insert(0, "tests/storage")
from conftest import sample_arrays, sample_record
from storage import Store, rows
store = Store.open(sys.argv[1])
store.save(sample_record("before", tokens=200), sample_arrays())
begun = sample_record("during", tokens=0)
store.begin(begun)
store.checkpoint({**begun, "variants": sample_record(tokens=3)["variants"]})
real = rows.insert_arrays
def die(cursor, run_id, arrays):
    real(cursor, run_id, arrays)  # Every row is written by now; only the commit is missing.
    os.kill(os.getpid(), signal.SIGKILL)
rows.insert_arrays = die
store.save(sample_record("during", tokens=200), sample_arrays())
"""

SAVE_FOR_EVER = """
import sys
sys.path.insert(0, "tests/storage")
from conftest import sample_arrays, sample_record
from storage import Store
store = Store.open(sys.argv[1])
print("ready", flush=True)
for i in range(int(sys.argv[2]), 10**9):
    store.begin(sample_record(f"run-{i}", tokens=0))
    store.save(sample_record(f"run-{i}", tokens=50), sample_arrays())
    print(i, flush=True)
"""


def test_killed_in_the_middle_of_saving(path, python, make, arrays):
    done = python(BEGIN_AND_DIE, path)
    assert done.returncode == -9, done.stderr
    with Store.open(path) as store:
        assert store.get("before") == (make("before", tokens=200), sorted(arrays))
        found, names = store.get("during")
        assert found == {**make("during", tokens=3), "status": "interrupted"} and names == []
        assert [row["run_id"] for row in store.list(status="interrupted")] == ["during"]
        store.save(make("during"), arrays)  # It can still be finished.
        assert store.get("during")[0]["status"] == "complete"


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment(path, holder, make, arrays, seed):
    process = holder(SAVE_FOR_EVER, path, 0)
    assert process.first_line == "ready"
    time.sleep(random.Random(seed).uniform(0.3, 1.2))
    process.kill()
    saved = [int(line) for line in process.stdout.read().split()]
    with Store.open(path) as store:
        listed = {row["run_id"]: row for row in store.list(limit=None)}
        assert {f"run-{i}" for i in saved} <= set(listed)
        assert len(listed) <= len(saved) + 1  # The one it was at when it died.
        for run_id, row in listed.items():
            record, names = store.get(run_id)
            if row["whole"]:
                assert record == make(run_id, tokens=50) and names == sorted(arrays)
            else:
                assert record == {**make(run_id, tokens=0), "status": "interrupted"} and names == []
        assert all(listed[f"run-{i}"]["whole"] for i in saved)


def test_killed_while_the_file_is_made(tmp_path, holder):
    for i in range(4):
        path = tmp_path / f"{i}.duckdb"
        process = holder(
            "print('go', flush=True); import sys; from storage import Store; Store.open(sys.argv[1])", path
        )
        time.sleep(0.1 + 0.06 * i)
        process.kill()
        process.wait()
        with Store.open(path) as store:
            assert store.list() == []
