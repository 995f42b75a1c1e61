"""`predict` on configurations alone: any model, any machine, nothing loaded."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("duckdb")

from lab.cli import main
from lab.measure import cost
from tiny_models import config_of


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but a configuration: 3 layers, 4 heads on 2 KV heads of 16 channels, 512 tokens of context."""
    config_of("llama", head_dim=16).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def predict(folder, *more):
    return main(["predict", "--model", str(folder), "--prompt", "100", "--new", "20", *more])


def test_figures_are_the_cost_models(folder, capsys):
    assert predict(folder, "--variant", "dense", "--variant", "kivi", "--machine", "T4", "--sequences", "3", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["machine"]["name"] == "NVIDIA T4" and out["model"]["parameters"] > 10_000 and out["model"]["context"] == 512
    dense, kivi = out["variants"]
    assert dense["kv_bytes"] == 3 * 2 * 2 * 16 * 2 * 120 == dense["kv_bytes_dense"]
    said = cost.predict(out["model"], "kivi", 100, 120, 2, intensity=out["machine"]["intensity"], batch=3,
                        weight_bytes=2 * out["model"]["parameters"])
    assert kivi["kv_bytes"] == said.kv_bytes and kivi["eflops"] == pytest.approx(said.eflops) and kivi["flops"] == said.flops
    assert dense["works"]["decode attention"]["intensity"] == pytest.approx(2 * 2 / 2)
    assert dense["runs_out_after"] is None and dense["sequences_that_fit"] == int(
        (16e9 - dense["weights"]) // (3 * 2 * 2 * 16 * 2 * 512))


def test_a_table_that_says_it_is_predicted(folder, capsys):
    assert predict(folder / "config.json", "--variant", "quest(budget=0.25,dense_layers=0)") == 0
    text = capsys.readouterr().out
    assert "predicted, nothing was run" in text and "this machine" in text and "quest(" in text and "fits" in text


def test_the_table_of_machines(capsys):
    assert main(["predict", "--machine", "list"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("this machine") and "H100" in text and "https://" in text


@pytest.mark.parametrize("more, words", [
    (["--machine", "abacus"], "no machine"), (["--variant", "h3o"], "Did you mean h2o"), (["--prompt", "0"], "at least 1"),
    (["--variant", "snapkv(budget=0.1)"], "must protect 32"),
    (["--model", "/nonexistent/folder"], "no configuration"), (["--model", "x.gguf"], "GGUF"),
])
def test_what_cannot_be_predicted_ends_in_a_sentence(folder, capsys, more, words):
    assert predict(folder, *more) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
