"""D2O merging (eviction sheet 12)."""

import math

import torch
from drive import Drive

from lab.techniques.d2o_merge import merged


def test_weights_sum_to_one_and_a_twin_changes_nothing():
    x = torch.ones(1, 1, 5, 4) * 3
    slots, where = torch.tensor([[[0, 1]]]), torch.tensor([[[4, 4]]])
    out = merged(x, slots, where, torch.tensor([[[2.0, 1.5]]]))
    assert torch.allclose(out, x)
    x = torch.randn(1, 1, 5, 4)
    out = merged(x, slots, where, torch.tensor([[[2.0, 0.0]]]))
    assert torch.allclose(out[0, 0, 4], (math.e * x[0, 0, 4] + 2 * x[0, 0, 0]) / (math.e + 2), atol=1e-6)
    assert torch.allclose(out[0, 0, 2], x[0, 0, 2], atol=1e-6)


def test_an_impossible_threshold_is_eviction():
    a, b = (Drive(s, 50, prompt=40) for s in ("h2o(budget=12)", "h2o(budget=12)+d2o_merge(threshold=1.5)"))
    for n in (40, *[1] * 10):
        assert torch.allclose(a.feed(n), b.feed(n), atol=1e-6)


def test_the_threshold_starts_at_the_mean_and_then_follows():
    drive = Drive("h2o(budget=12)+d2o_merge(beta=0.6)", 41, prompt=40)
    drive.feed(40)
    kept = [drive.stored(h)[0] for h in range(2)]
    unit = torch.nn.functional.normalize(drive.k[0, :, :40], dim=-1)
    for h in range(2):
        gone = [i for i in range(40) if i not in kept[h]]
        best = (unit[h][gone] @ unit[h][kept[h]].mT).amax(-1)
        assert torch.allclose(drive.layer.state["d2o_threshold"][0, h, 0], best.mean(), atol=1e-5)
    before = drive.layer.state["d2o_threshold"].clone()
    drive.feed(1)
    for h in range(2):
        now = [p for p in kept[h] + [40] if p not in drive.stored(h)[0]]
        unit = torch.nn.functional.normalize(drive.k[0, h], dim=-1)
        rest = [p for p in kept[h] + [40] if p not in now]
        best = float((unit[now] @ unit[rest].mT).amax())
        assert torch.allclose(drive.layer.state["d2o_threshold"][0, h, 0],
                              0.6 * torch.tensor(best) + 0.4 * before[0, h, 0], atol=1e-5)


def test_multiplicity_is_exact_when_keys_and_values_are_equal():
    """Copies of one token: a merged entry that counts for all of them gives the dense output (the bias is needed)."""
    outs = {}
    for spec in ("dense", "h2o(budget=6)+d2o_merge(multiplicity=true,threshold=0.99)", "h2o(budget=6)+d2o_merge(threshold=0.99)"):
        drive = Drive(spec, 32, prompt=30)
        for x in (drive.k, drive.v):
            x[:, :, 1:27] = x[:, :, 1:2]  # tokens 1..26 are copies; 27..29 are recent
        drive.k[:, :, :1] = drive.q[:, ::2, 5:6] * 2  # token 0 is looked at and stays
        drive.feed(30)
        outs[spec] = drive.feed(1)
    dense, exact, blind = outs.values()
    assert torch.allclose(dense, exact, atol=1e-4)
    assert float((dense - blind).abs().max()) > 10 * float((dense - exact).abs().max())


def test_keys_merge_only_when_asked():
    drives = [Drive(f"h2o(budget=12)+d2o_merge(keys={k})", 40, prompt=40) for k in ("false", "true")]
    plain = Drive("h2o(budget=12)", 40, prompt=40)
    for d in (*drives, plain):
        d.feed(40)
    assert torch.equal(drives[0].stored(0)[1], plain.stored(0)[1])
    assert not torch.equal(drives[1].stored(0)[1], plain.stored(0)[1])


def test_the_history_says_what_each_entry_joined():
    drive = Drive("h2o(budget=12)+d2o_merge(threshold=0.01)", 44, prompt=40, record=True)
    drive.feed(40)
    layer = drive.layer
    into, death = layer.history.targets(40)[0], layer.history.upto(40)[1][0]
    unit = torch.nn.functional.normalize(drive.k[0, :, :40], dim=-1)
    merged_any = 0
    for h in range(2):
        kept = sorted(drive.stored(h)[0])
        for i in range(40):
            if i in kept:
                assert into[h, i] == -1 and death[h, i] == 2**31 - 1
                continue
            likeness = unit[h, i] @ unit[h, kept].mT
            if float(likeness.max()) >= 0.011:
                assert int(into[h, i]) == kept[int(likeness.argmax())]
                merged_any += 1
    assert merged_any > 5
