"""The ledger: sums agree with the cost model for dense, StreamingLLM, KIVI, Quest; no technique hides what it stores."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from lab.measure import cost
from lab.measure.ledger import Ledger
from techniques.reading import facts, run


AGREED = [
    "dense", "streaming_llm(budget=0.25)", "streaming_llm(budget=154)", "streaming_llm(budget=500)", "h2o(budget=0.25)",
    "kivi(residual=32)", "kivi(bits=4,group=16,residual=16)", "h2o(budget=0.25)+int_codes(bits=4)", "snapkv(budget=0.3)",
    "quest(dense_layers=0)", "quest(dense_layers=0)+int_codes(bits=4)",
    "block_topk(budget=0.1,local=16)", "int_codes", "a_shape", "swat(window=32)",
]


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("spec", AGREED)
def test_a_step_agrees_with_the_cost_model(spec, steps):
    """Bytes stored, bytes read to choose and to attend, and the work: measured and predicted, to the byte."""
    session, _ = run(spec, prompt=150, steps=steps)
    ledger = Ledger()
    ledger.note(session.cache, session.last_ms)
    found, total = cost.predict(facts(), spec, 150, 150 + steps), ledger.totals(0)
    assert total["stored_bytes"] == found.kv_bytes
    assert total["entries"] == found.entries
    assert total["probe_bytes"] == sum(x.probe_bytes for x in found.per_layer)
    assert round(total["read_bytes"]) == round(sum(x.read_bytes for x in found.per_layer))
    assert total["read_entries"] == sum(x.read_entries for x in found.per_layer)
    assert total["flops"] == pytest.approx(sum(x.flops for x in found.per_layer))
    assert total["pays"] == found.saves
    assert (
        total["read_fraction"] == pytest.approx(found.read_bytes_fraction)
        and total["probe_fraction"] == pytest.approx(found.probe_fraction)
    )


def test_an_evicting_step_reads_one_entry_more_than_it_keeps():
    session, _ = run("streaming_llm(budget=40)", prompt=150, steps=3)
    ledger = Ledger()
    ledger.note(session.cache)
    lanes = len(session.cache.lab_layers) * facts()["kv_heads"]
    assert ledger.totals()["entries"] == 40 * lanes and ledger.totals()["read_entries"] == 41 * lanes


def test_dense_reads_what_it_holds():
    session, _ = run("dense", prompt=40, steps=3)
    ledger = Ledger()
    ledger.note(session.cache, 1.0)
    total = ledger.totals()
    assert total["read_fraction"] == total["compression"] == 1.0 and not total["pays"]
    assert len(ledger.rows) == tiny_models.llama().config.num_hidden_layers


def test_a_selector_pays_when_choosing_is_cheap():
    ledgers = {}
    for spec in ("quest(budget=0.1,dense_layers=0)", "quest(budget=0.1,page=1,dense_layers=0)"):
        session, _ = run(spec, prompt=200, steps=2)
        ledgers[spec] = Ledger()
        ledgers[spec].note(session.cache)
    cheap, dear = (ledger.totals() for ledger in ledgers.values())
    assert cheap["pays"] and not dear["pays"]  # bounds of single tokens are twice the keys


@pytest.mark.parametrize("spec", ["quest(dense_layers=0)", "act", "qada(window=32,sinks=4)", "stable_sinks", "block_topk"])
def test_every_tensor_held_is_reported(spec):
    session, _ = run(spec, prompt=150, steps=5)
    for layer in session.cache.lab_layers:
        held = sum(s.rows.live_bytes for s in (*layer.keys_side, *layer.values_side)) + (
            layer.meta.live_bytes if layer.meta else 0)
        state = sum(x.numel() * x.element_size() for x in layer.state.values() if isinstance(x, torch.Tensor))
        assert layer.live_bytes == held + state
