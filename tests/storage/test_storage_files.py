"""Exports and imports: exact where they can be, clear where they cannot, and never by half."""

import base64
import csv
import json
import os

import duckdb
import numpy as np
import pytest
from storage import FORMATS, Store, StorageError, load
from storage.codec import same


def export(store, make, arrays, folder):
    """Two runs, saved and exported in every format."""
    odd = make("odd", tokens=2, extra={"$float": "nan", "x": [None, 1.0, True]})
    odd["variants"][0]["perplexity"] = float("inf")
    odd["variants"][1]["tokens"][0]["text"] = "\ud83d"  # Half a character, as byte-level tokens can be.
    store.save(make("a"), arrays)
    store.save(odd)
    for form in FORMATS:
        store.export(["a", "odd"], folder / f"runs.{form}")
    return {"a": make("a"), "odd": odd}


@pytest.fixture
def exported(store, make, arrays, tmp_path):
    """The runs, still in their store, and their files in tmp_path."""
    return export(store, make, arrays, tmp_path)


@pytest.fixture(scope="module")
def files(make, arrays, tmp_path_factory):
    """A folder with the exported files alone, which no test changes."""
    folder = tmp_path_factory.mktemp("files")
    with Store.open(":memory:") as store:
        export(store, make, arrays, folder)
    return folder


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_an_export_comes_back_without_loss(exported, arrays, tmp_path, form):
    file = tmp_path / f"runs.{form}"
    with Store.open(tmp_path / "other.duckdb") as other:
        assert other.import_(file) == ["a", "odd"]
        for run_id, record in exported.items():
            assert same(other.get(run_id)[0], record)
        for name, array in arrays.items():
            back = other.array("a", name)
            assert back.dtype == array.dtype and np.array_equal(back, array)
        other.export(None, tmp_path / f"again.{form}")
    loaded = load(tmp_path / f"again.{form}")
    assert {record["run_id"] for record, _ in loaded} == {"a", "odd"}
    (again,) = (found for record, found in loaded if record["run_id"] == "a")
    assert np.array_equal(again["qk/A/0/q"], arrays["qk/A/0/q"])


def test_csv_has_a_row_for_each_token(exported, tmp_path):
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 + 2 * 2
    assert (
        rows[1] | {"text": " tök1", "token_id": "1", "letter": "A", "forced_kl": "0.01", "kept": "1.0"}
        == rows[1]
    )
    assert {row["model"] for row in rows} == {"SmolLM2-135M-Instruct"}


def test_csv_shows_runs_without_tokens_and_disarms_formulas(store, make, tmp_path):
    record = make("a", tokens=0, name='=HYPERLINK("http://x")', specs=("dense",))
    store.save(record)
    assert store.export("a", tmp_path / "runs.csv") == tmp_path / "runs.csv"
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == "'" + record["name"] and row["place"] == "" and row["spec"] == "dense"


def test_parquet_is_a_table_for_others_too(exported, tmp_path):
    rows = duckdb.sql(
        f"SELECT letter, count(*), avg(logprob) FROM '{tmp_path}/runs.parquet' "
        "WHERE kind = 'token' AND run_id = 'a' GROUP BY letter ORDER BY letter"
    ).fetchall()
    assert rows == [("A", 4, pytest.approx(-0.15)), ("B", 4, pytest.approx(-0.15))]


def test_json_is_strict(exported, tmp_path):
    content = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["format"] == "attention-lab-runs" and content["version"] == 1
    array = {a["name"]: a for a in content["runs"][0]["arrays"]}["cache/A/bits"]
    assert (array["dtype"], array["shape"], array["codec"]) == ("|u1", [3, 2, 7], "zlib")


def test_a_record_alone_can_be_imported(store, make, tmp_path):
    """As `lab run --json` writes it."""
    (tmp_path / "out.json").write_text(json.dumps(make("a")), encoding="utf-8-sig")
    assert store.import_(tmp_path / "out.json") == ["a"]
    assert store.get("a") == (make("a"), [])


