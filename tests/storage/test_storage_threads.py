"""Many threads on one store: writers take turns, readers see whole runs, nobody sees an error."""

import threading
from concurrent.futures import ThreadPoolExecutor

from storage import Store


def test_eight_threads_read_while_others_write(path, make, arrays):
    runs = 4
    with Store.open(path) as store:
        store.save(make("first"), arrays)
        stop = threading.Event()

        def write(worker):
            for i in range(runs):
                run_id = f"w{worker}-{i}"
                store.begin(make(run_id, tokens=0))
                store.save(make(run_id, tokens=20), arrays)
                store.tag(run_id, [f"worker {worker}"])

        def read(_):
            seen = 0
            while not stop.is_set() or not seen:
                for row in store.list(limit=4):
                    record, names = store.get(row["run_id"])
                    # Begun or whole, never something between.
                    tokens = [len(variant["tokens"]) for variant in record["variants"]]
                    if record["status"] == "interrupted":
                        assert tokens == [0, 0] and not names
                    else:
                        assert tokens in ([20, 20], [4, 4]) and names == sorted(arrays)
                        assert store.array(row["run_id"], "qk/A/0/q").shape == (9, 7, 64)
                    seen += 1
            return seen

        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(read, i) for i in range(4)]
            writers = [pool.submit(write, i) for i in range(4)]
            try:
                for writer in writers:
                    writer.result()
            finally:
                stop.set()
            assert all(reader.result() for reader in readers)
        assert len(store.list(limit=None)) == 1 + 4 * runs
        assert len(store.list(tags=["worker 3"])) == runs
    with Store.open(path) as store:
        assert len(store.list(limit=None)) == 1 + 4 * runs


def test_two_threads_beginning_the_same_run(store, make):
    """One of them gets it, the other is told."""
    barrier = threading.Barrier(2)

    def begin(_):
        barrier.wait()
        try:
            return store.begin(make("same"))
        except Exception as error:  # noqa: BLE001
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = sorted(pool.map(begin, range(2)))
    assert results[1] == "same" and results[0].startswith("There is a run same already")
    assert len(store.list()) == 1


def test_closing_waits_for_the_work_of_other_threads(path, make):
    store = Store.open(path)
    store.save(make())
    inside, go_on = threading.Event(), threading.Event()

    def slow(cursor):
        inside.set()
        go_on.wait(600)
        return cursor.execute("SELECT count(*) FROM runs").fetchall()

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(store._database.read, slow)
        assert inside.wait(600)
        closing = pool.submit(store.close)
        go_on.set()
        assert reading.result(600) == [(1,)]
        closing.result(600)
    Store.open(path, read_only=True).close()


def test_the_log_is_folded_into_the_file_when_runs_are_purged(path, make, arrays):
    with Store.open(path) as store:
        for i in range(3):
            store.save(make(f"r{i}"), arrays)
        store.delete(["r0", "r1"])
        assert path.with_name("runs.duckdb.wal").stat().st_size > 0
        assert store.purge() == 2
        assert not path.with_name("runs.duckdb.wal").exists()
    # Also after the file was opened again: no forgotten transaction is in the way.
    with Store.open(path) as store:
        store.save(make("r3"), arrays)
        store.delete("r3")
        assert store.purge() == 1
        assert not path.with_name("runs.duckdb.wal").exists()
