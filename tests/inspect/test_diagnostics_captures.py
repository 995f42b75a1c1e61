"""Diagnostics of captures on planted attention: sinks, identity, uniform, induction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import from_weights, sink, uniform

from lab.errors import LabError
from lab.inspect.capture import NEVER, Capture
from lab.inspect.diagnostics import (
    Session,
    basin,
    hallucination,
    iou,
    long_heads,
    prompt_ranking,
    registry,
    rollout,
    run,
    shapes,
    sinks,
)
from lab.inspect.diagnostics.base import to_numpy
from lab.inspect.lens import Rollout
from lab.inspect.rollout import rollout_view
from lab.inspect.scores import Cancelled

torch.set_num_threads(1)
T = 12


def test_every_diagnostic_is_fully_declared():
    found = registry()
    assert len(found) >= 19
    for d in found.values():
        assert d.title and d.paper.arxiv and 20 < len(d.help) < 700 and d.figures
        assert d.explanation.count(". ") == 1 and d.explanation.endswith("."), f"{d.name} needs two sentences"
        assert all(f.kind in ("matrix", "groups", "lines", "bars", "scatter", "thumbnails") for f in d.figures)
        if d.needs:
            with pytest.raises(LabError, match="needs"):
                run(d.name, Session())
    with pytest.raises(LabError, match="There is no diagnostic"):
        run("nonsense", Session())


def random_captures(layers: int = 3, t: int = 40, heads: int = 4, d: int = 8) -> list[Capture]:
    torch.manual_seed(0)
    return [Capture(torch.randn(heads, t, d), torch.randn(heads // 2, t, d), layer=n) for n in range(layers)]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, d in registry().items()
        if set(d.needs) <= {"captures", "values", "documents", "prompt_tokens", "logprobs", "marked"}
        and d.needs
    ],
)
def test_declared_figures_are_in_the_result(name):
    captures = random_captures()
    session = Session(
        captures=captures,
        values=[torch.randn(2, 40, 8) for _ in captures],
        prompt_tokens=20,
        logprobs=[-1.0] * 40,
        documents=[(0, 8), (8, 16), (16, 24), (24, 32)],
        marked=[3, 4],
        options={"steps": 5, "permutations": 5, "first": 2, "last": 6},
    )
    seen: list[float] = []
    arrays = run(name, session, seen.append)
    assert seen and seen[-1] == pytest.approx(1.0) and all(isinstance(a, np.ndarray) for a in arrays.values())
    for figure in registry()[name].figures:
        shape = arrays[figure.array].shape
        assert len(shape) == (2 if figure.kind == "scatter" else len(figure.axes)), (figure, shape)


# rollout and flow


def test_rollout_of_one_layer_is_half_attention_half_identity():
    c = from_weights([uniform(T), torch.eye(T)])
    got = to_numpy(rollout.rollout_rows([c], range(T)))
    np.testing.assert_allclose(got, to_numpy((uniform(T) + torch.eye(T)) / 4 + torch.eye(T) / 2), atol=1e-5)


def test_rollout_multiplies_layers_and_sums_to_one(monkeypatch):
    layers = random_captures()
    full = torch.eye(40)
    for c in layers:
        full = (rollout.mean_weights(c, (0, 40)) + torch.eye(40)) / 2 @ full
    monkeypatch.setattr("lab.inspect.scores.CELLS_CPU", 256)
    got = rollout.rollout_rows(layers, [5, 39])
    torch.testing.assert_close(got, full[[5, 39]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.sum(1), torch.ones(2))


def test_identity_stays_home_and_even_attention_lifts_nothing():
    same = run("rollout", Session(captures=[from_weights([torch.eye(T)])] * 3))
    np.testing.assert_allclose(same["rollout"], np.eye(T)[-1], atol=1e-5)
    even = run("rollout", Session(captures=[from_weights([uniform(T)])] * 3, options={"output": 7}))
    np.testing.assert_allclose(even["lift"][:8], 1, rtol=1e-4)
    assert np.isnan(even["lift"][8:]).all()


def test_evicted_rows_keep_their_share():
    death = torch.full((1, T), NEVER)
    death[0] = torch.arange(T)
    got = rollout.rollout_rows([Capture(torch.zeros(1, T, 2), torch.zeros(1, T, 2), death=death)], [5])
    assert got[0, 5] == 1 and got.sum() == 1


def test_flow_of_one_layer_is_the_capacity():
    c = from_weights([uniform(T)])
    want = to_numpy((uniform(T) + torch.eye(T)) / 2)[8, :9]
    np.testing.assert_allclose(rollout.flow([c], 8), want, atol=1e-6)


def test_flow_is_bounded_and_finds_detours():
    rng = np.random.default_rng(0)
    layers = [np.tril(rng.random((6, 6))) for _ in range(3)]
    layers = [a / a.sum(1, keepdims=True) for a in layers]
    for j in range(6):
        got = rollout.max_flow(layers, 5, j)
        assert got <= layers[2][5].sum() + 1e-9 and got <= layers[0][:, j].sum() + 1e-9
        # Flow from the top row along every path is at least the rollout's product of shares.
        assert got >= (layers[2] @ layers[1] @ layers[0])[5, j] - 1e-9
    a = np.array([[1.0, 0], [0.5, 0.5]])
    assert rollout.max_flow([a, a], 1, 0) == pytest.approx(1.0)
    crossing = [np.array([[1.0, 0], [1, 0.2]]), np.array([[1.0, 0], [0.7, 0.9]])]
    assert rollout.max_flow(crossing, 1, 0) == pytest.approx(1.6)


def test_flow_of_a_long_run_is_followed_in_a_window_up_to_the_chosen_token():
    with pytest.raises(LabError, match="at most 48"):
        rollout.flow([Capture(torch.zeros(1, 60, 2), torch.zeros(1, 60, 2))], 59)
    captures = [Capture(torch.zeros(1, 60, 2), torch.zeros(1, 60, 2))]
    long = run("rollout", Session(captures=captures))
    assert np.isnan(long["flow"][:12]).all() and np.isfinite(long["flow"][12:]).all() and np.isfinite(long["rollout"]).all()
    np.testing.assert_allclose(long["flow"][12:-1], 0.5 / 60, rtol=1e-5)
    assert long["flow"][-1] == pytest.approx(0.5 + 0.5 / 60)
    early = run("rollout", Session(captures=captures, options={"output": 50}))["flow"]
    assert np.isfinite(early[3:51]).all() and np.isnan(early[:3]).all() and np.isnan(early[51:]).all()


def product(layers) -> torch.Tensor:
    """[T, T] rollout by whole matrices."""
    full = torch.eye(layers[0].tokens, dtype=torch.float64)
    for c in layers:
        w = rollout.mean_weights(c, (0, c.tokens)).double()
        full = (w + torch.diag(2 - w.sum(1))) / 2 @ full
    return full


def pooled_product(full, v, pool):
    """What a view of the rollout shows, from whole matrices: the mean of every group of columns first."""
    t = full.shape[0]
    mean = torch.zeros_like(full)
    for i in range(t):
        for j in range(0, i + 1, v.group):
            mean[i, j : j + v.group] = full[i, j : min(j + v.group, i + 1)].mean()
    out = np.full(v.shape, np.nan)
    for y in range(v.shape[0]):
        for x in range(v.shape[1]):
            (r0, r1), (c0, c1) = v.tokens_of(y, x)
            cells = [(mean if pool == "max" else full)[i, j] for i in range(r0, r1) for j in range(c0, min(c1, i + 1))]
            if cells:
                out[y, x] = max(cells) if pool == "max" else sum(cells) / len(cells)
    return out


@pytest.mark.parametrize("groups", [1024, 40, 20, 14, 7])
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("window", [(None, None, 512), ((4, 40), (2, 38), 9), ((20, 29), (0, 33), 6), ((17, 18), (3, 4), 1)])
def test_rollout_map_equals_the_product(monkeypatch, groups, pool, window):
    monkeypatch.setattr("lab.inspect.rollout.GROUPS", groups)
    layers = random_captures()
    full = product(layers)
    rows, cols, size = window
    v = rollout_view(layers, rows, cols, size, size, pool)
    assert v.group == -(-40 // groups) and v.exact == (v.group == 1 and max(v.row_step, v.col_step) == 1)
    np.testing.assert_allclose(v.values, pooled_product(full, v, pool), atol=1e-5)
    lens = Rollout(layers)
    step, row = lens.groups(33)
    assert step == v.group
    np.testing.assert_allclose(row, np.add.reduceat(full[33].numpy(), np.arange(0, 40, step)), atol=1e-5)
    assert np.nansum(lens.row(33)) == pytest.approx(1, abs=1e-4) and np.isnan(lens.row(33)[34:]).all()
    sharp = rollout_view(layers, (20, 29), (0, 33), 64, 64, pool, exact=True)
    assert sharp.group == 1 and sharp.exact
    want = full[20:29, :33].masked_fill(torch.arange(33) > torch.arange(20, 29)[:, None], torch.nan)
    np.testing.assert_allclose(sharp.values, want, atol=1e-5)
    assert lens.groups(22)[0] == 1 and lens.groups(30)[0] == step, "rows that were asked for stay known to single tokens"


def test_a_rollout_says_what_it_cannot(monkeypatch):
    with pytest.raises(LabError):
        rollout_view(random_captures(), (4, 41))
    with pytest.raises(LabError):
        rollout_view([])
    with pytest.raises(Cancelled):
        rollout_view(random_captures(), cancel=lambda: True)
    monkeypatch.setattr("lab.inspect.rollout.MOST_ROWS", 10)
    with pytest.raises(LabError, match="At most 10 can"):
        rollout_view(random_captures(), exact=True)
    monkeypatch.setattr("lab.inspect.rollout.QUICK", 1)
    layers = random_captures()
    with pytest.raises(LabError, match="Its map is drawn first"):
        Rollout(layers).row(5)
    told = []
    rollout_view(layers, progress=told.append)
    assert told == sorted(told) and told[-1] == pytest.approx(1)
    assert Rollout(layers).row(5)[:6].sum() == pytest.approx(1, abs=1e-4)


# sinks


def test_planted_sink_has_rate_one_and_uniform_none():
    found = run("sinks", Session(captures=[from_weights([sink(T), sink(T)])]))
    assert (found["rate"][:, 0] == 1).all() and (found["rate"][:, 1:] == 0).all()
    np.testing.assert_allclose(found["first_token"], 1, atol=1e-5)
    assert found["stable"].tolist() == [[0, 0, 0], [0, 1, 0]] and (found["dwell"] == 1).all()
    alpha = to_numpy(sinks.received(from_weights([uniform(64)])))[None]
    assert sinks.sink_rate(alpha)[1, 0] == 0
    np.testing.assert_allclose(alpha[0, 0, 10], (1 / np.arange(11, 65)).mean(), rtol=1e-4)


def test_a_sink_that_moves_is_seen():
    w = torch.zeros(T, T)
    w[:6, 0], w[6:, 5] = 1, 1
    where = sinks.drift(from_weights([w]), parts=4)
    assert where[0].tolist() == [0, 0, 5, 5] and sinks.dwell(where)[0] == pytest.approx(2 / 3)


# shapes


def test_shapes_of_known_heads():
    found = shapes.shapes([from_weights([torch.eye(T), sink(T), uniform(T)])])
    np.testing.assert_allclose(found["effective_rank"][0, :2], [T, 1], rtol=1e-4)
    np.testing.assert_allclose(found["entropy"][0], [0, 0, np.log(np.arange(1, T + 1)).mean()], atol=1e-4)
    assert found["evenness"][0, 2] == pytest.approx(1, abs=1e-4)
    assert found["focus_0"][0, 0] == pytest.approx(1) and found["focus_1"][0, 0] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(found["concentration"][0, :2], np.sqrt(T), rtol=1e-4)
    assert found["variance"][0, 2] == pytest.approx(0, abs=1e-6) and found["diversity"][0] > 0
    assert shapes.shapes([from_weights([uniform(T)] * 2)])["diversity"][0] == pytest.approx(0, abs=1e-4)


def test_kurtosis_ignores_scale_and_sink_can_be_left_out():
    a = torch.rand(1, 50)
    assert shapes.describe(a, 49)["kurtosis"] == pytest.approx(
        shapes.describe(a * 7, 49)["kurtosis"], rel=1e-4
    )
    gauss = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    assert shapes.describe(gauss, 199_999)["kurtosis"] == pytest.approx(0, abs=0.1)
    rest = shapes.without_first(sink(T, 0.5))
    np.testing.assert_allclose(to_numpy(rest[1:]), np.eye(T)[1:])


# long heads


def test_gaussian_estimate_is_close_on_gaussian_keys():
    torch.manual_seed(0)
    c = Capture(torch.randn(2, 2000, 16), torch.randn(1, 2000, 16))
    e = long_heads.estimate(c, [1999], first=16, last=128)
    assert np.abs(e.bulk - e.estimated).max() < 0.2
    local = long_heads.estimate(c, [100], first=16, last=128)
    assert np.isneginf(local.bulk).all() and (long_heads.long_share(local.bulk, local.near) == 0).all()


def test_long_and_local_heads_are_told_apart_and_a_needle_is_missed():
    t = 64
    local = torch.eye(t)
    needle = torch.zeros(t, t)
    needle[:, 0] = 1
    needle[40:, :] = 0
    needle[40:, 20] = 1
    found = run(
        "long_heads",
        Session(captures=[from_weights([local, uniform(t), needle])], options={"first": 4, "last": 8}),
    )
    assert found["long"][0, 0] == 0 and found["long"][0, 1] > 0.8 and found["far_mass"][0, 2] > 0.3
    assert found["long_estimated"][0, 0] == 0
    death = torch.full((1, t), NEVER)
    death[0, 4:50] = 50
    dead = long_heads.estimate(from_weights([uniform(t)], death=death), [55], first=4, last=5)
    assert dead.bulk[0, 0] < long_heads.estimate(from_weights([uniform(t)]), [55], first=4, last=5).bulk[0, 0]


# basin


def test_slot_attention_is_per_token_and_basin_is_scored():
    w = torch.zeros(10, 10)
    w[:, 0] = 1
    w[8:] = torch.tensor([0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.2, 0.2, 0, 0])
    slots = [(0, 2), (2, 6), (6, 8)]
    found = run("basin", Session(captures=[from_weights([w])], documents=slots))
    np.testing.assert_allclose(found["curve"], [0.2, 0.05, 0.2], atol=1e-5)
    assert found["score"] == pytest.approx(0.15, abs=1e-5)
    assert basin.reorder([0.2, 0.05, 0.1], [1, 3, 2]) == [1, 0, 2]
    with pytest.raises(LabError, match="at least three"):
        run("basin", Session(captures=[from_weights([w])], documents=[(0, 2), (2, 4)]))


def test_shuffles_average_content_away():
    rng = np.random.default_rng(0)
    shape, content = np.array([3.0, 1, 1, 2]), np.array([0.5, 0, 0, 0])
    curves = np.stack([shape + content[rng.permutation(4)] for _ in range(200)])
    mean, interval = basin.average(curves)
    assert ((interval[:, 0] <= shape + content.mean()) & (shape + content.mean() <= interval[:, 1])).all()
    assert mean.argmax() == 0


# hallucination


def test_lookback_of_planted_heads():
    prompt = 4
    back = torch.zeros(T, T)
    back[:, 1:4] = 1 / 3
    back[:4] = torch.eye(T)[:4]
    features = hallucination.row_features(from_weights([back, torch.eye(T)]), prompt)
    np.testing.assert_allclose(features["lookback"], [[1] * 8, [0] * 8], atol=1e-5)
    np.testing.assert_allclose(features["prompt_mass"], [[1] * 8, [0] * 8], atol=1e-5)
    np.testing.assert_allclose(features["prompt_max"][0], 1 / 3, atol=1e-5)
    even = hallucination.row_features(from_weights([uniform(T)]), prompt)
    np.testing.assert_allclose(even["lookback"], 0.5, atol=1e-5)
    np.testing.assert_allclose(even["past_mean"][0], 1 / np.arange(5, T + 1), rtol=1e-4)


def test_uncertainty_is_zero_when_sure_and_falls_with_probability():
    assert hallucination.uncertainty(hallucination.confidence([1, 1, 1], [1, 1, 1])) == 0
    low, high = (hallucination.uncertainty(hallucination.confidence([p] * 5, [0.5] * 5)) for p in (0.3, 0.6))
    assert low > high > 0
    previous = torch.diag(torch.ones(T - 1), -1)
    previous[0, 0] = 1
    sure = Session(captures=[from_weights([uniform(T), previous])], prompt_tokens=4, logprobs=[0.0] * T)
    found = run("hallucination", sure)
    assert found["heads"].tolist() == [1] and found["scores"][0] == pytest.approx(0, abs=1e-4)
    with pytest.raises(LabError, match="no generated tokens"):
        run("hallucination", Session(captures=sure.captures, prompt_tokens=T, logprobs=[0.0] * T))


# overlap


def test_iou_is_one_only_for_equal_maps():
    a = np.array([0.2, 0.3, 0.5, 0])
    assert iou.attention_iou(a, 3 * a) == pytest.approx(1)
    assert iou.attention_iou(a, [0, 0, 0, 1]) == 0 and 0 < iou.attention_iou(a, [1, 1, 1, 0]) < 1
    assert np.isnan(iou.attention_iou(a, [0, 0, 0, 0]))
    w = torch.eye(T)
    w[-1] = 0
    w[-1, 3:5] = 0.5
    found = run("iou", Session(captures=[from_weights([w, torch.eye(T)])], marked=[3, 4, 99]))
    np.testing.assert_allclose(found["overlap"][0], [1, 0], atol=1e-4)
    np.testing.assert_allclose(found["mass"][0], [1, 0], atol=1e-4)


# ranking of prompt tokens


def planted(t: int, prompt: int, looks: dict[tuple[int, int], int]) -> torch.Tensor:
    """Even attention, but rows [a, b) give nine tenths to one column."""
    w = uniform(t)
    for (a, b), column in looks.items():
        w[a:b] *= 0.1
        w[a:b, column] += 0.9
    return w


def test_the_answer_ranks_what_it_looked_at_first_and_layers_agree_or_not():
    """The last prompt rows of layer 0 look where the answer will look, those of layers 1 and 2 elsewhere."""
    t, prompt = 48, 40
    layers = [planted(t, prompt, {(36, 40): at, (40, 48): 11}) for at in (11, 20, 25)]
    captures = [from_weights([w, uniform(t)]) for w in layers]
    options = {"ranking": {"window": 4, "kernel": 1, "layers": 2, "rate": 0.03}}
    got = run("prompt_ranking", Session(captures=captures, prompt_tokens=prompt, options=options))
    assert got["scores"][1].argmax() == 11 and got["overlap"].shape == (2, 3)
    assert got["overlap"][0].tolist() == [1.0, 0.0, 0.0]
    assert got["overlap"][1].tolist() == [1.0, 1.0, 0.0]  # the best score of two layers still knows it one layer later
    assert got["rank_correlation"][0, 0] > got["rank_correlation"][0, 1]


def test_ranking_needs_an_answer():
    with pytest.raises(LabError, match="no answer"):
        run("prompt_ranking", Session(captures=random_captures(), prompt_tokens=40))


def test_rankings_are_those_of_the_technique():
    """CLAA's own score of a layer, from the same queries and keys."""
    from lab.engine.context import LayerContext
    from lab.engine.layer import LabLayer
    from lab.techniques.claa import CLAA

    c = random_captures(1)[0]
    store = LabLayer(0)
    store.update(c.k[None, :, :32], c.k[None, :, :32])
    store.append(c.k[None, :, :32], c.k[None, :, :32], None, None)
    store.queries = c.q[None, :, 24:32]
    ctx = LayerContext(store=store, layer=0, layers=1, phase="prefill", q=c.q[None, :, :32], pos_q=None, first=0,
                       scale=c.scale, softcap=None, window=None, prompt=32)
    want = CLAA(window=8, kernel=1).rank(ctx).numpy()[:24]
    np.testing.assert_allclose(prompt_ranking.ranking(c, 32, 8), want, atol=1e-5)
    np.testing.assert_allclose(prompt_ranking.pooled(np.arange(9.0), 3), [0.5, *range(1, 8), 7.5])