def test_the_format_follows_from_the_name_or_is_asked_for(store, make, tmp_path):
    store.save(make("a"))
    store.export("a", tmp_path / "x.txt", format="JSON")
    assert load(tmp_path / "x.txt")[0][0] == make("a")
    for name, chosen in (("x.xlsx", None), ("x", None), ("x.json", "pickle")):
        with pytest.raises(StorageError, match="Expected one of parquet, csv, json"):
            store.export("a", tmp_path / name, chosen)


def test_a_name_full_of_patterns_and_quotes(store, make, tmp_path):
    store.save(make("a"))
    folder = tmp_path / "it's [a] 'dir*'?"
    for form in FORMATS:
        store.export("a", folder / f"x'[1]*.{form}")
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"x'[1]*.{form}" for form in FORMATS)
    assert load(folder / "x'[1]*.parquet")[0][0] == make("a")


def test_nothing_to_export(store, make, tmp_path):
    with pytest.raises(StorageError, match="no run to export"):
        store.export(None, tmp_path / "x.json")
    store.save(make("a"))
    with pytest.raises(StorageError, match="There is no run 'b'"):
        store.export(["a", "b"], tmp_path / "x.json")
    with pytest.raises(StorageError, match="is a folder"):
        store.export("a", tmp_path, "json")
    assert not (tmp_path / "x.json").exists()


def test_an_export_that_fails_leaves_the_old_file(store, make, tmp_path, monkeypatch):
    store.save(make("a"))
    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(
        "storage.exporting.dumps", lambda value: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    for form in ("json", "parquet"):
        with pytest.raises(StorageError, match="no room left"):
            store.export("a", tmp_path / "x.json", form)
    assert (tmp_path / "x.json").read_text() == "old"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".export")]


# Importing what is there already


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_importing_again_changes_nothing(exported, store, tmp_path, form):
    store.rename("a", "renamed since")
    store.delete("odd")
    assert store.import_(tmp_path / f"runs.{form}") == ["a", "odd"]
    assert len(store.list()) == 2 and store.get("a")[0]["name"] == "renamed since"


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_another_run_under_the_same_id_gets_a_new_one(exported, store, make, arrays, tmp_path, form):
    store.save(make("a", device="cuda"), replace=True)
    new, odd = store.import_(tmp_path / f"runs.{form}")
    assert new != "a" and odd == "odd" and len(store.list()) == 3
    assert store.get("a")[0]["device"] == "cuda"
    assert store.get(new) == ({**make("a"), "run_id": new}, sorted(arrays))
    assert np.array_equal(store.array(new, "cache/A/death"), arrays["cache/A/death"])


# Importing what is no export


def edited(change):
    """An edit of a JSON export as (name, bytes)."""

    def apply(tmp_path):
        content = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
        change(content)
        return json.dumps(content).encode()

    return apply


def drop(*path):
    def change(content):
        place = content["runs"][1]["record"]
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return edited(change)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        place = content["runs"][1]
        for key in path:
            place = place[key]
        place[last] = value

    return edited(change)


def put_array(**changes):
    array = {
        "name": "x",
        "dtype": "<f4",
        "shape": [2],
        "codec": "raw",
        "data": base64.b64encode(bytes(8)).decode(),
    }
    return edited(lambda content: content["runs"][1].update(arrays=[{**array, **changes}]))


def raw(content):
    return lambda tmp_path: content


