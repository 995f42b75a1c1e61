"""Experiments: streams, fidelity, records, failures and cancelling, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import toy

from lab.engine.events import Failed, Fidelity, Finished, Prefilled, Progress, Token
from lab.engine.sampling import Sampling
from lab.engine.session import Session
from lab.errors import LabError
from lab.measure import experiment as experiments
from lab.measure.beliefs import Belief
from lab.measure.experiment import Experiment
from lab.measure.replay import replay
from lab.measure.request import RunRequest
from lab.measure.text import Detokeniser


@pytest.fixture(scope="module")
def loaded():
    return toy.loaded()


def run(loaded, *variants, tokens=60, new=12, **settings):
    experiment = Experiment(loaded, RunRequest(toy.prompt(tokens), variants, max_new_tokens=new, **settings))
    return experiment, list(experiment.events())


def forced(loaded, spec, ids, tokens):
    """Log-probabilities before each of `tokens`, by feeding them one at a time in a session of its own."""
    session = Session(loaded.model, spec, new_tokens=len(tokens))
    logits, out = session.prefill(ids), []
    for token in tokens:
        out.append(torch.log_softmax(logits[0], -1))
        logits = session.step(torch.tensor([token]))
    return out


def test_compiling_kernels_for_the_first_time_is_progress(loaded, monkeypatch):
    monkeypatch.setattr(Session, "compiles", property(lambda self: not self._compiled))
    _, events = run(loaded, "dense", new=3)
    texts = [e.text if isinstance(e, Progress) else type(e).__name__ for e in events]
    assert [i for i, text in enumerate(texts) if "Compiling kernels" in text] == [0, texts.index("Token") + 1]
    assert "Reading 60 prompt tokens" not in texts


def test_a_run_gives_typed_events_and_a_whole_record(loaded):
    experiment, events = run(loaded, "dense", "h2o(budget=0.3)")
    kinds = {type(e) for e in events}
    assert kinds == {Progress, Prefilled, Token, Fidelity, Finished}
    record = experiment.record
    assert record["status"] == "complete" and [v["letter"] for v in record["variants"]] == ["A", "B"]
    json.dumps(record, allow_nan=False)
    for variant in record["variants"]:
        assert len(variant["tokens"]) == len(variant["token_ids"]) > 0
        assert variant["kv_bytes"] and variant["ttft_ms"] > 0 and variant["error"] is None
        assert sum(layer["kv_bytes"] for layer in variant["layers"]) == variant["kv_bytes"]
    assert record["variants"][0]["kv_bytes"] == record["variants"][0]["kv_bytes_dense"]


def test_variants_take_turns_in_interleaved_timing(loaded):
    _, events = run(loaded, "dense", "int_codes", "snapkv(budget=0.9,window=8)")
    order = [e.variant for e in events if isinstance(e, Token)]
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    _, events = run(loaded, "dense", "int_codes", timing="clean")
    order = [e.variant for e in events if isinstance(e, Token)]
    assert order == sorted(order)


@pytest.mark.parametrize("timing", ["interleaved", "clean"])
@pytest.mark.parametrize("spec", ["h2o(budget=0.3)", "int_codes(bits=2)", "streaming_llm(budget=12)", "zerotuning(gamma=5)"])
def test_fidelity_is_that_of_feeding_the_references_tokens(loaded, spec, timing):
    experiment, events = run(loaded, "dense", spec, timing=timing)
    reference = experiment.record["variants"][0]["token_ids"]
    ours, theirs = forced(loaded, spec, experiment.ids, reference), forced(loaded, "dense", experiment.ids, reference)
    rows = [e for e in events if isinstance(e, Fidelity)]
    assert [e.index for e in rows] == list(range(len(reference)))
    for row, a, b in zip(rows, theirs, ours):
        assert row.kl == pytest.approx(Belief(a).kl_to(Belief(b)), abs=2e-5)
        assert row.agree == bool(a.argmax() == b.argmax())


def test_free_text_is_what_the_variant_writes_alone(loaded):
    spec = "h2o(budget=0.2)"
    experiment, _ = run(loaded, "dense", spec)
    alone, _ = run(loaded, spec)
    assert experiment.record["variants"][1]["token_ids"] == alone.record["variants"][0]["token_ids"]


def test_a_neutral_variant_has_no_divergence_and_no_kl(loaded):
    experiment, _ = run(loaded, "dense", "h2o(budget=1)")
    b = experiment.record["variants"][1]
    assert b["first_divergence"] is None and b["top1_agreement"] == 1 and b["kl_mean"] < 1e-6
    assert b["perplexity"] == pytest.approx(experiment.record["variants"][0]["perplexity"], rel=1e-4)


def test_sampling_is_repeatable_and_seeded(loaded):
    texts = [run(loaded, "dense", sampling=Sampling(1.0, 0, 1.0, seed))[0].record["variants"][0]["text"] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_of_one_prompt(loaded):
    experiment, events = run(loaded, "dense", "int_codes", samples=3, sampling=Sampling(1.0, seed=1))
    for variant in experiment.record["variants"]:
        assert len(variant["samples"]) == 3 and len(set(variant["samples"])) > 1
    assert {e.sample for e in events if isinstance(e, Token)} == {0, 1, 2}
    assert experiment.record["variants"][1]["kl_mean"] is not None


def test_cancel_stops_within_a_step_and_keeps_what_there_is(loaded):
    experiment = Experiment(loaded, RunRequest(toy.prompt(40), ("dense", "h2o"), max_new_tokens=200))
    seen = 0
    for event in experiment.events():
        if isinstance(event, Token):
            seen += 1
            if seen == 6:
                experiment.cancel()
    assert seen <= 8 and experiment.record["status"] == "cancelled"
    assert all(v["finish"] == "cancelled" and v["tokens"] for v in experiment.record["variants"])


def test_every_entry_of_a_layer_is_counted_at_its_width(loaded):
    experiment, _ = run(loaded, "dense", "kvquant(bits=3)", "rotated(bits=3)", "kivi(bits=2,residual=32)+h2o(budget=0.5)")
    for variant in experiment.record["variants"]:
        whole = [sum(layer["bits"].values()) for layer in variant["layers"]]
        assert whole == [sum(layer["bits"].values()) for layer in experiment.record["variants"][0]["layers"]]
    assert all(layer["bits"]["3"] > 0 for v in experiment.record["variants"][1:3] for layer in v["layers"])


@pytest.mark.parametrize("timing", ["interleaved", "clean"])
def test_cancelling_while_the_prompt_is_read_is_no_complete_run(loaded, timing):
    experiment = Experiment(loaded, RunRequest(toy.prompt(40), ("dense", "h2o"), max_new_tokens=4, timing=timing))
    for event in experiment.events():
        assert not isinstance(event, Token)
        if isinstance(event, Progress):
            experiment.cancel()
    assert experiment.record["status"] == "cancelled"
    for variant in experiment.record["variants"]:
        assert variant["finish"] == "cancelled" and variant["text"] == "" and variant["kv_bytes"] is None


def test_a_variant_that_cannot_run_is_told_and_the_others_go_on(loaded):
    experiment, events = run(loaded, "dense", "snapkv(budget=0.3,window=32)")
    failures = [e for e in events if isinstance(e, Failed)]
    assert len(failures) == 1 and "must protect" in failures[0].message
    assert experiment.record["variants"][1]["error"] == failures[0].message
    assert experiment.record["variants"][0]["finish"] == "length" and experiment.record["status"] == "partial"


def test_running_out_of_memory_ends_in_a_sentence(loaded, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(experiments.Session, "prefill_steps", full)
    experiment, events = run(loaded, "dense")
    assert any(isinstance(e, Failed) and "not enough memory" in e.message for e in events)
    assert experiment.record["status"] == "failed"


def test_caches_are_freed_at_the_end_and_when_the_caller_leaves(loaded):
    experiment = Experiment(loaded, RunRequest(toy.prompt(40), ("dense", "h2o"), max_new_tokens=50))
    walk = experiment.events()
    for event in walk:
        if isinstance(event, Token):
            break
    assert any(s.session.cache is not None for s in experiment._streams)
    walk.close()
    assert experiment._streams == []


def test_arrays_tell_the_life_of_every_position(loaded):
    experiment, _ = run(loaded, "dense", "h2o(budget=20)")
    bits, death = experiment.arrays["cache/B/bits"], experiment.arrays["cache/B/death"]
    seen = 60 + len(experiment.record["variants"][1]["token_ids"]) - 1
    assert bits.shape == death.shape == (3, 2, seen)
    assert ((bits == 0) == (death < 2**31 - 1)).all()
    assert ((bits > 0).sum(-1) == 20).all()
    assert experiment.arrays["qk/A/0/q"].shape == (4, seen, 16)
    assert (experiment.arrays["cache/A/bits"] == 16).all()


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=20)", "kivi(group=16,residual=16)"])
def test_replay_sees_what_the_run_saw(loaded, spec):
    experiment, _ = run(loaded, "dense", spec)
    arrays = replay(loaded, experiment.record, "B", layers={1})
    for name, array in arrays.items():
        assert (array == experiment.arrays[name]).all(), name
    assert {n.split("/")[2] for n in arrays if n.startswith("qk/")} == {"1"}


def test_replay_asks_for_the_right_model(loaded):
    experiment, _ = run(loaded, "dense")
    experiment.record["model"]["id"] = "another"
    with pytest.raises(LabError, match="Load"):
        replay(loaded, experiment.record, "A")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(prompt="  "), "empty"),
        (dict(variants=()), "1 to 4"),
        (dict(variants=("dense",) * 5), "1 to 4"),
        (dict(variants=("h3o",)), "Did you mean h2o"),
        (dict(variants=("h2o(budget=7,window=3)",)), "no parameter"),
        (dict(variants=("h2o+snapkv",)), "both fill the score slot"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(timing="fast"), "interleaved or clean"),
    ],
)
def test_bad_requests_are_explained(settings, words):
    with pytest.raises(LabError, match=words):
        RunRequest(**{"prompt": "w3", "variants": ("dense",), **settings})


def test_a_prompt_that_does_not_fit_says_the_limit_and_can_be_cut(loaded):
    request = dict(variants=("dense",), max_new_tokens=12)
    with pytest.raises(LabError, match="600 tokens, but only 500 fit.*512.*cut the first 100 .*--truncate"):
        Experiment(loaded, RunRequest(toy.prompt(600), **request))
    cut = Experiment(loaded, RunRequest(toy.prompt(600), truncate=True, **request))
    assert len(cut.ids) == 500 and cut.ids[-1] == toy.Words()(toy.prompt(600))["input_ids"][-1]


def test_detokeniser_waits_for_whole_characters():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = Detokeniser(Bytes())
    assert [pieces.add(b) for b in "é→x".encode()] == ["", "é", "", "", "→", "x"]


def test_a_stop_seen_by_the_others_first_leaves_where_texts_part(loaded):
    """In an interleaved run the reference is filled last; one that stopped before it is compared with its text all the same."""
    experiment = Experiment(loaded, RunRequest(toy.prompt(60), ("dense", "int_codes(bits=2)"), max_new_tokens=40))
    for event in experiment.events():
        if isinstance(event, Token) and event.variant == 0 and len(experiment.record["variants"][1]["tokens"]) == 20:
            experiment.cancel()
    dense, coded = experiment.record["variants"]
    assert experiment.record["status"] == "cancelled" and len(coded["token_ids"]) >= 20
    parts = [a != b for a, b in zip(dense["token_ids"], coded["token_ids"])]
    assert True in parts and coded["first_divergence"] == parts.index(True)


def test_a_snapshot_tells_what_was_written_so_far(loaded):
    """Fidelity, where texts part and the bytes of a dense cache, as the whole run would tell them of as many tokens."""
    experiment = Experiment(loaded, RunRequest(toy.prompt(60), ("dense", "int_codes(bits=2)"), max_new_tokens=24))
    for event in experiment.events():
        if isinstance(event, Fidelity) and len(experiment.record["variants"][1]["fidelity"]) == 20:
            half, written = experiment.snapshot(), len(experiment.record["variants"][1]["tokens"])
    coded, whole = half["variants"][1], experiment.record["variants"][1]
    assert half["status"] == "interrupted" and coded["first_divergence"] == whole["first_divergence"] is not None
    assert coded["kl_mean"] == pytest.approx(sum(row["kl"] for row in whole["fidelity"][:20]) / 20)
    per_token = whole["kv_bytes_dense"] // (len(experiment.ids) + len(whole["tokens"]) - 1)
    assert coded["kv_bytes_dense"] == per_token * (len(experiment.ids) + written - 1)


def test_an_entry_whose_key_alone_is_coded_counts_half(loaded):
    """KIVI's keys are coded as soon as a block is whole, the newest 64 values stay exact."""
    session = Session(loaded.model, "kivi(bits=2,residual=64)", new_tokens=4)
    session.prefill(list(range(2, 103)))
    layer = session.cache.lab_layers[0]
    keys, values = (rows.lens[0] for rows in (layer.exact_k.rows, layer.exact_v.rows))
    assert keys < values < 101  # both of an entry are exact, both are coded, or its value alone is exact
    counts, heads = layer.bits_count(), layer.heads
    assert counts[16] + counts[2] == 101 * heads and counts[16] == (heads * (keys + values) + 1) // 2
