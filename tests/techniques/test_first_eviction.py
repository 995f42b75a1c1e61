"""StreamingLLM, H2O, SnapKV, PyramidKV: the Test lines of their sheets, against references written here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drive import Drive
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention, heads, kept, rope, visibility
from tiny_models import build, llama

from lab.engine.rope import rope_of
from lab.engine.session import Session
from lab.errors import LabError
from lab.techniques.pyramidkv import PyramidKV
from lab.techniques.snapkv import pooled


# -- StreamingLLM ------------------------------------------------------------------------------------------------------
def places(head) -> list[int]:
    return sorted(head[0])


def test_streaming_llm_keeps_sinks_and_a_window():
    drive = Drive("streaming_llm(budget=12,sinks=3,renumber=false)", 60, prompt=40)
    drive.feed(40)
    for row in range(40, 60):
        assert places(drive.stored(0)) == places(drive.stored(1)) == [0, 1, 2, *range(row - 9, row)]
        drive.feed(1)


def test_streaming_llm_is_dense_while_everything_fits():
    """T <= S + W equals dense, for every row."""
    drive, dense = (Drive(s, 30, model=llama()) for s in ("streaming_llm(budget=30)", "dense"))
    for n in (20, *[1] * 10):
        assert torch.allclose(drive.feed(n), dense.feed(n), atol=1e-6)


@pytest.mark.parametrize("more", ["", "+int_codes(bits=8)", "+int_codes(bits=8,sinks=2)", "+kivi(bits=8,group=16,residual=16)"])
@pytest.mark.parametrize("name,interleaved", [("llama", False), ("glm", True)])
def test_streaming_llm_renumbering_equals_rope_from_unrotated_keys(name, interleaved, more):
    """Keys un-rotated by their position and rotated to their place in the cache, the query at the cache's end (R1, R2)."""
    model = build(name, head_dim=16)
    frequencies = rope_of(model, 0).frequencies.double().numpy()
    drive = Drive(f"streaming_llm(budget=40,sinks=4){more}", 70, prompt=60, model=model)
    drive.feed(60)
    for row in range(60, 70):
        held = [drive.stored(h) for h in range(2)]
        out = drive.feed(1)
        for h in range(4):
            pos, keys, values = held[h // 2]
            order = np.argsort(pos)  # a place in the cache is a rank of position
            pos = [*np.array(pos)[order], row]
            keys = torch.cat([keys[order], drive.k[0, h // 2, row : row + 1]])
            values = torch.cat([values[order], drive.v[0, h // 2, row : row + 1]])
            bare = rope(keys, -np.array(pos), frequencies, interleaved)
            keys = rope(bare, np.arange(len(pos)), frequencies, interleaved)
            query = rope(drive.q[0, h, row : row + 1], [len(pos) - 1 - row], frequencies, interleaved)
            want, _, _ = attention(query, keys, values, drive.scale)
            assert np.allclose(out[0, h, 0], want[0], atol=1e-4)


def test_streaming_llm_equals_the_a_shape_mask_for_one_layer_only():
    """One layer's decode rows see what A-shape rows see; over several layers the two differ, as the sheet says."""
    n, size = 60, 12
    drive = Drive(f"streaming_llm(budget={size - 1},sinks=3,renumber=false)", n, prompt=20)
    drive.feed(20)
    rows = torch.cat([drive.feed(1) for _ in range(20, n)], 2)
    want, _, _ = heads(drive.q[0], drive.k[0], drive.v[0], 0.25, visibility(range(n), range(n), bands=[(3, size - 3)]))
    assert np.allclose(rows[0], want[:, 20:], atol=5e-5)


def test_streaming_llm_positions_stop_growing():
    """Distances never exceed the cache: far beyond the trained length the logits of a repeated text stay put."""
    ids = [7, 11] * 60
    session = Session(llama(), "streaming_llm(budget=20,sinks=4)", new_tokens=64)
    session.prefill(ids)
    rows = torch.stack([session.step(torch.tensor([t]))[0] for t in ids[:60]])
    assert session.cache.entries == 20 * 2 * 3
    assert float((rows[-1] - rows[-3]).abs().max()) < float(rows[-1].abs().max())


def test_renumbering_is_refused_where_no_fixed_rotation_exists():
    with pytest.raises(LabError, match="rotary"):
        Session(build("gpt2"), "streaming_llm(budget=8)").prefill(list(range(2, 40)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_with_length_are_refused(kind):
    extra = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=64) if kind == "longrope" else {}
    model = build("llama", head_dim=16, rope_parameters=dict(rope_type=kind, rope_theta=10000.0, factor=2.0, **extra))
    with pytest.raises(LabError, match="length"):
        rope_of(model, 0)


ROTARY = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "olmo", "cohere", "cohere2", "gpt_oss", "phi", "glm",
          "starcoder2", "smollm3"]


@pytest.mark.parametrize("name", ROTARY)
def test_rope_of_turns_keys_as_the_model_does(name):
    """R1: the key of a token at position p, turned by delta, is the key the model forms at p + delta, in every layer."""
    from lab.engine.cache import LabCache

    model, delta = build(name, attention_dropout=0.0), 9
    for layer, kind in enumerate(getattr(model.config, "layer_types", None) or [None] * 3):
        keys = []
        for start in (3, 3 + delta):
            cache = LabCache(model)
            with torch.no_grad():  # one token alone attends to itself: only its position differs
                model(torch.tensor([[5]]), position_ids=torch.tensor([[start]]), past_key_values=cache)
            keys.append(cache.layers[layer].all_keys()[0, :, 0])
        if torch.allclose(*keys):
            continue  # a layer without positions (NoPE)
        assert torch.allclose(rope_of(model, layer).rotate(keys[0], delta), keys[1], atol=2e-4), layer


# -- H2O ---------------------------------------------------------------------------------------------------------------
def h2o_reference(drive: Drive, prompt: int, steps: int, budget: int, norm: bool):
    """Sheet 2 written out: accumulate, keep recents and the heaviest, evict one per step. Yields (kept, outputs) per step."""
    recent = max(1, round(0.5 * budget))
    q, k, v = (x[0].double().numpy() for x in (drive.q, drive.k, drive.v))
    _, _, p = heads(q[:, :prompt], k[:, :prompt], v[:, :prompt], 0.25, visibility(range(prompt), range(prompt)))
    acc = [dict(enumerate(p[2 * h : 2 * h + 2].sum((0, 1)))) for h in range(2)]

    def shrink(h, row):
        pos = sorted(acc[h])
        score = [acc[h][j] / (row + 1 - j if norm else 1) for j in pos]
        acc[h] = {pos[n]: acc[h][pos[n]] for n in kept(score, budget, [j > row - recent for j in pos])}

    for h in range(2):
        shrink(h, prompt - 1)
    yield [sorted(a) for a in acc], None
    for row in range(prompt, prompt + steps):
        outs = []
        for h in range(2):
            acc[h][row] = 0.0
            pos = sorted(acc[h])
            for g in range(2):
                out, _, w = attention(q[2 * h + g, row : row + 1], k[h, pos], v[h, pos], 0.25)
                outs.append(out[0])
                for j, x in zip(pos, w[0]):
                    acc[h][j] += x
            shrink(h, row)
        yield [sorted(a) for a in acc], np.stack(outs)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_h2o_equals_its_sheet_step_by_step(seed, norm):
    drive = Drive(f"h2o(budget=16,norm={str(norm).lower()})", 70, prompt=40, seed=seed)
    steps = h2o_reference(drive, 40, 30, 16, norm)
    want, _ = next(steps)
    drive.feed(13), drive.feed(27)
    assert [places(drive.stored(h)) for h in range(2)] == want
    for want, outs in steps:
        assert np.allclose(drive.feed(1)[0, :, 0], outs, atol=5e-5)
        assert [places(drive.stored(h)) for h in range(2)] == want


def test_h2o_mass_counts_rows_and_evicts_one_per_step():
    """Sum of acc = rows seen, per query head of the group; the greedy policy evicts exactly one entry per step."""
    drive = Drive("h2o(budget=1)", 40)
    drive.feed(30)
    assert torch.allclose(drive.layer.attribute("mass").sum(-1), torch.full((1, 2), 60.0), atol=1e-3)
    drive = Drive("h2o(budget=20)", 50, prompt=30, record=True)
    drive.feed(30)
    for row in range(30, 50):
        before = [set(drive.stored(h)[0]) for h in range(2)]
        drive.feed(1)
        for h in range(2):
            now = set(drive.stored(h)[0])
            assert len(now) == 20 and row in now and len(before[h] - now) == 1


# -- SnapKV ------------------------------------------------------------------------------------------------------------
def snapkv_scores(drive: Drive, prompt: int, window: int) -> np.ndarray:
    q, k, v = (x[0].double().numpy() for x in (drive.q, drive.k, drive.v))
    rows = range(prompt - window, prompt)
    _, _, p = heads(q[:, prompt - window : prompt], k[:, :prompt], v[:, :prompt], 0.25, visibility(rows, range(prompt)))
    return p.mean(1).reshape(2, 2, prompt).mean(1)


@pytest.mark.parametrize("chunks", [[50], [20, 30], [46, 4], [49, 1]])
@pytest.mark.parametrize("kernel,pool", [(1, "avg"), (5, "avg"), (7, "max")])
def test_snapkv_equals_its_sheet(kernel, pool, chunks):
    """Mean over the last w rows, pooled over neighbours, top B - w per KV head and the window; w may span chunks."""
    drive = Drive(f"snapkv(budget=20,window=8,kernel={kernel},pool={pool})", 50, prompt=50)
    for n in chunks:
        drive.feed(n)
    scores, half = snapkv_scores(drive, 50, 8), kernel // 2
    for h in range(2):
        near = [scores[h, max(0, j - half) : j + half + 1] for j in range(50)]
        smooth = [x.mean() if pool == "avg" else x.max() for x in near]
        assert places(drive.stored(h)) == kept(smooth, 20, [j >= 42 for j in range(50)])


def test_snapkv_with_a_window_over_everything_is_the_column_mean():
    """kappa = 1, w = T: the score is the mean of the attention each entry received."""
    drive, seen = Drive("snapkv(budget=1,window=40,kernel=1)", 40), []

    class Watch:
        """Stands among the observers, where the prompt's queries are still there."""

        @staticmethod
        def observe(ctx):
            seen.append(ctx.scorer.score(ctx))

    drive.policy.observers = [Watch]
    drive.feed(40)
    assert np.allclose(seen[0][0], snapkv_scores(drive, 40, 40), atol=1e-5)


def test_pooling_keeps_the_neighbours_of_a_spike():
    scores = torch.zeros(1, 1, 30)
    scores[0, 0, 12] = 1
    for kind in ("avg", "max"):
        smooth = pooled(scores, 5, kind)[0, 0]
        assert set(smooth.topk(5).indices.tolist()) == {10, 11, 12, 13, 14} and smooth.shape == (30,)
    assert torch.equal(pooled(scores, 1), scores)


def test_snapkv_keeps_what_is_generated():
    session = Session(llama(), "snapkv(budget=40)", new_tokens=8)
    session.prefill(list(range(2, 102)))
    for t in range(8):
        session.step(torch.tensor([t + 2]))
    assert session.cache.entries == (40 + 8) * 2 * 3


# -- PyramidKV ---------------------------------------------------------------------------------------------------------
@given(
    total=st.integers(9, 600), prompt=st.integers(10, 2000), layers=st.integers(1, 60), beta=st.floats(1, 100),
    window=st.integers(1, 64),
)
@settings(max_examples=300)
def test_pyramidkv_totals(total, prompt, layers, beta, window):
    """Sum over layers = L * B within L rounding units; non-increasing; never beyond the prompt."""
    pyramid = PyramidKV(beta=beta, window=window)
    keep = [pyramid.planned_entries(total, prompt, layer, layers) for layer in range(layers)]
    assert abs(sum(keep) - layers * total) <= layers
    assert all(a >= b for a, b in zip(keep, keep[1:]))
    if total < prompt:
        assert max(keep) <= prompt


def test_pyramidkv_in_a_model():
    session = Session(llama(), "pyramidkv(budget=40,beta=4)", chunk=None)
    session.prefill(list(range(2, 102)))
    counts = [set(layer.counts) for layer in session.cache.lab_layers]
    assert counts == [{64}, {40}, {16}]  # lo = (40-8)/4 = 8, hi = 64-8 = 56; plus the window of 8


def test_pyramidkv_never_takes_what_its_scorer_protects():
    """I7: a top layer's share below SnapKV's window would lose the newest entries."""
    session = Session(llama(), "snapkv(budget=40,window=32)+pyramidkv", chunk=None)
    session.prefill(list(range(2, 102)))
    for layer in session.cache.lab_layers:
        assert set(range(68, 100)) <= set(layer.positions()[0, 0].tolist())


def test_a_budget_smaller_than_what_is_protected_is_refused_with_numbers():
    for spec, words in (("snapkv(budget=20,window=32)", "20 of 98"), ("streaming_llm(budget=4,sinks=4)", "4 of 98")):
        with pytest.raises(LabError, match=words) as error:
            Session(llama(), spec).prefill(list(range(2, 100)))
        assert "Raise the budget" in str(error.value)
