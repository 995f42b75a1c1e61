"""Listing, searching, comparing, naming, deleting, and who may see what."""

import re

import pytest
from storage import Store, StorageError, new_run_id


@pytest.fixture
def full(store, make):
    """Three runs, a day apart."""
    for i, (name, tags, model) in enumerate(
        [("Sinks", ["lesson"], "SmolLM2"), ("", ["lesson", "50%"], "gemma"), ("größer_x", [], "SmolLM2")]
    ):
        record = make(f"r{i}", name=name, tags=tags, created=f"2026-11-2{i}T10:00:00Z")
        record["model"]["id"] = model
        record["settings"]["seed"] = i
        record["variants"][1]["kl_mean"] = [0.5, 0.1, None][i]
        store.save(record)
    return store


def ids(rows):
    return [row["run_id"] for row in rows]


def test_the_row_of_a_run(full):
    row = full.list()[-1]
    del row["saved_at"]
    assert row == {
        "run_id": "r0",
        "name": "Sinks",
        "tags": ["lesson"],
        "created": "2026-11-20T10:00:00Z",
        "status": "complete",
        "model": "SmolLM2",
        "device": "cpu",
        "prompt": "Grüße an die Welt",
        "shared": False,
        "visitor": False,
        "whole": True,
        "specs": ["dense", "h2o(budget=0.25)"],
        "titles": ["Dense", "H2O(Budget=0.25)"],
        "kl_worst": 0.5,
        "kv_smallest": 0.25,
        "tokens": 8,
    }


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({}, ["r2", "r1", "r0"]),
        ({"order": "created"}, ["r0", "r1", "r2"]),
        ({"order": "-kl"}, ["r0", "r1", "r2"]),
        ({"order": "name", "limit": 2}, ["r1", "r2"]),
        ({"limit": 1, "offset": 1}, ["r1"]),
        ({"limit": 0}, []),
        ({"limit": None}, ["r2", "r1", "r0"]),
        ({"search": "smollm2"}, ["r2", "r0"]),
        ({"search": "SMOLLM2 sinks"}, ["r0"]),
        ({"search": "GRÖSSER"}, []),
        ({"search": "GRÖßER"}, ["r2"]),
        ({"search": "h2o welt"}, ["r2", "r1", "r0"]),
        ({"search": "50%"}, ["r1"]),
        ({"search": "n_e"}, []),
        ({"search": "' OR 1=1 --"}, []),
        ({"search": "  "}, ["r2", "r1", "r0"]),
        ({"tags": ["lesson"]}, ["r1", "r0"]),
        ({"tags": ["lesson", "50%"]}, ["r1"]),
        ({"tags": ["less"]}, []),
        ({"status": "failed"}, []),
    ],
)
def test_searching(full, question, answer):
    assert ids(full.list(**question)) == answer


def test_an_unknown_order_names_the_known_ones(full):
    for order in ("size", "created; DROP TABLE runs", "--created"):
        with pytest.raises(StorageError, match="Expected one of created, name"):
            full.list(order=order)


def test_a_negative_window_is_refused(full):
    for window in ({"limit": -1}, {"offset": -1}, {"limit": "1; DROP TABLE runs"}):
        with pytest.raises(StorageError, match="Expected whole numbers from 0"):
            full.list(**window)


def test_a_wrong_id_suggests_the_near_ones(store, make):
    store.save(make("20261124-105236-3fa9"))
    with pytest.raises(StorageError, match="no run '20261124-105236-3fa8'.*mean 20261124-105236-3fa9"):
        store.get("20261124-105236-3fa8")
    for call in (
        store.get,
        store.delete,
        lambda i: store.rename(i, "x"),
        lambda i: store.compare([i, i + "x"]),
    ):
        with pytest.raises(StorageError, match="There is no run"):
            call("zzz")
    with pytest.raises(StorageError, match="has no array 'x'.*saved without arrays"):
        store.array("20261124-105236-3fa9", "x")


def test_a_missing_array_names_those_there_are(store, make, arrays):
    store.save(make("a"), arrays)
    with pytest.raises(StorageError, match="Expected one of cache/A/bits, cache/A/death"):
        store.array("a", "cache/A/bit")


# Comparing


def test_comparing_shows_only_what_differs(full):
    table = full.compare(["r0", "r1"])
    assert table["run_ids"] == ["r0", "r1"] and table["names"] == ["Sinks", ""]
    rows = {row["field"]: row["values"] for row in table["rows"]}
    assert rows == {
        "name": ["Sinks", ""],
        "tags": ["lesson", "lesson, 50%"],
        "created": ["2026-11-20T10:00:00Z", "2026-11-21T10:00:00Z"],
        "model.id": ["SmolLM2", "gemma"],
        "settings.seed": [0, 1],
        "variants.B.kl_mean": [0.5, 0.1],
    }
    assert [row["field"] for row in table["rows"]][-1] == "variants.B.kl_mean"


