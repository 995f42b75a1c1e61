"""Don't Waste Bits (quantisation sheet 5)."""

import pytest
import torch
from tiny_models import llama, tokens

from lab.engine.session import Session
from lab.engine.tiers import held_bits
from lab.techniques import dwb

IDS = tokens(160, seed=13).tolist()


def run(spec: str, steps: int = 0, **more) -> Session:
    session = Session(llama(), spec, chunk=50, **more)
    session.prefill(IDS[:120])
    for t in IDS[120 : 120 + steps]:
        session.step(torch.tensor([t]))
    return session


def mean_bits(session: Session) -> float:
    counts = session.cache.lab_layers[0].bits_count()
    return sum(b * n for b, n in counts.items()) / sum(counts.values())


def test_mean_bits_follow_the_target_and_stay_in_the_set():
    means = []
    for target in (2, 3, 4, 6, 9, 16):
        session = run(f"dwb(target={target})")
        assert set(session.cache.lab_layers[0].bits_count()) <= {2, 4, 8, 16}
        means.append(mean_bits(session))
        assert means[-1] <= target + 1e-6
    assert means == sorted(means) and means[0] == 2 and means[-1] == 16


def test_all_sixteen_is_dense_and_all_two_is_two_bit_codes():
    outs = {
        spec: run(spec, 8).step(torch.tensor([4]))
        for spec in ("dense", "dwb(target=16)", "dwb(target=2,interval=1)", "int_codes(bits=2)")
    }
    assert torch.allclose(outs["dense"], outs["dwb(target=16)"], atol=1e-4)
    low = run("dwb(target=2,interval=1)", 8).cache.lab_layers[0]
    assert low.bits_count() == {2: 254, 16: 2}  # the newest token stays exact one step


def test_the_price_is_monotone():
    scores = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    net = dwb.Controller({})
    means = [float(net.choose(scores, price).float().mean()) for price in (-50, -1, -0.3, 0, 0.3, 1, 50)]
    assert means == sorted(means, reverse=True) and means[0] == 16 and means[-1] == 2


def test_one_tag_per_token_for_all_heads_and_layers_and_only_narrower():
    session, before = run("dwb(target=5,interval=4)"), {}
    for t in IDS[120:]:
        session.step(torch.tensor([t]))
        maps = []
        for layer in session.cache.lab_layers:
            pos, bits = layer.positions()[0], held_bits(layer)[0]
            maps += [dict(zip(pos[h].tolist(), bits[h].tolist())) for h in range(2)]
        assert all(m == maps[0] for m in maps) and len(maps[0]) == session.cache.lab_layers[0].seen
        assert all(b <= before.get(p, 16) for p, b in maps[0].items())
        assert sum(b == 16 for p, b in maps[0].items() if p >= 120) <= 4 + 40
        before = maps[0]


def test_features():
    ids = torch.tensor([[3, 3, 5, 3, 7]])
    assert torch.allclose(dwb.rarity(ids, ids[:, -2:]), torch.tensor([[1 - 3 / 5, 1 - 1 / 5]]))
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        entropy, top = dwb.next_token(llama(), hidden)
        p = llama().lm_head(hidden).softmax(-1)
    assert torch.allclose(top, p.amax(-1), atol=1e-5)
    assert torch.allclose(entropy, -(p * p.clamp_min(1e-30).log()).sum(-1), atol=1e-4)


def test_row_variance_is_that_of_the_attention_rows():
    from tiny_models import build

    found = []

    class Tap:
        def add(self, ctx, handle):
            found.append(dwb.row_variance(ctx))

    session = Session(llama())
    steps = session.prefill_steps(IDS[:60])
    from lab.engine.cache import LabCache

    cache = LabCache(llama())
    cache.lab_layers[2].tap = Tap()
    with torch.no_grad():
        llama()(torch.tensor([IDS[:60]]), past_key_values=cache)
        p = build("llama", head_dim=16, max_position_embeddings=2048)(
            torch.tensor([IDS[:60]]), output_attentions=True
        ).attentions[2]
    for i in (0, 7, 59):
        row = p[0, :, i, : i + 1].double()
        want = ((row.square().sum(-1) * (i + 1) - 1).clamp_min(0)).log1p().mean()
        assert float(found[0][0, i]) == pytest.approx(float(want), rel=1e-3, abs=1e-5)
    steps.close()


@pytest.mark.parametrize("spec", [
    "dwb+snapkv(budget=60)", "dwb+h2o(budget=60)+cam", "dwb(target=5)+rotated", "dwb(target=5)+kivi(group=16,residual=16)",
])
def test_other_slots_combine(spec):
    session = run(spec, 20)
    assert torch.isfinite(session.step(torch.tensor([3]))).all()
    assert len(session.cache.lab_layers[0].bits_count()) > 1


def test_the_shipped_controller_is_small_and_has_the_sheets_shape():
    parts = dwb.controller().parts
    assert [tuple(parts[n].shape) for n in ("w0", "w1", "w2")] == [(4, 128), (128, 128), (128, 4)]
    assert dwb.ASSET.stat().st_size < 40_000
