"""The command line, in process on a tiny model, and once for real on the default model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "measure"))

pytest.importorskip("duckdb")

import toy

import lab.models
from lab.cli import main

FIELDS = {"spec", "text", "token_ids", "ttft_ms", "tpot_ms", "kv_bytes", "kv_bytes_dense", "kept_fraction", "kl_mean",
          "top1_agreement", "perplexity", "first_divergence"}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(lab.models, "load", lambda *_, **__: toy.loaded(), raising=False)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompt.txt").write_text(toy.prompt(50))
    return tmp_path


def run(files, *extra):
    return main(["run", "--prompt-file", str(files / "prompt.txt"), "--max-new-tokens", "6", "--db", str(files / "runs.duckdb"),
                 "--json", str(files / "out.json"), *extra])


def test_techniques_as_json(capsys):
    assert main(["techniques", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {
        "streaming_llm", "h2o", "snapkv", "pyramidkv", "int_codes", "kivi", "zerotuning", "a_shape", "delta", "head_pruning",
    } <= set(rows)
    for row in rows.values():
        assert {"name", "title", "paper", "slots", "parameters"} <= set(row) and len(row["help"]) > 40
        for p in row["parameters"]:
            assert {"name", "type", "default", "min", "max", "help"} <= set(p) and p["help"]


def test_run_writes_what_it_promises_and_saves(tiny, files, capsys):
    spec = "h2o(budget=0.25)+kivi(bits=2,group=16,residual=16)"
    assert run(files, "--variant", "dense", "--variant", spec) == 0
    out = json.loads((files / "out.json").read_text())
    assert {"run_id", "model", "device", "variants"} <= set(out)
    assert [v["spec"] for v in out["variants"]] == ["dense", spec] and all(FIELDS <= set(v) for v in out["variants"])
    capsys.readouterr()
    db = ["--db", str(files / "runs.duckdb")]
    assert main(["runs", "list", *db]) == 0 and out["run_id"] in capsys.readouterr().out
    assert main(["runs", "show", out["run_id"], "--json", *db]) == 0
    assert json.loads(capsys.readouterr().out) == out


def test_reads_and_break_even_are_told(tiny, files, capsys):
    cheap, dear = "quest(budget=0.1,page=8,dense_layers=0)", "quest(budget=0.3,page=1,dense_layers=0)"
    assert run(files, "--variant", "dense", "--variant", cheap, "--variant", dear, "--variant", "h2o(budget=0.5)") == 0
    out = json.loads((files / "out.json").read_text())
    reads = [v["reads"] for v in out["variants"]]
    assert reads[0] == {"attend": 1.0, "choose": 0.0, "pays": False}
    assert reads[1]["pays"] and 0 < reads[1]["attend"] + reads[1]["choose"] < 1
    # bounds of single tokens are all keys twice
    assert not reads[2]["pays"] and reads[2]["choose"] == pytest.approx(1.0, rel=0.05)
    text = capsys.readouterr().out
    assert " read " in text and text.count("stores everything") == 2
    assert "which pays" in text and "which does not pay" in text


def test_runs_compare_export_import(tiny, files, capsys):
    ids = []
    for seed in ("0", "1"):
        assert run(files, "--variant", "dense", "--seed", seed, "--temperature", "1") == 0
        ids.append(json.loads((files / "out.json").read_text())["run_id"])
    db = ["--db", str(files / "runs.duckdb")]
    capsys.readouterr()
    assert main(["runs", "compare", *ids, *db]) == 0
    assert "settings.seed" in capsys.readouterr().out
    for form in ("parquet", "json", "csv"):
        target = files / f"run.{form}"
        assert main(["runs", "export", ids[0], "--format", form, "--out", str(target), *db]) == 0 and target.stat().st_size
    for form in ("parquet", "json"):
        other = ["--db", str(files / f"{form}.duckdb")]
        assert main(["runs", "import", str(files / f"run.{form}"), *other]) == 0
        capsys.readouterr()
        assert main(["runs", "show", ids[0], "--json", *other]) == 0
        assert json.loads(capsys.readouterr().out)["run_id"] == ids[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--variant", "h3o"], "Did you mean h2o"),
        (["--variant", "h2o(budgt=1)"], "Did you mean budget"),
        (["--variant", "h2o(budget=-1)"], "from 0.001 to 1,000,000"),
        (["--variant", "h2o+snapkv"], "both fill the score slot"),
        (["--variant", ""], "The variant is empty"),
        (["--variant", "h2o(budget=0.25)+"], 'missing beside a "+"'),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "500"], "only 12 fit"),
        (["--temperature", "-1"], "temperature"),
        (["--db", "/dev/null/runs.duckdb"], "/dev/null"),
    ],
)
def test_bad_requests_end_in_a_sentence(tiny, files, capsys, arguments, words):
    assert run(files, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_run_whose_only_variant_fails_is_saved_and_exits_1(tiny, files, capsys):
    assert run(files, "--variant", "snapkv(budget=0.3,window=32)") == 1
    out = json.loads((files / "out.json").read_text())
    assert out["status"] == "failed" and "must protect" in out["variants"][0]["error"]


def test_a_run_of_which_one_variant_fails_is_partial_and_exits_1(tiny, files, capsys):
    assert run(files, "--variant", "dense", "--variant", "snapkv(budget=3,window=32)") == 1
    out = json.loads((files / "out.json").read_text())
    assert out["status"] == "partial" and out["variants"][0]["text"] and "must protect" in out["variants"][1]["error"]
    db = ["--db", str(files / "runs.duckdb")]
    capsys.readouterr()
    assert main(["runs", "list", *db]) == 0 and "partial" in capsys.readouterr().out
    for form in ("parquet", "json"):
        target, other = str(files / f"run.{form}"), ["--db", str(files / f"{form}.duckdb")]
        assert main(["runs", "export", out["run_id"], "--out", target, *db]) == 0
        assert main(["runs", "import", target, *other]) == 0
        capsys.readouterr()
        assert main(["runs", "show", out["run_id"], "--json", *other]) == 0
        assert json.loads(capsys.readouterr().out) == out


def test_a_run_stopped_by_hand_is_saved_and_exits_130(tiny, files, monkeypatch):
    from lab.measure.stream import Stream

    step = Stream.events

    def interrupted(self):
        for i, event in enumerate(step(self)):
            if i == 4:
                signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr(Stream, "events", interrupted)
    assert run(files, "--variant", "dense") == 130
    assert json.loads((files / "out.json").read_text())["status"] == "cancelled"


def test_a_run_that_cannot_be_saved_is_still_written_and_printed(tiny, files, monkeypatch, capsys):
    from storage import StorageError, Store

    def full(self, *_):
        raise StorageError("The disk has no room left")

    monkeypatch.setattr(Store, "save", full)
    assert run(files, "--variant", "dense") == 2
    told = capsys.readouterr()
    assert "no room left" in told.err and "dense" in told.out
    assert json.loads((files / "out.json").read_text())["status"] == "complete"


def test_memory_that_runs_out_is_a_sentence(files, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(lab.models, "load", full, raising=False)
    assert run(files, "--variant", "dense") == 2
    assert "ran out of memory" in capsys.readouterr().err


def test_quiet_says_why_nothing_came(tiny, files, capsys):
    assert run(files, "--quiet", "--variant", "snapkv(budget=0.3,window=32)") == 1
    assert "must protect" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_leaves_no_half(tmp_path, monkeypatch):
    from lab.cli.run import write_json
    from lab.errors import LabError

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LabError, match="No space left"):
        write_json({}, tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_to_and_not_replaced_and_a_link_stays_a_link(tiny, files, capsys):
    pipe, link = files / "pipe", files / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(files / "real.json")
    db = ["--db", str(files / "runs.duckdb")]
    assert run(files, "--variant", "dense", "--json", str(link)) == 0
    run_id = json.loads((files / "real.json").read_text())["run_id"]
    for command in (["run", "--prompt", "w5", "--max-new-tokens", "2", "--no-save", "--json", str(pipe)],
                    ["runs", "export", run_id, *db, "--format", "json", "--out", str(pipe)]):
        with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
            assert main(command) == 0
            assert json.loads(reader.communicate()[0])
        assert pipe.is_fifo()
    assert main(["runs", "export", run_id, *db, "--out", str(link)]) == 0
    assert link.is_symlink() and json.loads((files / "real.json").read_text())["runs"]
    assert not [p.name for p in files.iterdir() if p.name.startswith(".")]


def test_a_short_prompt_gets_advice_that_can_be_followed(tiny, tmp_path, capsys):
    args = ["run", "--prompt", "abc de", "--max-new-tokens", "2", "--no-save"]
    assert main([*args, "--variant", "snapkv(budget=0.3,window=32)"]) == 1
    assert "budget=1" in capsys.readouterr().err
    assert main([*args, "--variant", "snapkv(budget=1,window=32)"]) == 0


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read"), (b"\xff\xfe\x00", "UTF-8"), (b"caf\xe9", "UTF-8"), (b"   ", "empty"),
])
def test_bad_prompt_files(tiny, tmp_path, capsys, content, words):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["run", "--prompt-file", str(path), "--no-save"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--prompt-file", "-"], ["--prompt", "caf\udce9"]])
def test_bytes_that_are_no_text_are_told(tiny, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["run", *arguments, "--no-save"]) == 2
    error = capsys.readouterr().err
    assert "text in UTF-8" in error and "Traceback" not in error


def test_a_mark_of_byte_order_and_the_line_ends_of_windows_are_not_part_of_a_prompt(tiny, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    out = tmp_path / "o.json"
    args = ["run", "--prompt-file", str(tmp_path / "p.txt"), "--max-new-tokens", "2", "--no-save", "--json", str(out)]
    assert main(args) == 0 and json.loads(out.read_text())["prompt"]["text"] == "one\ntwo"


def test_a_locked_default_database_does_not_cost_the_run(tiny, files, monkeypatch, capsys):
    monkeypatch.setenv("LAB_DATA", str(files / "data"))
    from storage import default_path

    path = default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         f"import duckdb, sys; c = duckdb.connect({str(path)!r}); print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        code = main(["run", "--prompt-file", str(files / "prompt.txt"), "--max-new-tokens", "3", "--json", str(files / "o.json")])
        assert code == 0 and "another process" in capsys.readouterr().err
        assert json.loads((files / "o.json").read_text())["status"] == "complete"
    finally:
        holder.kill()


def test_a_database_that_another_process_holds_can_be_read_and_says_what_to_do(tiny, files, capsys):
    assert run(files, "--variant", "dense") == 0
    run_id, path = json.loads((files / "out.json").read_text())["run_id"], files / "runs.duckdb"
    hold = f"import sys; from storage import Store; s = Store.open({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        capsys.readouterr()
        db = ["--db", str(path)]
        for verb in (["list"], ["show", run_id], ["export", run_id, "--out", str(files / "copy.json")]):
            assert main(["runs", *verb, *db]) == 0
            told = capsys.readouterr()
            assert f"the runs of {path} as they were" in told.err and told.out
        assert json.loads((files / "copy.json").read_text())
        for request in (["runs", "rename", run_id, "x", *db], ["run", "--prompt", "abc", "--max-new-tokens", "2", *db]):
            assert main(request) == 2
            error = capsys.readouterr().err
            assert f"{path} is in use by another process (PID {holder.pid})" in error and "--db FILE" in error
            assert "Store" not in error and "Traceback" not in error
    finally:
        holder.kill()
        holder.wait()


def test_verbs_that_read_look_at_a_copy_where_the_file_may_not_be_written(tiny, files, monkeypatch, capsys):
    from storage import connection

    assert run(files, "--variant", "dense") == 0
    path, make = files / "runs.duckdb", connection._make

    def refuse(file):  # the tests may run as root, who has every permission
        if file == path:
            raise PermissionError(13, "Permission denied")
        make(file)

    monkeypatch.setattr(connection, "_make", refuse)
    run_id, db = json.loads((files / "out.json").read_text())["run_id"], ["--db", str(path)]
    capsys.readouterr()
    assert main(["runs", "list", *db]) == 0
    told = capsys.readouterr()
    assert run_id in told.out and "as they were" in told.err
    assert main(["runs", "rename", run_id, "x", *db]) == 2 and "no permission" in capsys.readouterr().err


def test_reading_a_database_that_is_not_there_makes_none(tmp_path, capsys):
    assert main(["runs", "list", "--db", str(tmp_path / "typo" / "runs.duckdb")]) == 2
    assert "There is no file" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_shown_as_one_and_listed_on_one_line(tmp_path, capsys):
    from storage import Store

    path = tmp_path / "runs.duckdb"
    with Store.open(path) as store:
        run_id = store.begin({
            "model": {"id": "m", "weights": "int4"}, "device": "cpu", "prompt": {"text": "one\ntwo"},
            "variants": [{"letter": "A", "spec": "dense", "error": None}],
        })
    assert main(["runs", "list", "--db", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{run_id}  interrupted {'one two':<32}  dense"]
    assert main(["runs", "show", run_id, "--db", str(path)]) == 0
    assert "the lab ended before this run did" in capsys.readouterr().out


@pytest.mark.model
def test_the_real_thing(tmp_path):
    prompt = tmp_path / "p.txt"
    prompt.write_text("The keeper of the lighthouse wrote one line each evening. " * 8 + "He wrote that", encoding="utf-8")
    command = [
        sys.executable, "-m", "lab", "run", "--model", "default", "--prompt-file", str(prompt), "--variant", "dense",
        "--variant", "h2o(budget=0.25)+kivi(bits=2)", "--max-new-tokens", "8", "--seed", "0",
        "--json", str(tmp_path / "out.json"), "--db", str(tmp_path / "r.duckdb"), "--device", "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    dense, small = out["variants"]
    assert dense["kv_bytes"] == dense["kv_bytes_dense"] and small["kv_bytes"] < 0.35 * dense["kv_bytes"]
    assert dense["text"].strip() and small["kl_mean"] > 0 and "SmolLM2" in out["model"]["id"]