R = "record"
BAD = {
    "empty": (raw(b""), "is empty"),
    "picture": (raw(b"\x89PNG\r\n" * 9), "neither Parquet nor JSON"),
    "pickle": (raw(b"\x80\x04\x95" * 9), "neither Parquet nor JSON"),
    "csv": (lambda p: (p / "runs.csv").read_bytes(), "is a CSV table.*CSV leaves out most"),
    "no json": (raw(b"{not json"), "not valid JSON: .* line 1, column 2"),
    "cut json": (lambda p: (p / "runs.json").read_bytes()[:-50], "not valid JSON.*cut off"),
    "latin-1": (raw('{"a": "ü"}'.encode("latin-1")), "Expected JSON in UTF-8"),
    "NaN": (raw(b'{"run_id": NaN}'), "NaN is not JSON"),
    "deep": (raw(b"[" * 200_000), "nested too deeply"),
    "list": (raw(b"[1]"), "no export of Attention Lab"),
    "foreign": (raw(b'{"a": 1}'), "no export of Attention Lab"),
    "later version": (edited(lambda c: c.update(version=2)), "version is 2"),
    "no runs": (edited(lambda c: c.update(runs=[])), "holds no runs"),
    "runs no list": (edited(lambda c: c.update(runs={})), "Expected a list of runs"),
    "run no object": (edited(lambda c: c["runs"].append(3)), r"runs\[2\].record is missing"),
    "schema": (put(R, "schema", 2), r"runs\[1\].record.schema is 2. Expected 1"),
    "schema text": (put(R, "schema", "1"), r"record.schema is '1'"),
    "no schema": (drop("schema"), r"runs\[1\].record.schema is missing"),
    "no id": (drop("run_id"), r"runs\[1\].record.run_id is missing"),
    "evil id": (put(R, "run_id", "<script>"), r"run_id is '<script>'"),
    "no model": (drop("model"), r"record.model is missing"),
    "null model": (put(R, "model", None), r"record.model is null"),
    "no variants": (drop("variants"), r"record.variants is missing"),
    "variants text": (put(R, "variants", "A"), r"record.variants is 'A'. Expected a list"),
    "no letter": (drop("variants", 1, "letter"), r"runs\[1\].record.variants\[1\].letter is missing"),
    "no text": (drop("variants", 0, "text"), r"variants\[0\].text is missing"),
    "variant number": (put(R, "variants", 0, 3), r"variants\[0\] is 3. Expected an object"),
    "bytes text": (
        put(R, "variants", 0, "kv_bytes", "many"),
        r"variants\[0\].kv_bytes is 'many'. Expected a number",
    ),
    "no token id": (drop("variants", 1, "tokens", 1, "id"), r"variants\[1\].tokens\[1\].id is missing"),
    "token id": (
        put(R, "variants", 1, "tokens", 1, "id", 1.5),
        r"tokens\[1\].id is 1.5. Expected a whole number",
    ),
    "ids": (put(R, "prompt", "token_ids", ["1"]), r"prompt.token_ids\[0\] is '1'"),
    "alternatives": (
        put(R, "variants", 0, "tokens", 0, "alternatives", [[1, 2]]),
        r"alternatives\[0\] is \[1, 2\]",
    ),
    "fidelity": (put(R, "variants", 0, "fidelity", 0, "kl", "x"), r"fidelity\[0\].kl is 'x'"),
    "bits": (put(R, "variants", 0, "layers", 2, "bits", []), r"layers\[2\].bits is \[\]. Expected an object"),
    "arrays": (put("arrays", {}), r"runs\[1\].arrays is no list"),
    "array key": (put_array(dtype=None), r"arrays\[0\].dtype is missing"),
    "base64": (put_array(data="§"), r"arrays\[0\].data is not base64"),
    "dtype": (put_array(dtype="object"), "has the dtype 'object'"),
    "dtype code": (put_array(dtype="__import__('os')"), "has the dtype"),
    "shape": (put_array(shape=[-2]), "has the shape"),
    "short": (put_array(shape=[3]), "too few or too many bytes"),
    "huge": (put_array(shape=[2**20, 2**20]), "claims"),
    "zlib": (put_array(codec="zlib"), "not valid zlib"),
    "codec": (put_array(codec="pickle"), "has the codec 'pickle'"),
    "twice": (
        edited(lambda c: c["runs"][1].update(arrays=c["runs"][0]["arrays"][:1] * 2)),
        "two arrays named",
    ),
    "mark": (put(R, "name", {"$float": 3}), "is a mark of this format"),
    "cut parquet": (lambda p: (p / "runs.parquet").read_bytes()[:-100], "not a whole Parquet file.*cut off"),
    "half parquet": (lambda p: (p / "runs.parquet").read_bytes()[:4000], "not a whole Parquet file"),
    "parquet head": (raw(b"PAR1"), "not a whole Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_import_names_the_fault_and_adds_nothing(files, tmp_path, case):
    content, words = BAD[case]
    file = tmp_path / "bad.file"
    file.write_bytes(content(files))
    with Store.open(":memory:") as other:
        with pytest.raises(StorageError, match=words) as info:
            other.import_(file)
        told = str(info.value)
        assert other.list() == [] and len(told) < 500 and " Error: " not in told and "/attention-lab-" not in told
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


def parquet(files, tmp_path, query):
    file = tmp_path / "made.parquet"
    with duckdb.connect() as db:
        db.execute(f"CREATE TABLE source AS FROM '{files}/runs.parquet'")
        db.execute(f"COPY ({query}) TO '{file}' (FORMAT parquet)")
    return file


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELECT 1 AS a", "column kind is missing"),
        ("SELECT * EXCLUDE (record) FROM source", "column record is missing"),
        (
            "SELECT * REPLACE (1 AS record) FROM source",
            "column record .* another type. Expected it as VARCHAR",
        ),
        ("FROM source WHERE kind = 'token'", "holds no runs"),
        ("FROM source WHERE kind <> 'run'", "arrays of a run that is not in it: 'a'"),
        ("SELECT * REPLACE ('{' AS record) FROM source", r"runs\[0\].record .* is not valid JSON"),
        ("SELECT * REPLACE (NULL AS record) FROM source", r"Expected it as VARCHAR|not valid JSON"),
        ("SELECT * REPLACE ('{}' AS record) FROM source", r"runs\[0\].record.schema is missing"),
        ("SELECT * REPLACE (NULL::BLOB AS data) FROM source", "array of the run 'a' .* is incomplete"),
        ("SELECT * REPLACE ('x'::BLOB AS data) FROM source", "not valid zlib|too few or too many"),
        ("SELECT * REPLACE ('b' AS run_id) FROM source WHERE kind <> 'array'", None),
    ],
)
def test_a_bad_parquet_file_names_the_fault(files, tmp_path, query, words):
    file = parquet(files, tmp_path, query)
    with Store.open(":memory:") as other:
        if words is None:  # The record speaks for itself.
            assert other.import_(file) == ["a", "odd"]
            return
        with pytest.raises(StorageError, match=words):
            other.import_(file)
        assert other.list() == []


