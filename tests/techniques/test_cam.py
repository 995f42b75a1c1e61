"""CaM (eviction sheet 11)."""

import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.techniques.cam import CaM


def scene(n: int, keep: list[int], seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    flags = torch.zeros(1, 1, n, dtype=torch.bool)
    flags[0, 0, keep] = True
    return torch.randn(1, 1, n, 8, generator=g), torch.rand(1, 1, n, generator=g), torch.arange(n).view(1, 1, -1), flags


def by_hand(values, mass, pos, keep, m, expected, draw):
    added = torch.zeros_like(values[0, 0])
    n = keep.shape[-1]
    order = pos[0, 0].argsort().tolist()
    gone = [i for i in order if not keep[0, 0, i]]
    for number, i in enumerate(gone):
        targets = [j for j in order[order.index(i) + 1 :] if keep[0, 0, j]][:m]
        if not targets:
            continue
        chance = float((mass[0, 0, i] / mass[0, 0, targets].mean()).clamp(0, 1))
        u = chance if expected else float(draw[number] < chance)
        added[targets] += u * values[0, 0, i] / len(targets)
    assert len(order) == n
    return added


@given(st.integers(2, 30), st.integers(1, 6), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=60)
def test_gifts_against_loops(n, m, expected, seed):
    g = torch.Generator().manual_seed(seed)
    keep = [i for i in range(n) if torch.rand(1, generator=g) < 0.5] or [n - 1]
    values, mass, pos, flags = scene(n, keep, seed)
    pos = pos[..., torch.randperm(n, generator=g)]  # storage order is not the order of positions
    draw = torch.rand(1, 1, n - len(keep), generator=torch.Generator().manual_seed(1))[0, 0]
    got, changed = CaM(targets=m, expected=expected).gifts(values, mass, pos, flags, ~flags, torch.Generator().manual_seed(1))
    want = by_hand(values, mass, pos, flags, m, expected, draw)
    assert torch.allclose(got[0, 0], want, atol=1e-5)
    assert bool((changed[0, 0] | (want == 0).all(-1)).all())
    assert not bool((changed & ~flags).any())


def test_no_attention_is_plain_eviction():
    values, mass, pos, keep = scene(12, [3, 5, 9, 11])
    added, changed = CaM(targets=3).gifts(values, mass * keep, pos, keep, ~keep, torch.Generator().manual_seed(0))
    assert not bool(changed.any()) and float(added.abs().max()) == 0


def test_one_target_of_equal_attention_gets_the_whole_value():
    """Then the output changes by p_target v_i."""
    values, _, pos, keep = scene(2, [1])
    added, _ = CaM(targets=1).gifts(values, torch.ones(1, 1, 2), pos, keep, ~keep, torch.Generator().manual_seed(0))
    assert torch.allclose(added[0, 0, 1], values[0, 0, 0])


def test_keys_stay_and_values_change_in_the_cache():
    plain, cam = (Drive(s, 40, prompt=40) for s in ("h2o(budget=12)", "h2o(budget=12)+cam(expected=true,targets=4)"))
    for d in (plain, cam):
        d.feed(40)
    for h in range(2):
        (pa, ka, va), (pb, kb, vb) = plain.stored(h), cam.stored(h)
        assert pa == pb and torch.equal(ka, kb) and not torch.allclose(va, vb)


def test_merging_into_coded_values():
    """With codes the target is decoded, changed, and coded again at its own width."""
    drive = Drive("h2o(budget=12)+cam(expected=true)+int_codes(bits=8)", 50, prompt=40)
    plain = Drive("h2o(budget=12)+int_codes(bits=8)", 50, prompt=40)
    for n in (40, *[1] * 10):
        drive.feed(n), plain.feed(n)
    assert drive.layer.bits_count()[8] == 24 and drive.layer.counts == [12, 12]
    assert not torch.allclose(drive.stored(0)[2], plain.stored(0)[2])


def test_the_history_names_the_next_kept_token_as_the_first_to_receive():
    drive = Drive("h2o(budget=12)+cam(expected=true,targets=4)", 42, prompt=40, record=True)
    drive.feed(40)
    into = drive.layer.history.targets(40)[0]
    for h in range(2):
        kept = sorted(drive.stored(h)[0])
        for i in range(40):
            later = [j for j in kept if j > i]
            assert int(into[h, i]) == (-1 if i in kept or not later else later[0])
    assert drive.layer.clone().history.targets(45).shape[-1] == 45


def test_the_history_names_everyone_who_shared_a_value(monkeypatch):
    from lab.inspect.cachemap import CacheMap
    from lab.techniques import cam as module

    wanted, real = {}, module.CaM.gifts

    def spy(self, values, mass, pos, keep, gone, generator=None, told=None):
        for h in range(pos.shape[1]):
            kept = sorted(int(p) for p in pos[0, h][keep[0, h]])
            for p in pos[0, h][gone[0, h]].tolist():
                wanted[h, p] = tuple(x for x in kept if x > p)[: self.targets]
        return real(self, values, mass, pos, keep, gone, generator, told)
    monkeypatch.setattr(module.CaM, "gifts", spy)
    drive = Drive("h2o(budget=12)+cam(expected=true,targets=4)", 42, prompt=40, record=True)
    drive.feed(42)
    history = drive.layer.history
    bits, death, demoted = history.upto(42)
    m = CacheMap(bits[:1].numpy(), death[:1].numpy(), demoted[:1].numpy(), history.targets(42)[:1].numpy(),
                 history.sharing(42)[:1].numpy())
    found = {(h, p): m.heirs(0, h, p) for h, p in wanted if m.merged[0, h, p] >= 0}
    assert found and any(len(x) == 4 for x in found.values())
    assert found == {key: wanted[key] for key in found}
    assert history.clone().sharing(42).equal(history.sharing(42))
