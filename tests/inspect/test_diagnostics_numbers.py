"""Diagnostics of hidden states, arithmetic and statistics, with answers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics import (
    Session,
    atlas,
    counterfactual,
    deceive,
    deviation,
    embedding,
    groups,
    limits,
    massive,
    measures,
    run,
    subspace,
    training_drift,
)

torch.set_num_threads(1)


# measures


def test_ranks_and_agreement():
    assert measures.ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]
    assert measures.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert measures.kendall([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert measures.kendall([1, 2, 2, 3], [1, 2, 3, 3]) == pytest.approx(0.8)
    assert math.isnan(measures.spearman([1, 1], [1, 2])) and math.isnan(measures.kendall([1, 1], [1, 2]))
    assert measures.overlap([5, 4, 1, 0], [5, 0, 1, 4], 2) == 0.5


def test_distances():
    assert measures.wasserstein([0, 1], [2, 3]) == 2 and measures.wasserstein([3, 1], [1, 3]) == 0
    p, q = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    assert measures.jensen_shannon(p, q) == pytest.approx(math.log(2)) and measures.jensen_shannon(p, p) == 0
    assert measures.total_variation(p, q) == 1
    assert measures.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert measures.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1 and measures.auroc([1, 1], [0, 1]) == 0.5
    assert math.isnan(measures.auroc([1], [1]))


# massive activations


def test_planted_spike_is_the_only_one():
    torch.manual_seed(0)
    hidden = [torch.randn(20, 16) * 0.1 for _ in range(3)]
    hidden[2][4, 7] = -2500.0
    found = run("massive", Session(hidden=hidden))
    assert found["flags"].shape == (1, 5) and found["flags"][0, :4].tolist() == [2, 4, 7, -2500]
    assert found["top"].shape == (4, 3) and found["top"][0, 2] == 2500 and found["token"][2].argmax() == 4
    assert len(massive.find([torch.ones(4, 4) * 1e6])) == 0, "large everywhere is not massive"
    same = massive.replace(hidden[2], [(4, 7)], torch.tensor([-2500.0]))
    assert torch.equal(same, hidden[2]) and massive.replace(hidden[2], [(4, 7)])[4, 7] == 0


# subspace and embedding


def test_planted_rank_is_recovered_whatever_the_rotation():
    torch.manual_seed(0)
    x = torch.randn(400, 5).double() @ torch.randn(5, 32).double()
    assert subspace.rank_at(subspace.spectrum(x), 0.999999) == 5
    rotation = torch.linalg.qr(torch.randn(32, 32).double())[0]
    np.testing.assert_allclose(subspace.spectrum(x @ rotation), subspace.spectrum(x), atol=1e-6)
    wide = torch.randn(400, 32)
    found = run("subspace", Session(attention_out=[x.float()] * 2, mlp_out=[wide] * 2, hidden=[wide] * 3))
    assert (found["ranks"][0] <= 5 / 32).all() and (found["ranks"][1] > 0.9).all() and found["below_mlp"] == 1
    assert found["spectrum"][0, 5] < 1e-6


def test_embedding_variability():
    e = torch.tensor([[1.0, -1, 1, -1], [3, 3, 3, 3]])
    assert embedding.variability(e, piece=1).tolist() == [1, 0]
    found = run(
        "embedding", Session(embedding=torch.randn(500, 16), hidden=[torch.randn(9, 16) * s for s in (1, 3)])
    )
    assert found["tev"] == pytest.approx(0.97, abs=0.03) and found["histogram"].sum() == 500
    assert found["growth"][1] / found["growth"][0] == pytest.approx(9, rel=0.5)


# limits of normalisation


def test_softmax_slope_meets_its_bound():
    for tau in (0.2, 1.0, 3.0):
        assert limits.softmax_slope(torch.tensor([0.0, 0.0]), tau) == pytest.approx(1 / (2 * tau))
        assert limits.softmax_slope(torch.randn(30), tau) <= 1 / (2 * tau) + 1e-9
    assert limits.softmax_slope(torch.tensor([100.0, 0.0])) == pytest.approx(0, abs=1e-9)


def test_distance_vanishes_when_all_are_chosen():
    torch.manual_seed(0)
    p, x = torch.softmax(torch.randn(40), 0), torch.randn(40, 8)
    assert limits.raw_distance(p, x, 40) == 0 and limits.separation(p, x, 40)[0] == 0
    assert limits.raw_distance(p, x, 5) > limits.raw_distance(p, x, 35) > 0
    assert 0 <= limits.separation(p, x, 5)[0] <= 1
    one = torch.tensor([1.0, 0, 0])
    assert limits.separation(one, torch.eye(3), 1)[1] == 1, "the only chosen vector is its own sum"
    with pytest.raises(LabError, match="values"):
        run(
            "limits",
            Session(
                captures=[Capture(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))],
                values=[torch.zeros(1, 4, 2)] * 2,
            ),
        )


# numerical deviation


@pytest.mark.parametrize("block", [1, 5, 16, 64])
@pytest.mark.parametrize("late", [True, False])
def test_tiled_equals_naive_in_float64(block, late):
    torch.manual_seed(0)
    q, k, v = (torch.randn(33, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        deviation.tiled(q, k, v, 0.5, block, late), deviation.naive(q, k, v, 0.5), atol=1e-12, rtol=0
    )


def test_deviation_orders_precisions_and_grows_with_rescales():
    torch.manual_seed(0)
    c = Capture(torch.randn(1, 256, 32) * 2, torch.randn(1, 256, 32))
    seen = run(
        "deviation",
        Session(
            captures=[c],
            values=[torch.randn(1, 256, 32)],
            options={"ways": {"exact": (torch.float64, deviation.naive)}},
        ),
    )
    rms = dict(zip(seen["precisions"], seen["rms_naive"]))
    assert rms["float32"] < rms["float16"] < rms["bfloat16"]
    bf16 = seen["rms_early"][list(seen["precisions"]).index("bfloat16")]
    assert bf16[0] > bf16[-1], "sixteen-key blocks rescale most"
    assert seen["ways_errors"][0].max() < 1e-15 and seen["ways"].tolist() == ["exact"]
    assert dict(zip(seen["cascades"], seen["passes"])) == {
        "naive softmax": 3,
        "local maximum, corrected": 2,
        "running (flash)": 1,
        "linear state": 1,
    }


def test_declared_passes_match_walks_that_really_happen():
    class Walked(list):
        count = 0

        def __iter__(self):
            self.count += 1
            return super().__iter__()

    keys = Walked([1.0, 3.0, 2.0])
    top = max(s for s in keys)
    total = sum(math.exp(s - top) for s in keys)
    naive = sum(math.exp(s - top) / total * s for s in keys)
    assert keys.count == deviation.passes(deviation.CASCADES["naive softmax"])
    keys = Walked(keys)
    top, total, out = -math.inf, 0.0, 0.0
    for s in keys:
        new = max(top, s)
        shrink, e = math.exp(top - new), math.exp(s - new)
        top, total, out = new, total * shrink + e, out * shrink + e * s
    assert out / total == pytest.approx(naive)
    assert keys.count == deviation.passes(deviation.CASCADES["running (flash)"])


def test_training_drift_orders_its_causes():
    float64 = [training_drift.train(f, torch.float64, 10)[0] for f in (deviation.naive, deviation.tiled)]
    np.testing.assert_allclose(*float64, atol=1e-6)
    found = run("training_drift", Session(options={"steps": 30}))
    tiles, precision, seed = found["difference"]
    assert 0 < tiles < seed and 0 < precision < seed and np.isfinite(found["losses"]).all()


# counterfactual attention


def test_shuffling_an_even_row_changes_nothing():
    torch.manual_seed(0)
    y = counterfactual.readout(torch.randn(10, 4))
    assert counterfactual.permutation_effect(torch.full((10,), 0.1), y) == pytest.approx(0, abs=1e-6)
    peaked = torch.zeros(10)
    peaked[3] = 1
    assert counterfactual.permutation_effect(peaked, y) > 0.1


def test_adversary_finds_other_attention_only_where_values_agree():
    same = torch.ones(8, 3) * torch.tensor([1.0, 2.0, 3.0])
    a = torch.softmax(torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0]), 0)
    other, jsd, tvd = counterfactual.adversary(a, counterfactual.readout(same))
    assert jsd > 0.5 and tvd <= 0.05 and other.sum() == pytest.approx(1, abs=1e-5)
    _, jsd, tvd = counterfactual.adversary(a, lambda w: w)
    assert jsd < 0.1 and tvd <= 0.05
    rows = torch.stack([a, a.flip(0)])
    _, both, kept = counterfactual.adversary(
        rows, counterfactual.readout(torch.stack([same, torch.eye(8)[:, :3] * 50]))
    )
    assert both.shape == (2,) and both[0] > 0.5 and (kept <= 0.05).all()


def test_deceptive_classifier_hides_what_it_uses():
    _, plain = deceive.train(0.0, steps=200)
    _, shy = deceive.train(1.0, steps=200)
    assert plain.accuracy > 0.95 and plain.mass > 0.2
    assert shy.mass < 0.01 and shy.accuracy > plain.accuracy - 0.02
    assert plain.ablated < 0.65 and shy.ablated < 0.65


# atlas


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index."""
    table = np.array([[((a == i) & (b == j)).sum() for j in np.unique(b)] for i in np.unique(a)], dtype=float)
    pairs = lambda n: (n * (n - 1) / 2).sum()  # noqa: E731
    chance = pairs(table.sum(1)) * pairs(table.sum(0)) / (len(a) * (len(a) - 1) / 2)
    top = (pairs(table.sum(1)) + pairs(table.sum(0))) / 2
    return (pairs(table) - chance) / (top - chance)


