"""TOVA (eviction sheet 3)."""

import torch
from drive import Drive


def test_it_has_no_fixed_window_or_sink():
    """Scores constructed so that the newest row ignores token 0: it goes first, one set for all heads."""
    drive = Drive("tova(budget=19)", 24, prompt=20)
    drive.k[:, :, 0] = -drive.q[:, :2, 19] * 3
    drive.q[:, :, 19] = drive.q[:, :1, 19]
    drive.k[:, :, 0] = -drive.q[:, :1, 19]
    drive.feed(20)
    assert 0 not in drive.stored(0)[0] and drive.stored(0)[0] == drive.stored(1)[0]
    assert drive.layer.counts == [19, 19]


def test_the_newest_can_be_protected():
    """A newest token that nobody looks at, itself included, leaves at once unless it is protected."""
    for spec, stays in (("tova(budget=10)", False), ("tova(budget=10,newest=true)", True)):
        drive = Drive(spec, 12, prompt=11)
        drive.q[:, :, 10] = drive.q[:, :1, 10]
        drive.k[:, :, 10] = -2 * drive.q[:, :1, 10]
        drive.feed(11)
        assert (10 in drive.stored(0)[0]) == stays


def test_scores_average_all_heads_of_the_layer():
    drive = Drive("tova(budget=9)", 12, prompt=11)
    drive.feed(11)
    s = torch.einsum("hd,hjd->hj", drive.q[0, :, 10], drive.k[0].repeat_interleave(2, 0)[:, :11]) * drive.scale
    mean = s.softmax(-1).mean(0)
    assert set(drive.stored(0)[0]) == set(mean.topk(9).indices.tolist())
    drive.feed(1)
    assert drive.layer.counts == [9, 9] and drive.stored(0)[0] == drive.stored(1)[0]
