"""KeyDiff and key norm (eviction sheet 9)."""

import torch
from drive import Drive
from tiny_models import llama, tokens

from lab.engine.session import Session


def test_duplicates_of_the_common_key_go_first():
    drive = Drive("keydiff(budget=20,window=4)", 40, prompt=40)
    common = torch.randn(16, generator=torch.Generator().manual_seed(5))
    copies = list(range(5, 25))
    drive.k[:, :, copies] = common
    drive.feed(40)
    for h in range(2):
        assert not set(drive.stored(h)[0]) & set(copies)


def test_keydiff_ignores_the_length_of_keys():
    drives = [Drive("keydiff(budget=15,window=3)", 40, prompt=40) for _ in range(2)]
    drives[1].k = drives[1].k * torch.rand(1, 2, 40, 1, generator=torch.Generator().manual_seed(6)).add(0.1)
    for d in drives:
        d.feed(40)
    assert [drives[0].stored(h)[0] for h in range(2)] == [drives[1].stored(h)[0] for h in range(2)]


def test_block_mode_never_holds_more_than_budget_and_block():
    ids, most = tokens(200, seed=7).tolist(), []
    session = Session(llama(), "keydiff(budget=40,window=8,block=32)", chunk=512)
    for _ in session.prefill_steps(ids):
        most.append(max(layer.longest for layer in session.cache.lab_layers))
    assert max(most) <= 40 and session.cache.lab_layers[0].seen == 200
    assert all(set(range(192, 200)) <= set(layer.positions()[0, 0].tolist()) for layer in session.cache.lab_layers)


def test_key_norm_keeps_the_smallest_keys():
    drive = Drive("knorm(budget=12,window=2)", 30, prompt=30)
    drive.feed(30)
    for h in range(2):
        rank = drive.k[0, h, :30].norm(dim=-1)
        rank[28:] = -1
        assert set(drive.stored(h)[0]) == set(rank.topk(12, largest=False).indices.tolist())
