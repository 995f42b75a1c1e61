"""GQA conversion: the sheet's Test line, and grouping by likeness."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch

from lab.engine.attach import attach
from lab.engine.session import Session
from lab.errors import LabError
from lab.measure.calibrate import calibrate
from lab.techniques.gqa_conversion import GQAConversion, alike
from techniques.reading import context, differs, random, run, same


def test_conversion_to_the_same_number_is_dense_and_halves_the_cache_otherwise():
    same("gqa_conversion(kv_heads=2)")
    differs("gqa_conversion(kv_heads=1)")
    ledger_agrees_bytes = run("gqa_conversion(kv_heads=1)")[0].cache.kv_bytes
    assert 2 * ledger_agrees_bytes == run("dense")[0].cache.kv_bytes
    same("dense")  # reversible: nothing was left behind


def test_identical_heads_merge_without_loss():
    k, v, q = random(1, 2, 9, 8).repeat_interleave(2, 1), random(1, 2, 9, 8, seed=1).repeat_interleave(2, 1), random(1, 8, 9, 8)
    for method in ("mean", "first", "random"):
        technique = GQAConversion(kv_heads=2, method=method)
        _, k2, v2 = technique.move(context(q, k, v), q, k, v)
        torch.testing.assert_close(k2.repeat_interleave(2, 1), k)
        torch.testing.assert_close(v2.repeat_interleave(2, 1), v)


def test_conversion_equals_averaged_weights():
    """Averaging projections gives what averaging their outputs gives."""
    import copy

    model = attach(copy.deepcopy(tiny_models.build("llama", head_dim=16)))
    got = Session(model, "gqa_conversion(kv_heads=1)").prefill(list(range(2, 40)))
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("k_proj", "v_proj"):
                w = getattr(layer.self_attn, name).weight
                w.copy_(w.view(2, 16, -1).mean(0).repeat(2, 1))
    torch.testing.assert_close(got, Session(model, "dense").prefill(list(range(2, 40))), atol=1e-4, rtol=1e-4)


def twins(model):
    """Key and value heads 0 and 2, and 1 and 3, of four are the same."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("k_proj", "v_proj"):
                w = getattr(layer.self_attn, name).weight.view(4, 16, -1)
                w[2:] = w[:2].clone()
    return model


def test_similar_heads_are_found_and_the_permutation_is_lossless(tmp_path):
    """Heads that are the same merge without loss once they are put side by side; as neighbours others would merge."""
    model = attach(twins(tiny_models.build("llama", head_dim=16, num_attention_heads=8, num_key_value_heads=4)))
    model.lab_facts = SimpleNamespace(id="twins", revision="1", weights="float32")
    found = calibrate("gqa_conversion", SimpleNamespace(model=model, tokenizer=None, facts=model.lab_facts))
    assert (found.tensors["similarity"][:, 0, 2] > 0.99).all()
    path = found.save(tmp_path / "twins.safetensors")
    ids = tiny_models.tokens(46).tolist()

    def rows(spec):
        session = Session(model, spec, chunk=17)
        return session, torch.cat([session.prefill(ids[:40]), *(session.step(torch.tensor([t])) for t in ids[40:])])

    want = rows("dense")[1]
    session, got = rows(f"gqa_conversion(kv_heads=2,grouping=similar,calibration={path})")
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert all(layer.heads == 2 for layer in session.cache.lab_layers)
    assert (rows("gqa_conversion(kv_heads=2)")[1] - want).abs().max() > 1e-2
    torch.testing.assert_close(rows(f"gqa_conversion(kv_heads=4,grouping=similar,calibration={path})")[1], want)
    assert torch.isfinite(rows(f"gqa_conversion(kv_heads=1,grouping=similar,calibration={path})+h2o(budget=20)")[1]).all()


def test_greedy_grouping():
    similarity = torch.eye(6)
    for a, b, x in ((0, 4, 0.9), (1, 3, 0.5), (4, 5, 0.8), (0, 5, 0.7)):
        similarity[a, b] = similarity[b, a] = x
    assert alike(similarity, 2).tolist() == [0, 4, 1, 3, 2, 5]
    assert alike(similarity, 3).tolist() == [0, 4, 5, 1, 2, 3]
    assert alike(similarity, 1).tolist() == list(range(6)) and sorted(alike(similarity, 6).tolist()) == list(range(6))


def test_a_number_that_does_not_divide_is_refused():
    with pytest.raises(LabError, match="divisor"):
        run("gqa_conversion(kv_heads=3)")