def test_planted_patterns_are_separated():
    rng = np.random.default_rng(0)
    s = 16
    base = [np.eye(s), np.eye(s, k=-4), np.zeros((s, s)), np.tril(np.ones((s, s)))]
    base[2][:, 0] = 1
    truth = np.repeat(np.arange(4), 8)
    shots = np.stack([base[c] + 0.1 * rng.random((s, s)) for c in truth])
    x = atlas.features(shots)
    labels, scores = atlas.cluster(x)
    assert rand_index(labels, truth) > 0.9 and scores.argmax() == 0
    best = atlas.exemplars(x, labels, each=2)
    assert best.shape == (4, 2) and all(len({truth[m] for m in row}) == 1 for row in best)
    torch.manual_seed(0)
    captures = [Capture(torch.randn(4, 40, 8), torch.randn(2, 40, 8)) for _ in range(2)]
    assert run("atlas", Session(captures=captures))["cluster"].shape == (2, 4)
    with pytest.raises(LabError, match="at least five"):
        run("atlas", Session(captures=captures[:1]))


# groups of prompts


def test_student_and_welch_against_tables():
    assert groups.student_p(2.228, 10) == pytest.approx(0.05, abs=2e-4)
    assert groups.student_p(12.706, 1) == pytest.approx(0.05, abs=2e-4)
    assert groups.student_p(0, 7) == pytest.approx(1, abs=1e-4)
    t, p = groups.welch(np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5]))
    assert t == pytest.approx(-1.0954, abs=1e-3) and p == pytest.approx(0.3153, abs=1e-3)
    assert groups.welch(np.ones(3), np.ones(3)) == (0.0, 1.0)
    assert groups.cohens_d(np.array([2.0, 4]), np.array([1.0, 3])) == pytest.approx(1 / math.sqrt(2))
    np.testing.assert_allclose(
        groups.false_discovery(np.array([0.01, 0.04, 0.03, np.nan])), [0.03, 0.04, 0.04, np.nan]
    )


def test_planted_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)

    def prompts(shift):
        return [{"rank": rng.normal(shift), "noise": rng.normal(), "pair": n} for n in range(40)]

    found = run("groups", Session(groups={"paradox": prompts(2.0), "fact": prompts(0.0)}))
    at = list(found["metrics"]).index
    assert found["d"][at("rank")] > 1 and found["q"][at("rank")] < 0.01 and found["q"][at("noise")] > 0.05
    assert found["auroc"] > 0.8
    with pytest.raises(LabError, match="exactly two"):
        run("groups", Session(groups={"one": prompts(0)}))
