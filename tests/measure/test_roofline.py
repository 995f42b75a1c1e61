"""The roofline's points by hand: intensity of decode attention, the ridge, weights shared by sequences, and what fits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import catalogue_prefill
from lab.measure import cost, roofline
from lab.measure.hardware import ACCELERATORS, Machine
from lab.measure.roofline import Work
from tiny_models import tokens

CARD = Machine("card", 100e12, 1e12, 10e9, "bfloat16", "a sheet")
HERE = Machine("this machine", 1e11, 1e10, 8e9, "float32", "measured")
FACTS = {"layers": 2, "heads": 8, "kv_heads": 2, "head_dim": 64, "parameters": 1_000_000, "dtype": "float32", "weights": "int4",
         "context": 4096}


def test_decode_attention_does_two_flops_per_query_head_and_byte_of_a_group():
    """Intensity is 2G/bytes (cost_models.md): 4 query heads per KV head, 2 bytes per number."""
    found = roofline.works(FACTS, "dense", 100, 100, CARD)["decode attention"]
    assert found.intensity == pytest.approx(2 * 4 / 2)
    assert found.flops == 4 * 8 * 64 * 100 * 2 and found.bytes == 2 * 2 * 64 * 100 * 2 * 2
    assert roofline.works(FACTS, "dense", 100, 100, HERE)["decode attention"].intensity == pytest.approx(2 * 4 / 4)


def test_roof():
    assert Work(100, 10).attainable(CARD) == 10e12  # on the slope
    assert Work(200e6, 1e6).attainable(CARD) == 100e12  # under the ceiling
    assert Work(100, 1).attainable(CARD) == CARD.flops  # at the ridge
    for work in (Work(1e12, 1e12), Work(1e15, 1e12)):
        assert work.flops / work.seconds(CARD) == pytest.approx(work.attainable(CARD))
    assert Work(1.0, 0.0).intensity == 0


def test_prompt_attention_by_hand():
    n = 10
    found = roofline.works(FACTS, "dense", n, n, CARD)["prompt attention"]
    assert found.flops == 4 * 8 * 64 * (n * (n + 1) / 2) * 2
    assert found.bytes == 2 * (8 + 2) * 64 * n * 2 * 2
    whole = roofline.works(FACTS, "dense", n, n, CARD)["whole prompt"]
    assert whole.flops == found.flops + 2e6 * n and whole.bytes == found.bytes + 2e6
    long = roofline.works(FACTS, "dense", 1025, 1025, CARD)
    assert long["whole prompt"].bytes - long["prompt attention"].bytes == 3 * 2e6  # chunks of 512 rows


def test_sequences_share_the_weights_and_nothing_else():
    one, many = (roofline.works(FACTS, "dense", 100, 120, CARD, n) for n in (1, 16))
    assert many["decode attention"].intensity == pytest.approx(one["decode attention"].intensity)
    assert many["decode step"].flops == pytest.approx(16 * one["decode step"].flops)
    assert many["decode step"].bytes == pytest.approx(2e6 + 16 * one["decode attention"].bytes)
    assert many["whole prompt"] == one["whole prompt"]


def test_weights_lie_packed_here_and_in_the_cards_format_there():
    assert roofline.weight_bytes(FACTS, HERE) == 625_000 and roofline.weight_bytes(FACTS, CARD) == 2_000_000
    assert roofline.weight_bytes({**FACTS, "weights": "float32"}, HERE) == 4_000_000
    assert roofline.element_of(FACTS, HERE) == 4 and roofline.element_of(FACTS, CARD) == 2


@pytest.mark.parametrize("spec", ["dense", "streaming_llm(budget=64)", "kivi(bits=2)", "quest(budget=0.25,dense_layers=0)"])
def test_decode_work_is_the_cost_models(spec):
    found = roofline.works(FACTS, spec, 500, 520, CARD)
    said = cost.predict(FACTS, spec, 500, 520, 2, weight_bytes=2e6)
    assert (
        found["decode step"].flops == pytest.approx(said.step_flops)
        and found["decode step"].bytes == pytest.approx(said.step_bytes)
    )
    assert cost.stored(FACTS, spec, 500, 520, 2) == said.kv_bytes
    assert found["decode step"].seconds(CARD) == pytest.approx(said.step_time_bound(CARD))


def test_pairs_of_a_band_are_those_that_are_read():
    for rows, sinks, window in ((30, 4, 10), (30, 0, 7), (5, 4, 10), (30, 40, 3), (30, 25, 10), (1, 0, 1)):
        i, j = torch.arange(rows)[:, None], torch.arange(rows)
        assert cost.band_pairs(rows, sinks, window) == int(((j <= i) & ((j < sinks) | (i - j < window))).sum())


def test_predicted_prompt_work_is_what_a_prompt_reads():
    from techniques.reading import facts, model

    for spec in ("dense", "a_shape(sinks=3,window=20)", "swat(window=16)", "a_shape(window=400)"):
        share = catalogue_prefill.sparse(model(), tokens(90)[None], spec, 0)[2]
        dense, mine = (cost.prompt_work(facts(), s, 90)[0] for s in ("dense", spec))
        assert mine / dense == pytest.approx(share), spec


def test_where_memory_runs_out():
    per_token = 2 * 2 * 64 * 2 * 2
    small = Machine("small", 1e12, 1e11, 2e6 + 1000 * per_token + 1, "bfloat16", "a sheet")
    found = roofline.room(FACTS, "dense", small)
    assert (found.weights, found.kv) == (2e6, 4096 * per_token) and found.longest == 1000 and found.most == 0
    assert roofline.room(FACTS, "dense", small, sequences=10).longest == 100
    assert roofline.memory(FACTS, "dense", [10, 20], small, 3) == [2e6 + 30 * per_token, 2e6 + 60 * per_token]
    kept = roofline.room(FACTS, "streaming_llm(budget=128)", small)
    assert kept.longest is None and kept.most >= 7
    roomy = roofline.room(FACTS, "dense", CARD)
    assert roomy.longest is None and roomy.most == int((10e9 - 2e6) // (4096 * per_token))
    tiny = Machine("tiny", 1e12, 1e11, 1e6, "bfloat16", "a sheet")
    assert roofline.room(FACTS, "dense", tiny).longest == 0 and roofline.room(FACTS, "dense", tiny).most == 0
    assert roofline.room({**FACTS, "context": None}, "dense", CARD) is None
    assert roofline.room(FACTS, "dense", Machine("?", 1.0, 1.0, 0.0, "bfloat16", "a sheet")) is None


def test_every_row_of_the_table_says_where_it_is_from():
    for machine in ACCELERATORS:
        assert machine.source.startswith(("https://", "NVIDIA Ada")) and machine.format in cost.ELEMENT
        assert 10 < machine.intensity < 1000 and machine.memory >= 16e9
