"""Top-theta: exact SDC is post-softmax of the same set, VMC's identity (I4), kept near k on calibration, dense limit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lab.engine.reads import Place
from lab.engine.sparse import attend
from lab.techniques.top_theta import SIZES, TopTheta
from techniques.reading import context, differs, random, run, same


def tables(theta: float, heads: int = 4, layers: int = 10):
    shape = (len(SIZES), layers, heads, 3)
    return {"theta": torch.full(shape, theta), "std": torch.zeros(shape), "missing": torch.ones(shape),
            "weight": torch.full(shape, max(0.0, theta)), "weight_std": torch.zeros(shape),
            "lengths": torch.tensor([10.0, 50.0, 100.0]).expand(len(SIZES), 3)}


def weigh(technique, theta, rows=90):
    q, k, v = random(1, 4, rows, 8), random(1, 2, 90, 8, seed=1), random(1, 2, 90, 8, seed=2)
    ctx = context(q, k, v)
    ctx.shared[f"learnt/{technique.name}"] = tables(theta)
    technique.select(ctx)
    return ctx, attend(ctx, [], [], [], technique.weigh, False, True), (q, k, v)


def test_exact_sdc_is_the_softmax_of_the_kept_set():
    ctx, got, (q, k, v) = weigh(TopTheta(k=32, sigma=0.0, sdc="exact", vmc=False), 0.3)
    s = (q @ k.repeat_interleave(2, 1).mT * ctx.scale)[0, :, -1]
    kept = got.last[0] > 0
    assert ((s > 0.3) | (s == s.amax(-1, keepdim=True))).equal(kept)
    torch.testing.assert_close(got.last[0], s.softmax(-1) * kept)


def test_a_threshold_on_weights_keeps_the_weights_above_it():
    """p > w after the softmax; with the exact denominator the kept ones keep their weights."""
    ctx, got, (q, k, v) = weigh(TopTheta(k=32, on="weights", sigma=0.0, sdc="exact", vmc=False), 0.02)
    p = (q @ k.repeat_interleave(2, 1).mT * ctx.scale)[0, :, -1].softmax(-1)
    kept = (p > 0.02) | (p == p.amax(-1, keepdim=True))
    torch.testing.assert_close(got.last[0], p * kept)
    assert 0 < int(kept.sum()) < kept.numel()
    _, everything, _ = weigh(TopTheta(k=32, on="weights", sigma=0.0), 0.0)
    torch.testing.assert_close(everything.last[0], p)


def test_without_compensation_rows_sum_to_one_and_threshold_form_stays_below():
    _, plain, _ = weigh(TopTheta(k=32, sigma=0.0, sdc="none", vmc=False), 0.3)
    torch.testing.assert_close(plain.last.sum(-1), torch.ones(1, 4))
    _, bound, _ = weigh(TopTheta(k=32, sigma=0.0, sdc="threshold", vmc=False), 0.3)
    _, exact, _ = weigh(TopTheta(k=32, sigma=0.0, sdc="exact", vmc=False), 0.3)
    assert (bound.last.sum(-1) <= exact.last.sum(-1) + 1e-6).all()  # dropped scores lie below theta


def test_vmc_adds_the_mean_value_for_the_missing_mass():
    technique = TopTheta(k=32, sigma=0.0, sdc="exact", vmc=True)
    _, got, (q, k, v) = weigh(technique, 0.3)
    _, plain, _ = weigh(dataclasses.replace(technique, vmc=False), 0.3)
    rest = 1 - plain.last.sum(-1)
    mean = v.mean(2).repeat_interleave(2, 1)
    torch.testing.assert_close(got.out[:, :, -1], plain.out[:, :, -1] + rest.unsqueeze(-1) * mean)


def test_a_threshold_nothing_passes_keeps_the_best():
    _, got, (q, k, v) = weigh(TopTheta(k=32, sigma=0.0, sdc="none", vmc=False), 1e9)
    assert ((got.last > 0).sum(-1) == 1).all()


def test_no_threshold_is_dense_and_cap_keeps_the_latest():
    _, got, (q, k, v) = weigh(TopTheta(k=32, sigma=0.0), -1e9)
    s = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5)[0, :, -1]
    torch.testing.assert_close(got.last[0], s.softmax(-1))
    _, capped, _ = weigh(TopTheta(k=32, sigma=0.0, cap=40, vmc=False), -1e9)
    assert (capped.last[..., :50] == 0).all() and (capped.last[..., 50:] > 0).all()


@pytest.mark.parametrize("on", ["scores", "weights"])
def test_on_its_calibration_text_about_k_are_kept(calibrations, on):
    """Mean kept within 20% of k, on rows like those it was learnt from."""
    from lab.engine.cache import LabCache
    from lab.engine.stack import Stack
    from lab.measure.fitting.common import samples
    from techniques.conftest import loaded

    model, kept = loaded().model, []
    technique = TopTheta(k=32, first_k=32, sigma=0.0)

    class Counting(TopTheta):
        def weigh(self, ctx, s, place: Place):
            done = super().weigh(ctx, s, place)
            long = (s > -torch.inf).sum(-1) > 200
            kept.append((done.p > 0).sum(-1)[long].float())
            return done

    counting = Counting(k=32, first_k=32, sigma=0.0, on=on)
    row = samples(model, None, 2, 640)[0]
    with torch.no_grad():
        model(input_ids=row.view(1, -1), past_key_values=LabCache(model, Stack((counting,))), use_cache=True)
    assert abs(float(torch.cat(kept).mean()) - technique.k) < 0.2 * technique.k


@pytest.mark.usefixtures("calibrations")
def test_in_a_model():
    same("top_theta(k=512)", prompt=120)
    differs("top_theta(k=32,first_k=32)")
    same("top_theta(k=512,on=weights)", prompt=120)
    differs("top_theta(k=32,first_k=32,on=weights)")
    session, _ = run("top_theta(k=32,first_k=32)")
    assert all(0.5 < layer.last_read / sum(layer.counts) < 1 for layer in session.cache.lab_layers)
