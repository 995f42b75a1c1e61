"""VATP (eviction sheet 7)."""

import pytest
import torch
from drive import Drive
from tiny_models import llama, tokens

from lab.engine.session import Session
from lab.engine.stack import Stack


def mass_of(drive: Drive, rows: int) -> torch.Tensor:
    """Attention received, [Hk, N], over the first `rows` causal rows."""
    k = drive.k[0, :, :rows].repeat_interleave(2, 0)
    s = torch.einsum("hid,hjd->hij", drive.q[0, :, :rows], k) * drive.scale
    p = s.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf).softmax(-1)
    return p.unflatten(0, (2, 2)).sum((1, 2)), p


def test_multiply_then_accumulate_equals_accumulate_then_multiply():
    drive = Drive("vatp(budget=20,first=2,recent=0.3)", 30, prompt=30)
    drive.feed(30)
    mass, p = mass_of(drive, 30)
    size = drive.v[0].abs().sum(-1)[:, :30]
    first = torch.einsum("hgij,hj->hj", p.unflatten(0, (2, 2)), size)
    assert torch.allclose(first, mass * size, rtol=1e-5)
    for h in range(2):
        rank = (mass * size)[h].clone()
        rank[:2] = rank[24:] = torch.inf
        assert set(drive.stored(h)[0]) == set(rank.topk(20).indices.tolist())


def test_equal_norms_give_the_base_ranking():
    """Values of one size: VATP keeps what H2O keeps under the same protection."""
    drives = [Drive(s, 40, prompt=40) for s in ("vatp(budget=16,first=0)", "h2o(budget=16)")]
    for d in drives:
        d.v = d.v / d.v.abs().sum(-1, keepdim=True)
        d.feed(40)
    assert [drives[0].stored(h)[0] for h in range(2)] == [drives[1].stored(h)[0] for h in range(2)]


def test_scissorhands_mode_averages_the_last_rows():
    drive = Drive("vatp(budget=20,first=1,mode=scissorhands,rows=8)", 50, prompt=50)
    drive.feed(50)
    _, p = mass_of(drive, 50)
    score = p.unflatten(0, (2, 2)).mean(1)[:, -8:].mean(1) * drive.v[0].abs().sum(-1)
    for h in range(2):
        rank = score[h].clone()
        rank[:1] = rank[40:] = torch.inf
        assert set(drive.stored(h)[0]) == set(rank.topk(20).indices.tolist())
    assert not Stack.parse("vatp(mode=scissorhands)").one("score").evicts_in_decode


def test_output_projection_measures_the_value_after_it():
    """`wo` scores with the mean over the group of |W_o^h v|_1, kept up to date while decoding."""
    ids = tokens(70, seed=3).tolist()
    session = Session(llama(), "vatp(budget=40,first=2,wo=true)", chunk=16)
    session.prefill(ids[:60])
    for t in ids[60:]:
        session.step(torch.tensor([t]))
    layer = session.cache.lab_layers[1]
    weight = llama().model.layers[1].self_attn.o_proj.weight.detach()  # [D, Hq*d]
    v = layer.all_values()[0]
    want = torch.stack([
        sum((v[h] @ weight[:, (2 * h + g) * 16 : (2 * h + g + 1) * 16].T).abs().sum(-1) for g in range(2)) / 2 for h in range(2)
    ])
    assert torch.allclose(layer.attribute("value_size")[0], want, rtol=1e-4)


@pytest.mark.model
def test_protection_keeps_the_sink_on_the_default_model(default_model):
    """The sheet says that without `first` token 0 leaves, and asks to report it (-s): here it stays in all 90 heads."""
    from lab.engine.sample_text import prose

    loaded = default_model
    ids = loaded.tokenizer(prose("measure"), add_special_tokens=False)["input_ids"][:300]
    session = Session(loaded.model, "vatp(budget=0.2,first=0,recent=0.5)")
    session.prefill(ids)
    kept = [0 in layer.positions()[0, h, :n].tolist() for layer in session.cache.lab_layers for h, n in enumerate(layer.counts)]
    print(f"token 0 kept in {sum(kept)} of {len(kept)} heads")
    guarded = Session(loaded.model, "vatp(budget=0.2,first=4,recent=0.5)")
    guarded.prefill(ids)
    assert all(0 in layer.positions()[0, h].tolist() for layer in guarded.cache.lab_layers for h in range(3))
