"""ThinK (eviction sheet 13)."""

import torch
from drive import Drive
from tiny_models import llama, tokens

from lab.engine.session import Session


def pruned(spec: str, change=None) -> Drive:
    drive = Drive(spec, 50, prompt=40)
    if change:
        change(drive)
    drive.feed(40)
    return drive


def test_a_zero_channel_is_lossless():
    """Channels that are zero in every key are dropped first, and nothing changes."""
    def quiet(d):
        d.k[..., [2, 5, 11]] = 0

    a, b = pruned("think(prune=0.19,window=8)", quiet), pruned("dense", quiet)
    assert a.layer.coded_k[0].codec.index.shape[-1] == 13
    for _ in range(5):
        assert torch.allclose(a.feed(1), b.feed(1), atol=1e-5)


def test_logit_error_is_bounded_by_what_was_dropped():
    drive = pruned("think(prune=0.5,window=8)")
    coded = drive.layer.coded_k[0]
    kept = coded.codec.index
    q, k = drive.q[:, ::2, 40:41], drive.k[:, :, :32]
    got, true = coded.logits(q), q @ k.mT
    for h in range(2):
        gone = [c for c in range(16) if c not in kept[h].tolist()]
        bound = (q[0, h, 0, gone].abs() * k[0, h][:, gone].abs()).sum(-1)
        assert bool(((got - true)[0, h, 0].abs() <= bound + 1e-5).all())
    assert torch.equal(coded.decode().bool().any(2)[0].nonzero()[:, 1].view(2, -1), kept)


def test_the_least_important_channels_go():
    drive = pruned("think(prune=0.25,window=8)")
    q = drive.q[0, :, 32:40].square().mean(1).view(2, 2, 16).mean(1)
    score = q * drive.k[0, :, :40].square().mean(1)
    assert torch.equal(drive.layer.coded_k[0].codec.index, score.topk(12).indices.sort().values)


def test_pairs_are_dropped_together():
    index = pruned("think(prune=0.3,pairs=true)").layer.coded_k[0].codec.index
    assert all(set(row) == {c % 8 for c in row} | {c % 8 + 8 for c in row} for row in index.tolist())


def test_recent_keys_stay_whole_values_too_and_bytes_are_predicted():
    drive = pruned("think(window=10)")
    for _ in range(6):
        drive.feed(1)
    layer = drive.layer
    assert layer.exact_k.rows.lens == [10, 10] and layer.exact_v.rows.lens == [46, 46] and not layer.coded_v
    technique = drive.policy.encoder
    assert sum(s.live_bytes for s in layer.keys_side) == 2 * technique.coded_bytes("key", 46, 16, 4)
    assert layer.exact_v.live_bytes == 2 * technique.coded_bytes("value", 46, 16, 4) == 2 * 46 * 16 * 4


def test_a_prompt_shorter_than_the_window_is_pruned_later():
    session = Session(llama(), "think(window=16)", chunk=None)
    session.prefill(tokens(10).tolist())
    for t in tokens(12, seed=2).tolist():
        session.step(torch.tensor([t]))
    assert session.cache.lab_layers[0].coded_k[0].rows.lens == [6, 6]
