"""The cost model against the cache itself, byte for byte, and its own identities."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lab.engine.attach import attach
from lab.engine.session import Session
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.measure import cost
from lab.measure.hardware import ACCELERATORS, this_machine

FACTS = {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 64, "parameters": 1000}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    )
    return attach(LlamaForCausalLM(config).eval())


EXACT = [
    "dense", "streaming_llm(budget=0.25)", "streaming_llm(budget=40)", "streaming_llm(budget=500)", "h2o(budget=0.25)",
    "h2o(budget=1)", "kivi(bits=2)", "kivi(bits=4,residual=32)", "int_codes(bits=8)", "int_codes(bits=4,group=32)",
    "int_codes(bits=2,sinks=4)", "snapkv(budget=0.3)", "snapkv(budget=0.3)+kivi(bits=2,residual=32)",
    "pyramidkv(budget=0.3)", "h2o(budget=0.25)+int_codes(bits=4)", "streaming_llm(budget=64)+int_codes",
]


@pytest.mark.parametrize("spec", EXACT)
@pytest.mark.parametrize("prompt", [150, 300])
def test_bytes_agree_with_the_cache(model, spec, prompt):
    session = Session(model, spec, chunk=128)
    session.prefill([i % 128 for i in range(prompt)])
    for step in range(40):
        if step in (0, 1, 7, 39):
            found = cost.predict(FACTS, Stack.parse(spec), prompt, prompt + step)
            assert found.kv_bytes == session.cache.kv_bytes, (step, spec)
            assert found.entries == session.cache.entries
        session.step(torch.tensor([step]))


def test_a_sliding_layer_is_trimmed_as_predicted():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=48, max_position_embeddings=2048,
    )
    model = attach(MistralForCausalLM(config).eval())
    facts = {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "sliding_window": 48,
             "layer_types": ["sliding_attention"] * 2}
    for prompt in (30, 140, 700):
        session = Session(model, "dense")
        session.prefill([i % 64 for i in range(prompt)])
        for step in range(150):
            found = cost.predict(facts, "dense", prompt, prompt + step)
            assert found.kv_bytes == session.cache.kv_bytes, (prompt, step)
            session.step(torch.tensor([1]))


def test_hand_computed_case():
    """Two decode steps after a prompt of three, one layer, one head, d = 4, two bytes per number."""
    facts = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4}
    found = cost.predict(facts, "dense", 3, 5, element=2, intensity=10)
    assert found.kv_bytes == 2 * 5 * 4 * 2
    assert found.flops == 4 * 4 * (4 + 5)
    assert found.eflops == found.flops + 10 * 2 * 4 * 2 * (4 + 5)
    assert cost.predict(facts, "dense", 3, 5, element=2, intensity=0).eflops == found.flops


def test_trials_share_the_prompt_only_when_dense():
    facts = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4}
    one, two = (cost.predict(facts, "dense", 100, 110, trials=r, intensity=1) for r in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.eflops - two.flops < 2 * (one.eflops - one.flops)
    kept = [cost.predict(facts, "streaming_llm(budget=1)", 100, 110, trials=r, intensity=1) for r in (1, 2)]
    assert kept[1].eflops == pytest.approx(2 * kept[0].eflops)
    assert kept[0].eflops == pytest.approx(one.eflops)


def test_work_grows_with_budget_and_length():
    budgets = [cost.predict(FACTS, f"streaming_llm(budget={b})", 1000, 1200).eflops for b in (16, 64, 256, 5000)]
    assert budgets == sorted(budgets)
    assert budgets[-1] == pytest.approx(cost.predict(FACTS, "dense", 1000, 1200).eflops)
    lengths = [p.eflops for p in cost.curve(FACTS, "dense", 100, [100, 200, 400])]
    assert lengths == sorted(lengths)


def test_grouped_queries_and_narrow_codes_raise_intensity():
    mha = cost.predict({**FACTS, "kv_heads": 4}, "dense", 500, 500, weight_bytes=0)
    gqa = cost.predict(FACTS, "dense", 500, 500, weight_bytes=0)
    assert (gqa.step_flops - 2000) / gqa.step_bytes == pytest.approx(2 * (mha.step_flops - 2000) / mha.step_bytes)
    coded = cost.predict(FACTS, "int_codes(bits=4)", 500, 500, weight_bytes=0)
    assert coded.intensity > gqa.intensity


def test_bound_and_table():
    found = cost.predict(FACTS, "dense", 100, 200)
    for machine in (*ACCELERATORS, this_machine()):
        assert found.step_time_bound(machine) >= found.step_bytes / machine.bandwidth > 0
        assert machine.source and machine.intensity > 0
    assert found.to_dict()["kv_bytes"] == found.kv_bytes == found.kv_bytes_dense


def test_nonsense_is_refused():
    with pytest.raises(LabError):
        cost.predict(FACTS, "dense", 10, 5)
    with pytest.raises(LabError, match="head_dim"):
        cost.predict({"layers": 1, "heads": 1, "kv_heads": 1}, "dense", 1, 1)
