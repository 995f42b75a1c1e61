"""Random eviction, the control."""

import torch
from drive import Drive

from lab.techniques.random_score import mixed


def test_numbers_are_uniform_and_do_not_resemble_each_other():
    pos, head = torch.arange(5000).view(1, 1, -1), torch.arange(4).view(1, -1, 1)
    x = torch.stack([mixed(pos, head, layer, seed) for layer in (1, 2) for seed in (1, 2)]).flatten(0, 2)
    assert abs(float(x.mean()) - 0.5) < 0.01 and abs(float(x.var()) - 1 / 12) < 0.005
    c = torch.corrcoef(x)
    assert float((c - torch.eye(len(c))).abs().max()) < 0.06
    assert float(torch.corrcoef(torch.stack([x[0, 1:], x[0, :-1]]))[0, 1].abs()) < 0.05


def test_the_seed_decides():
    kept = []
    for seed in (0, 0, 1):
        drive = Drive("random_score(budget=15,sinks=1,window=2)", 40, prompt=40)
        drive.policy.seed = seed
        drive.feed(40)
        kept.append([drive.stored(h)[0] for h in range(2)])
    assert kept[0] == kept[1] != kept[2] and kept[0][0] != kept[0][1]
