"""The ledger: sums agree with the cost model for dense, StreamingLLM, KIVI, Quest; no technique hides what it stores."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from lab.measure import cost
from lab.measure.ledger import Ledger
from techniques.reading import facts, run


@pytest.mark.parametrize("spec", ["dense", "streaming_llm(budget=0.25)", "kivi(residual=32)", "quest(dense_layers=0)", "int_codes"])
def test_a_step_agrees_with_the_cost_model(spec):
    session, _ = run(spec, prompt=150, steps=9)
    ledger = Ledger()
    ledger.note(session.cache, session.last_ms)
    found, total = cost.predict(facts(), spec, 150, 159), ledger.totals(0)
    assert total["stored_bytes"] == found.kv_bytes
    assert total["entries"] == found.entries
    assert total["probe_bytes"] == sum(x.probe_bytes for x in found.per_layer)
    if "streaming" not in spec:  # which reads its newest entry before the oldest one leaves
        assert total["read_bytes"] == pytest.approx(sum(x.read_bytes for x in found.per_layer))
        assert total["flops"] == pytest.approx(sum(x.flops for x in found.per_layer))


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
        held = sum(s.rows.live_bytes for s in (*layer.keys_side, *layer.values_side)) + (layer.meta.live_bytes if layer.meta else 0)
        state = sum(x.numel() * x.element_size() for x in layer.state.values() if isinstance(x, torch.Tensor))
        assert layer.live_bytes == held + state
