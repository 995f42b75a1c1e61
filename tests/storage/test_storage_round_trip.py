"""What is saved comes back exactly, and lies in real columns."""

import copy
import math

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from storage import Store, StorageError
from storage.codec import dumps, loads, pack, same, unpack
from storage.layout import LEVELS
from storage.shred import join, split

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
    | st.sampled_from(["$float", "nan", "\x00", "\ud800", "🙂"])
)
keys = st.text(max_size=5) | st.sampled_from(
    ["$float", "$text", "$dict", "id", "text", "tokens", "bits", "kl"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def scratch():
    with Store.open(":memory:") as opened:
        yield opened


def test_a_contract_record_comes_back_and_needs_no_extra_column(store, make, arrays):
    record = make()
    store.save(record, arrays)
    found, names = store.get(record["run_id"])
    assert found == record and same(found, record)
    assert names == sorted(arrays)
    for name, array in arrays.items():
        back = store.array(record["run_id"], name)
        assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)
        back[...] = 0  # A fresh array, the caller's to change.
    for table in LEVELS:
        ((extra,),) = store._database.read(
            lambda cursor, table=table: cursor.execute(f"SELECT count(rest) FROM {table.name}").fetchall()
        )
        assert extra == 0, table.name


def test_the_tables_can_be_queried(path, make):
    with Store.open(path) as store:
        store.save(make(tokens=5))
    with duckdb.connect(str(path), read_only=True) as db:
        rows = db.execute("""
            SELECT r.model_id, r.settings_seed, v.letter, avg(t.logprob), sum(len(t.alternatives)),
                   any_value(l.bits['16']), r.environment->>'torch'
            FROM runs r JOIN variants v USING (run_id) JOIN tokens t ON t.run_id = r.run_id AND t.variant =
            v.place JOIN layers l ON l.run_id = r.run_id AND l.variant = v.place AND l.place = 0
            GROUP BY ALL ORDER BY v.letter""").fetchall()
    assert [row[2] for row in rows] == ["A", "B"]
    assert rows[0][:2] == ("SmolLM2-135M-Instruct", 0)
    assert rows[0][3] == pytest.approx(-0.2) and rows[0][4:] == (10, 4, "2.13.0")


def test_the_layout_names_columns_that_exist(store):
    def columns(cursor, table):
        return dict(
            cursor.execute(
                "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = ?", [table]
            ).fetchall()
        )

    for table in LEVELS:
        have = store._database.read(lambda cursor, name=table.name: columns(cursor, name))
        for field in table.fields:
            assert have[field.column].replace('"', "") == field.kind.sql, (table.name, field.column)


@SETTINGS
@given(data=st.data())
def test_any_damage_to_a_record_comes_back_too(data, make, scratch):
    """Wrong types, unknown and missing keys at every level: exact all the same, through the database."""
    record = copy.deepcopy(make(tokens=2))
    variant = record["variants"][1]
    places = [
        record["model"],
        record["settings"],
        record["prompt"],
        record["environment"],
        variant,
        variant["tokens"][0],
        variant["fidelity"][1],
        variant["layers"][0],
        variant["layers"][0]["bits"],
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(place)) | keys) if place else data.draw(keys)
        if data.draw(st.booleans()) and key in place:
            del place[key]
        else:
            place[key] = data.draw(values)
    for key in data.draw(st.sets(st.sampled_from(["model", "settings", "device", "variants"]), max_size=2)):
        record[key] = data.draw(values)
    record["extra"] = data.draw(values)
    assert same(join(split(record)), record)
    scratch.save(record, replace=True)
    assert same(scratch.get(record["run_id"])[0], record)


@SETTINGS
@given(values)
def test_json_text_is_reversible(value):
    assert same(loads(dumps(value)), value)


@SETTINGS
@given(
    hnp.arrays(
        st.sampled_from(["u1", "<i4", ">i4", "<f2", "<f4", "<f8", "?", "<c8", "<i8"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_arrays_come_back_with_dtype_and_shape(array):
    back = unpack(pack("x", array))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == np.ascontiguousarray(array).tobytes()


def test_array_bytes_shrink_where_they_can():
    assert pack("bits", np.zeros((30, 3, 4096), np.uint8)).codec == "zlib"
    assert len(pack("bits", np.zeros((30, 3, 4096), np.uint8)).data) < 5000
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    assert pack("noise", noise).codec == "raw"
    assert np.array_equal(unpack(pack("fortran", np.asfortranarray(np.eye(3)))), np.eye(3))


def test_numpy_numbers_and_tuples_become_plain(store, make):
    record = make()
    record["variants"][0]["kl_mean"] = np.float32(0.5)
    record["variants"][0]["kv_bytes"] = np.int64(7)
    record["model"]["layer_types"] = ("full_attention",)
    record["variants"][0]["simulated"] = np.bool_(True)
    store.save(record)
    found, _ = store.get(record["run_id"])
    variant = found["variants"][0]
    assert (
        type(variant["kl_mean"]) is float
        and type(variant["kv_bytes"]) is int
        and variant["simulated"] is True
    )
    assert found["model"]["layer_types"] == ["full_attention"]


def test_not_a_number_and_infinity_come_back(store, make):
    record = make()
    record["variants"][0]["perplexity"] = math.inf
    record["variants"][0]["kl_mean"] = math.nan
    record["variants"][0]["techniques"][0]["params"]["budget"] = -math.inf
    store.save(record)
    assert same(store.get(record["run_id"])[0], record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": {1: 2}}, "record.extra has the key 1"),
        ({"extra": {"a": [object()]}}, "record.extra.a[0] is a builtins.object"),
        ({"extra": np.zeros(3)}, "record.extra is a numpy.ndarray"),
        ({"run_id": "../x"}, "run_id is '../x'"),
        ({"status": "running"}, "status is 'running'"),
        ({"schema": 7}, "schema is 7"),
        ({"schema": True}, "schema is True"),
        ({"created": "yesterday"}, "created is 'yesterday'"),
        ({"tags": "a"}, "tags is 'a'"),
        ({"name": None}, "name is None"),
    ],
)
def test_what_cannot_be_saved_is_named(store, make, change, words):
    with pytest.raises(StorageError) as info:
        store.save({**make(), **change})
    assert words in str(info.value) and "Expected" in str(info.value)
    assert store.list() == []


def test_missing_keys_are_named(store, make):
    for key in ("schema", "run_id", "name", "tags", "created", "status", "model", "prompt", "variants"):
        record = make()
        del record[key]
        with pytest.raises(StorageError, match=f"^{key} is missing"):
            store.save(record)


def test_arrays_of_objects_are_refused_and_nothing_is_saved(store, make):
    with pytest.raises(StorageError, match="dtype object"):
        store.save(make(), {"x": np.array([None])})
    assert store.list() == []


def test_nesting_beyond_reason_is_an_error(store, make):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(StorageError, match="nested too deeply"):
        store.save({**make(), "extra": deep})
