"""What was computed from a saved run is kept with it, replaced as one, and does not make it another run."""

import numpy as np
import pytest

from storage import Store, StorageError


def looks(n):
    return {"look/A/grid/values": np.full((2, n), 0.5, np.float32), "look/A/grid/about:text": np.arange(4, dtype=np.uint8)}


def test_what_is_attached_comes_back_and_is_replaced_whole(store, make, arrays):
    run_id = store.save(make(), arrays)
    store.attach(run_id, "look/A/grid/", looks(3))
    store.attach(run_id, "look/B/grid/", {"look/B/grid/x": np.zeros(1)})
    record, names = store.get(run_id)
    assert set(names) == {*arrays, *looks(3), "look/B/grid/x"} and record["run_id"] == run_id
    np.testing.assert_array_equal(store.array(run_id, "look/A/grid/values"), looks(3)["look/A/grid/values"])
    store.attach(run_id, "look/A/grid/", {"look/A/grid/values": np.ones(5)})
    assert set(store.get(run_id)[1]) == {*arrays, "look/A/grid/values", "look/B/grid/x"}
    store.attach(run_id, "look/A/grid/", {})
    assert set(store.get(run_id)[1]) == {*arrays, "look/B/grid/x"}


def test_it_is_still_the_same_run(store, make, arrays, tmp_path):
    run_id = store.save(make(), arrays)
    store.attach(run_id, "look/A/grid/", looks(3))
    assert store.save(make(), arrays) == run_id
    file = store.export(run_id, tmp_path / "run.parquet")
    assert store.import_(file) == [run_id]
    with Store.open(":memory:") as other:
        other.import_(file)
        assert "look/A/grid/values" in other.get(run_id)[1]
        other.attach(run_id, "look/A/grid/", {})
        assert other.import_(file) == [run_id], "what was derived from it decides nothing"


def test_only_its_owner_may_and_only_under_the_name_of_derived_things(store, make, arrays):
    run_id = store.save(make(), arrays, owner="one")
    store.share(run_id, True, owner="one")
    with pytest.raises(StorageError, match="no run"):
        store.attach(run_id, "look/A/grid/", looks(3), owner="two")
    store.attach(run_id, "look/A/grid/", looks(3), owner="one")
    for prefix, given in (("cache/", {}), ("look/A/", {"look/B/x": np.zeros(1)}), ("look/A/", {"cache/A/bits": np.zeros(1)})):
        with pytest.raises(StorageError, match="derived"):
            store.attach(run_id, prefix, given, owner="one")
    assert set(arrays) < set(store.get(run_id, owner="one")[1])
    with pytest.raises(StorageError, match="object"):
        store.attach(run_id, "look/A/", {"look/A/x": np.array([object()])}, owner="one")
    assert "look/A/grid/values" in store.get(run_id, owner="one")[1], "all or nothing"
