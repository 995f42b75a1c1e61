"""What a run that broke off did not sum up is told all the same, from what it wrote."""
from __future__ import annotations

import math

import pytest

from lab.measure.completed import completed
from lab.ui.components import columns

from . import fixture


def broken(tokens: int) -> tuple[dict, dict]:
    """A run that broke off after `tokens` tokens of each variant: what its last checkpoint holds, and its arrays."""
    record, arrays = fixture.record_and_arrays("20260301-000000-half")
    record["status"] = "interrupted"
    for v in record["variants"]:
        v.update(tokens=v["tokens"][:tokens], token_ids=v["token_ids"][:tokens], fidelity=v["fidelity"][:tokens],
                 finish="interrupted", first_divergence=None, kl_mean=None, top1_agreement=None, perplexity=None,
                 kv_bytes_dense=None, kv_bytes=v["tokens"][tokens - 1]["kv_bytes"])
    return record, {}


def test_where_texts_part_and_the_ratio_to_dense_follow_from_what_was_written():
    whole, half = fixture.record_and_arrays()[0], broken(14)[0]
    found = completed(half)["variants"]
    assert [v["first_divergence"] for v in found] == [v["first_divergence"] for v in whole["variants"]]
    read = len(half["prompt"]["token_ids"]) + 13
    assert [v["kv_bytes_dense"] for v in found] == [fixture.FACTS["kv_bytes_per_token"] * read] * 3
    assert half["variants"][1]["first_divergence"] is None
    assert completed(whole) == whole


def test_averages_are_those_of_the_tokens_that_were_written():
    a, b, _ = completed(broken(6)[0])["variants"]
    assert a["kl_mean"] is None and a["perplexity"] == pytest.approx(math.exp(0.45))  # log-probabilities -0.40 to -0.50
    assert b["kl_mean"] == pytest.approx(sum(row["kl"] for row in b["fidelity"]) / 6)
    assert b["top1_agreement"] == sum(row["agree"] for row in b["fidelity"]) / 6
    assert b["perplexity"] == pytest.approx(1 / 0.48)


def test_an_interrupted_run_is_opened_with_its_fork_and_its_ratio():
    lab = fixture.FakeLab(step_s=0)
    record, arrays = broken(14)
    lab.library.save(record, arrays)
    drawn = columns.columns(lab.shelf.get(lab.open(record["run_id"], "")).record)["cols"][1]
    assert any("fork" in piece for piece in drawn["own"]) and "first differs at token" in drawn["note"]
    assert "0.09×" in drawn["strip"]


@pytest.mark.parametrize("model", [{}, {"dtype": "float32", "layers": "many"}, None])
def test_a_record_that_does_not_say_its_model_keeps_its_gap(model):
    record = {**broken(3)[0], "model": model}
    assert completed(record)["variants"][0]["kv_bytes_dense"] is None