def test_comparing_everything_marks_what_differs(full):
    rows = full.compare(["r0", "r1", "r2"], only_differences=False)["rows"]
    marked = {row["field"] for row in rows if row["differs"]}
    assert "settings.seed" in marked and "settings.top_k" in {row["field"] for row in rows} - marked
    assert not any("token_ids" in row["field"] or "fidelity" in row["field"] for row in rows)


def test_a_variant_that_a_run_lacks_is_none(full, make):
    full.save(make("one", specs=("dense",)))
    rows = {row["field"]: row["values"] for row in full.compare(["r0", "one"])["rows"]}
    assert rows["variants.B.spec"] == ["h2o(budget=0.25)", None]


def test_how_many_can_be_compared(full, make):
    for i in range(3, 11):
        full.save(make(f"r{i}", tokens=1))
    assert len(full.compare([f"r{i}" for i in range(10)])["run_ids"]) == 10
    for wrong in (["r0"], ["r0", "r0"], [], [f"r{i}" for i in range(11)]):
        with pytest.raises(StorageError, match="Expected 2 to 10 different runs"):
            full.compare(wrong)


# Changing


def test_renaming_and_tagging_change_the_record_too(full):
    full.rename("r0", "  Neuer Name 🙂 ")
    assert full.tag("r0", [" b ", "a", "b", ""]) == ["b", "a"]
    record, _ = full.get("r0")
    assert record["name"] == "Neuer Name 🙂" and record["tags"] == ["b", "a"]
    full.rename("r0", "")
    full.tag("r0", [])
    assert full.get("r0")[0]["tags"] == [] and full.get("r0")[0]["name"] == ""
    with pytest.raises(StorageError, match="at most 200 characters"):
        full.rename("r0", "x" * 201)
    with pytest.raises(StorageError, match="at most 60 characters"):
        full.tag("r0", ["x" * 61])
    with pytest.raises(StorageError, match="list of tags"):
        full.tag("r0", "lesson")


def test_deleting_can_be_undone_and_purging_cannot(full):
    before = full.get("r1")
    assert full.delete(["r1", "r2"]) == 2
    assert ids(full.list()) == ["r0"] and ids(full.list(deleted=True)) == ["r2", "r1"]
    with pytest.raises(StorageError, match="run r1 was deleted.*Undo"):
        full.get("r1")
    assert full.undelete("r1") == 1
    assert full.get("r1") == before
    with pytest.raises(StorageError, match="r0 is not deleted"):
        full.purge(["r2", "r0"])
    assert ids(full.list(deleted=True)) == ["r2"]
    assert full.purge() == 1 and full.purge() == 0
    with pytest.raises(StorageError, match="no run 'r2'"):
        full.undelete("r2")
    assert ids(full.list()) == ["r1", "r0"]


def test_deleting_is_all_or_nothing(full):
    with pytest.raises(StorageError, match="no run 'r9'"):
        full.delete(["r0", "r9"])
    assert len(full.list()) == 3


# The life of a run


def test_a_begun_run_is_interrupted_until_it_is_saved(store, make, arrays):
    record = make()
    plan = {key: record[key] for key in ("model", "settings", "prompt")}
    run_id = store.begin({**plan, "variants": [{"letter": "A", "spec": "dense"}]})
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run_id)
    found, names = store.get(run_id)
    assert (
        found["status"] == "interrupted"
        and found["variants"] == [{"letter": "A", "spec": "dense"}]
        and not names
    )
    assert {key: found[key] for key in plan} == plan
    record = {**record, "run_id": run_id}
    store.checkpoint({**record, "variants": record["variants"][:1]})
    assert store.get(run_id)[0] == {**record, "variants": record["variants"][:1], "status": "interrupted"}
    assert store.save(record, arrays) == run_id
    assert store.get(run_id) == (record, sorted(arrays))
    with pytest.raises(StorageError, match="There is a run"):
        store.begin(record)
    with pytest.raises(StorageError, match="saved already"):
        store.checkpoint(record)