def test_a_bomb_is_not_inflated(store, make, tmp_path):
    import zlib

    bomb = zlib.compress(bytes(200 << 20), 9)
    record = {"record": make("a"), "arrays": [{"name": "x", "dtype": "|u1", "shape": [10], "codec": "zlib",
                                               "data": base64.b64encode(bomb).decode()}]}  # fmt: skip
    (tmp_path / "x.json").write_text(
        json.dumps({"format": "attention-lab-runs", "version": 1, "runs": [record]})
    )
    with pytest.raises(StorageError, match="too few or too many bytes. Expected 10 "):
        store.import_(tmp_path / "x.json")


def test_a_file_that_is_not_there(store, tmp_path):
    with pytest.raises(StorageError, match="There is no file .*none.json"):
        store.import_(tmp_path / "none.json")
    with pytest.raises(StorageError, match="is a folder"):
        store.import_(tmp_path)


def test_an_import_that_fails_in_the_middle_adds_nothing(exported, tmp_path, monkeypatch):
    from storage import rows

    real, calls = rows.insert_arrays, []

    def fail(cursor, run_id, packed):
        calls.append(run_id)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(cursor, run_id, packed)

    monkeypatch.setattr(rows, "insert_arrays", fail)
    with Store.open(tmp_path / "other.duckdb") as other:
        with pytest.raises(StorageError, match="no room left"):
            other.import_(tmp_path / "runs.json")
        assert calls == ["a", "odd"] and other.list() == []
        assert other.import_(tmp_path / "runs.json") == ["a", "odd"]
