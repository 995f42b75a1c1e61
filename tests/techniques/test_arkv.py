"""ARKV (quantisation sheet 6)."""

import pytest
import torch
from tiny_models import llama, tokens

from lab.engine.session import Session
from lab.engine.tiers import held_bits
from lab.techniques.arkv import Arkv

SHARP = "arkv(budget=60,window=8,tau1=0.1,tau2=0.1,tau3=0.1)"  # layers of a tiny model are alike: make them differ
IDS = tokens(160, seed=12).tolist()


def run(spec: str, prompt: int = 120, steps: int = 0, **more) -> Session:
    session = Session(llama(), spec, chunk=50, **more)
    session.prefill(IDS[:prompt])
    for t in IDS[prompt : prompt + steps]:
        session.step(torch.tensor([t]))
    return session


def test_within_the_budget_nothing_changes():
    dense, arkv = run("dense", 60, 10), run("arkv(budget=70,window=8)", 60, 10)
    assert all(layer.bits_count() == {16: 140} for layer in arkv.cache.lab_layers)
    for a, b in zip(dense.cache.lab_layers, arkv.cache.lab_layers):
        assert torch.allclose(a.all_keys(), b.all_keys(), atol=1e-5)


def test_the_prompt_is_evicted_and_the_first_overflow_splits_the_rest():
    before = run("arkv(budget=60,window=8)")
    assert all(layer.counts == [60, 60] and layer.bits_count() == {16: 120} for layer in before.cache.lab_layers)
    after = run("arkv(budget=60,window=8)", steps=1)
    for layer in after.cache.lab_layers:
        left = 8 + int(0.75 * (61 - 8))
        ratio = float(layer.state["arkv_ratio"][0])
        originals = max(round(ratio * 52) - 8, 0) + 8
        assert layer.counts == [left, left]
        assert layer.exact_k.rows.lens == [min(originals, left)] * 2
        assert layer.bits_count().get(8, 0) == 2 * max(0, left - originals)


def test_partition_is_disjoint_and_exhaustive_and_entries_only_narrow():
    session = run("arkv(budget=60,window=8)", record=True)
    width: dict = {}
    for t in IDS[120:]:
        session.step(torch.tensor([t]))
        for layer in session.cache.lab_layers:
            pos, bits = layer.positions()[0], held_bits(layer)[0]
            for h, n in enumerate(layer.counts):
                now = dict(zip(pos[h, :n].tolist(), bits[h, :n].tolist()))
                assert len(now) == n <= 61
                recent = {p for p in range(layer.seen - 8, layer.seen)}
                assert all(now[p] == 16 for p in recent)
                for p, b in now.items():
                    assert b in (8, 16) and b <= width.get((layer.index, h, p), 16)
                    width[layer.index, h, p] = b


def test_the_largest_ratio_is_one_and_tempers_flatten():
    ratios = [float(layer.state["arkv_ratio"][0]) for layer in run("arkv(budget=60,window=8)").cache.lab_layers]
    tuned = [float(layer.state["arkv_ratio"][0]) for layer in run("arkv(budget=60,window=8,tuned=true)").cache.lab_layers]
    assert max(ratios) == max(tuned) == 1 and min(tuned) > min(ratios) > 0


def test_quality_is_the_sheets_formula():
    """OQ = E^(1/t1) U^(1/t2) Q^(1/t3), by hand from the attention of an eager model."""
    from tiny_models import build

    technique = Arkv(window=8, tau1=2.0, tau2=3.0, tau3=4.0)
    found = []

    class Look(Arkv):
        def quality(self, ctx):
            found.append(technique.quality(ctx))
            return found[-1]

    from lab.engine.stack import Stack

    session = Session(llama(), Stack((Look(budget=60, window=8),)), chunk=50)
    session.prefill(IDS[:120])
    with torch.no_grad():
        weights = build("llama", head_dim=16, max_position_embeddings=2048)(
            torch.tensor([IDS[:120]]), output_attentions=True
        ).attentions
    for got, p in zip(found, weights):
        a = p[0, :, -8:, :112].double()
        entropy = -(a * a.clamp_min(1e-300).log()).sum()
        centred = a - a.mean(1, keepdim=True)
        m2, m4 = centred.square().mean(1), centred.pow(4).mean(1)
        spiky = torch.where(m2 > 1e-24, m4 / m2.square().clamp_min(1e-300), 0.0).sum()
        want = entropy ** (1 / 2) * m2.sum() ** (1 / 3) * spiky ** (1 / 4)
        assert float(got) == pytest.approx(float(want.log()), rel=1e-3)


@pytest.mark.parametrize("spec", ["arkv+snapkv(budget=60,window=8)", "arkv+h2o(budget=60)+int_codes(bits=4)",
                                  SHARP + "+kivi(group=16,residual=16,bits=4)", SHARP + "+rotated(bits=4)",
                                  SHARP + "+kvquant(bits=4)", SHARP + "+cam"])
def test_other_scores_codes_and_merges(spec):
    session = run(spec, steps=20)
    assert torch.isfinite(session.step(torch.tensor([3]))).all()
    assert any(len(layer.bits_count()) > 1 for layer in session.cache.lab_layers)


def test_the_score_adds_variance_and_asks_the_newest_row_while_decoding():
    plain, bonus = run("arkv_score(budget=40,window=8,gamma=0)"), run("arkv_score(budget=40,window=8)")
    snap = run("snapkv(budget=40,window=8)")
    places = [[layer.positions().tolist() for layer in s.cache.lab_layers] for s in (plain, snap, bonus)]
    assert places[0] == places[1] != places[2]
    longer = run("arkv_score(budget=40,window=8)", steps=10)
    assert all(layer.counts == [40, 40] for layer in longer.cache.lab_layers)