def test_saving_twice(store, make, arrays):
    record = make()
    store.save(record, arrays)
    store.rename(record["run_id"], "named")
    store.save(record, arrays)
    assert store.get(record["run_id"])[0]["name"] == "named"
    other = {**record, "device": "cuda"}
    for wrong in (
        (other, arrays),
        (record, {}),
        (record, {**arrays, "cache/A/bits": arrays["cache/A/bits"] * 0}),
    ):
        with pytest.raises(StorageError, match="saved already, with other content"):
            store.save(*wrong)
    store.save({**other, "name": "new"}, {}, replace=True)
    assert store.get(record["run_id"]) == ({**other, "name": "new"}, [])


def test_what_was_changed_while_a_run_went_on_is_kept(store, make):
    record = make(tags=[])
    store.begin(record)
    store.rename(record["run_id"], "early name")
    store.tag(record["run_id"], ["early"])
    store.delete(record["run_id"])
    store.save(record)
    store.undelete(record["run_id"])
    assert store.get(record["run_id"])[0] == {**record, "name": "early name", "tags": ["early"]}


def test_new_ids_differ():
    assert len({new_run_id() for _ in range(50)}) > 40


# Who may see what


def test_a_visitor_sees_only_their_own(store, make, arrays, tmp_path):
    store.save(make("local"))
    store.begin(make("mine"), owner="token-1")
    store.checkpoint(make("mine"), owner="token-1")
    store.save(make("mine"), arrays, owner="token-1")
    store.save(make("theirs"), arrays, owner="token-2")
    assert ids(store.list(owner="token-1")) == ["mine"] and ids(store.list(owner="nobody")) == []
    assert set(ids(store.list())) == {"local", "mine", "theirs"}
    assert store.get("mine", owner="token-1")[0] == make("mine")
    mine = {"owner": "token-1"}
    for run_id in ("theirs", "local"):
        for attempt in (
            lambda i: store.get(i, **mine),
            lambda i: store.array(i, "cache/A/bits", **mine),
            lambda i: store.compare(["mine", i], **mine),
            lambda i: store.rename(i, "x", **mine),
            lambda i: store.tag(i, ["x"], **mine),
            lambda i: store.share(i, **mine),
            lambda i: store.delete(["mine", i], **mine),
            lambda i: store.export([i], tmp_path / "x.json", **mine),
        ):
            with pytest.raises(StorageError, match=f"^There is no run '{run_id}'.") as info:
                attempt(run_id)
            assert "Did you mean local" not in str(info.value) and "Did you mean theirs" not in str(
                info.value
            )
        with pytest.raises(StorageError, match="belongs to another run"):
            store.save({**make(run_id), "device": "cuda"}, owner="token-1", replace=True)
    assert len(store.list(owner="token-1")) == 1
    store.export(None, tmp_path / "mine.json", owner="token-1")
    with Store.open(":memory:") as other:
        assert other.import_(tmp_path / "mine.json", owner="v") == ["mine"] and ids(
            other.list(owner="v")
        ) == ["mine"]


def test_a_visitor_purges_only_their_own(store, make):
    for name, owner in (("a", "one"), ("b", "two"), ("c", None)):
        store.save(make(name), owner=owner)
        store.delete(name)
    with pytest.raises(StorageError, match="no run 'b'"):
        store.undelete("b", owner="one")
    assert store.purge(owner="one") == 1
    assert set(ids(store.list(deleted=True))) == {"b", "c"}


def test_a_shared_run_can_be_read_but_not_changed_or_listed(store, make, arrays):
    store.save(make("shown"), arrays, owner="one")
    store.share("shown", owner="one")
    assert store.get("shown", owner="two")[0] == make("shown")
    assert store.array("shown", "cache/A/bits", owner="two").shape == (3, 2, 7)
    assert store.list(owner="two") == [] and store.list(owner="one")[0]["shared"]
    for attempt in (store.rename, store.tag):
        with pytest.raises(StorageError, match="There is no run"):
            attempt("shown", "x" if attempt == store.rename else ["x"], owner="two")
    store.share("shown", False, owner="one")
    with pytest.raises(StorageError, match="There is no run"):
        store.get("shown", owner="two")


def test_a_visitors_token_is_not_in_the_file(path, make):
    with Store.open(path) as store:
        store.save(make(), owner="very-secret-token")
    assert b"very-secret-token" not in path.read_bytes()


def test_an_imported_run_that_another_visitor_has_gets_an_id_of_its_own(store, make, tmp_path):
    store.save(make("a"), owner="one")
    store.export("a", tmp_path / "a.json", owner="one")
    (new,) = store.import_(tmp_path / "a.json", owner="two")
    assert new != "a" and store.get(new, owner="two")[0] == {**make("a"), "run_id": new}
