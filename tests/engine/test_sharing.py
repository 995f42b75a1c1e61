"""Samples of one prompt hold its entries once: the same numbers as runs of their own, honest bytes, and each its own changes.

The state machine is test_layer's, started as a prompt that is read and then shared: after every step each sample agrees with
its own list of vectors, bytes are those of the tensors, and attention over the layer is that over the lists.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from engine.test_layer import BLOCK, DIM, MOST, LayerMachine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from lab.engine.attend import general, one_row
from lab.engine.cache import LabCache
from lab.engine.context import LayerContext
from lab.engine.history import History
from lab.engine.layer import LabLayer
from lab.engine.session import Session
from lab.techniques.int_codes import TokenCodec
from lab.techniques.kivi import ChannelCodec

PROMPT, STEPS = 60, 14
IDS = tiny_models.tokens(PROMPT, seed=5).tolist()
SAMPLES = 4
# tokens at which no outlier of KVQuant is a near tie: a batch multiplies weights in another order than one row does
STREAMS = torch.stack([tiny_models.tokens(STEPS, seed=40 + n) for n in range(SAMPLES)])
KEPT = {  # the prompt's entries stay common for the whole run
    "dense", "int_codes", "int_codes(bits=4)", "int_codes(bits=2,group=16)", "int_codes(bits=4,sinks=2)", "fp8",
    "rotated(bits=3)", "rotated(mode=quarot,bits=4)", "kvquant", "kivi(group=16,residual=16)",
    "kivi(group=16,residual=32,bits=4)", "think",
    "snapkv(budget=0.5,window=8)", "snapkv(budget=0.5,window=8)+pyramidkv(window=8)", "snapkv(budget=0.5,window=8)+adakv",
    "keydiff(budget=0.5,window=8)", "dwb(target=4,interval=4)", "snapkv(budget=0.5,window=8)+int_codes(bits=4)",
    "snapkv(budget=0.5,window=8)+adakv+int_codes(bits=4)", "snapkv(budget=0.7,window=8)+kivi(group=16,residual=16)",
    "snapkv(budget=0.5,window=8)+adakv+zerotuning(gamma=4)", "zerotuning(gamma=4)",
    "snapkv(budget=0.5,window=8)+zerotuning(gamma=4)", "int_codes+zerotuning(gamma=3)", "quest", "moh",
    "head_pruning(heads=1)",
}
CHANGED = {  # entries leave while decoding, so every sample gets its own
    "h2o(budget=20)", "streaming_llm(budget=20)", "streaming_llm(budget=20,renumber=false)", "tova(budget=20)", "h2o(budget=66)",
    "h2o(budget=20)+d2o_merge(multiplicity=true)", "h2o(budget=20)+cam(expected=true)", "h2o(budget=20)+int_codes(bits=4)",
    "h2o(budget=20)+adakv", "arkv(budget=20,window=4)", "h2o(budget=30)+kivi(group=16,residual=16)",
}
KEEPS_UNTIL_DECODE = {"keydiff(budget=0.5,window=8)"}  # scores that go on evicting


def run(spec: str, samples: int, streams: torch.Tensor, model=None) -> tuple[Session, torch.Tensor]:
    session = Session(model or tiny_models.llama(), spec, new_tokens=STEPS, record=True)
    rows = [session.prefill(IDS, samples=samples)]
    rows += [session.step(streams[:, t]) for t in range(streams.shape[1])]
    return session, torch.stack(rows, 1)


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius distance. Where there are codes, a number may round to the next one on another processor: 1e-2 is a few
    of those, and a wrong entry would be far more."""
    return float((got - want).norm() / want.norm())


def common(session: Session) -> list[bool]:
    return [layer.common is not None for layer in session.cache.lab_layers]


@pytest.mark.parametrize("spec", sorted(KEPT | CHANGED))
def test_samples_are_runs_of_their_own(spec):
    """Logits, kept positions and every position's life, of each sample against a run by itself."""
    session, got = run(spec, SAMPLES, STREAMS)
    codes = session.cache.policy.encoder is not None  # the last bit of a code or of its scale may round the other way
    for n in range(SAMPLES):
        alone, want = run(spec, 1, STREAMS[n : n + 1])
        assert apart(got[n], want[0]) < (1e-2 if codes else 2e-5)
        for ours, theirs in zip(session.cache.lab_layers, alone.cache.lab_layers):
            lens = ours.counts[n * ours.heads : (n + 1) * ours.heads]
            assert lens == theirs.counts
            for head, held in enumerate(lens):
                assert ours.positions()[n, head, :held].sort().values.equal(theirs.positions()[0, head, :held].sort().values)
            for a, b in zip(ours.history.upto(ours.seen), theirs.history.upto(theirs.seen)):
                assert torch.equal(a[n], b[0])
    if spec in KEPT - KEEPS_UNTIL_DECODE:
        assert all(common(session)), "codes and kept entries of the prompt stay common for the whole run"
    elif spec in CHANGED:
        assert not any(common(session)), "what was evicted from is nobody's common cache any more"


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss", "mistral", "qwen3"])
@pytest.mark.parametrize("spec", ["dense", "int_codes(bits=4)", "h2o(budget=20)", "snapkv(budget=0.5,window=8)"])
def test_windows_caps_and_sinks(architecture, spec):
    model = tiny_models.build(architecture)
    _, got = run(spec, SAMPLES, STREAMS, model)
    for n in range(SAMPLES):
        want = run(spec, 1, STREAMS[n : n + 1], model)[1][0]
        assert apart(got[n], want) < (1e-2 if "codes" in spec else 5e-5)


def test_a_sliding_layer_lets_go_of_what_all_samples_have_left_behind():
    model, steps = tiny_models.build("mistral"), 150
    streams = torch.stack([tiny_models.tokens(steps, seed=n) for n in range(3)])
    session, got = run("dense", 3, streams, model)
    for n in range(3):
        want = run("dense", 1, streams[n : n + 1], model)[1][0]
        assert float((got[n] - want).abs().max() / want.abs().max()) < 5e-5
    assert all(layer.longest < layer.window + 65 for layer in session.cache.lab_layers)
    assert not any(common(session)), "the prompt has slid out of sight"


def test_dense_samples_hold_the_prompt_once():
    session, _ = run("dense", 8, STREAMS[:1].expand(8, -1))
    alone, _ = run("dense", 1, STREAMS[:1])
    per_token = alone.cache.kv_bytes // (PROMPT + STEPS)
    assert session.cache.kv_bytes == (PROMPT + 8 * STEPS) * per_token
    assert session.cache.slack_bytes <= 8 * 64 * per_token and session.cache.kept_fraction == 1


def test_bytes_grow_when_samples_part():
    """Four lanes over budget by one: until the first eviction the prompt is held once, after it four times."""
    session = Session(tiny_models.llama(), "h2o(budget=62)", new_tokens=STEPS)
    session.prefill(IDS, samples=SAMPLES)
    sizes = [session.cache.kv_bytes]
    for t in range(4):
        session.step(STREAMS[:, t])
        sizes.append(session.cache.kv_bytes)
    single = Session(tiny_models.llama(), "h2o(budget=62)", new_tokens=STEPS)
    single.prefill(IDS)
    assert sizes[0] == single.cache.kv_bytes and all(sizes[i] < SAMPLES * sizes[0] / 2 for i in (1, 2))
    assert sizes[3] == sizes[4] > 3.9 * sizes[0]


def layer_of(count: int = 12, heads: int = 2) -> LabLayer:
    g = torch.Generator().manual_seed(1)
    layer, (k, v) = LabLayer(0, track=True), torch.randn(2, 1, heads, count, DIM, generator=g)
    layer.update(k, v)
    layer.append(k, v, torch.arange(count)[None], None)
    return layer


def grown(layer: LabLayer, count: int = 3) -> None:
    k, v = torch.randn(2, layer.batch, layer.heads, count, DIM)
    at = torch.arange(layer.seen, layer.seen + count)
    layer.append(k, v, at.expand(layer.batch, -1), None)


def test_an_untouched_sample_does_not_see_anothers_eviction():
    layer = layer_of()
    layer.repeat(3)
    grown(layer)
    before, places = layer.all_keys().clone(), layer.positions().clone()
    mask = torch.ones(3, 2, 15, dtype=torch.bool)
    mask[1, :, 2:6] = False
    layer.keep(mask, 14)
    assert layer.common is None and layer.counts == [15, 15, 11, 11, 15, 15]
    for sample in (0, 2):
        assert torch.equal(layer.all_keys()[sample], before[sample])
        assert torch.equal(layer.positions()[sample], places[sample])
    assert layer.positions()[1, 0, :11].tolist() == [0, 1, *range(6, 15)]


def test_what_a_sample_added_leaves_without_a_copy():
    layer = layer_of()
    layer.repeat(2)
    grown(layer)
    size = layer.live_bytes
    layer.drop_one(torch.tensor([[12, 13], [14, 12]]), 14)
    assert layer.common is not None and layer.live_bytes == size - 4 * (2 * 4 * DIM + 4)
    mask = torch.ones(2, 2, 14, dtype=torch.bool)
    mask[0, :, 12:] = False
    layer.keep(mask, 14)
    assert layer.common is not None and layer.counts == [12, 12, 14, 14]


def test_a_fork_holds_the_same_common_entries_and_changes_alone():
    layer = layer_of()
    layer.repeat(2)
    twin = layer.clone()
    assert twin.common is layer.common
    grown(twin)
    twin.keep(torch.arange(15).expand(2, 2, -1) > 4, 14)
    assert twin.common is None and layer.common is not None and layer.counts == [12] * 4
    assert torch.equal(layer.all_keys()[0], layer_of().all_keys()[0])


def test_sequences_chosen_repeated_and_reordered_share_on():
    session = Session(tiny_models.llama(), "dense", new_tokens=STEPS)
    session.prefill(IDS, samples=3)
    session.step(STREAMS[:3, 0])
    session.cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    assert all(layer.common.batch == 4 for layer in session.cache.lab_layers)
    got = session.step(STREAMS[:, 1])
    for row, first in enumerate([2, 0, 0, 1]):
        alone = Session(tiny_models.llama(), "dense", new_tokens=STEPS)
        alone.prefill(IDS)
        alone.step(STREAMS[first : first + 1, 0])
        assert torch.allclose(got[row], alone.step(STREAMS[row : row + 1, 1])[0], atol=1e-4)
    session.cache.reset()
    assert all(layer.common is None and not layer.is_initialized for layer in session.cache.lab_layers)


@pytest.mark.parametrize("spec", [
    "dense", "snapkv(budget=0.5,window=8)", "int_codes(bits=4)", "kivi(group=16,residual=16)", "h2o(budget=20)",
])
def test_a_new_turn_after_samples(spec):
    """Several rows at once on a shared cache, then steps again; and a script's own `generate` goes on with it."""
    session, alone = (Session(tiny_models.llama(), spec, new_tokens=STEPS) for _ in range(2))
    session.prefill(IDS, samples=2), alone.prefill(IDS)
    turn = tiny_models.tokens(9, seed=3)[None]
    rows = []
    for each, streams in ((session, STREAMS[:2]), (alone, STREAMS[1:2])):
        each.step(streams[:, 0])
        with torch.inference_mode():
            out = each.model(turn.expand(len(streams), -1), past_key_values=each.cache).logits[:, -1]
        rows.append([out[-1], *(each.step(streams[:, t])[-1] for t in range(1, 5))])
    got, want = (torch.stack(x) for x in rows)
    assert float((got - want).abs().max() / want.abs().max()) < (2e-5 if "codes" not in spec and "kivi" not in spec else 5e-3)
    cache = LabCache(tiny_models.llama(), spec)
    ids = torch.tensor([IDS])
    tiny_models.llama()(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert all(layer.common is not None for layer in cache.lab_layers)
    twice = torch.cat([ids.expand(3, -1), torch.tensor([[7], [7], [7]])], 1)
    out = tiny_models.llama().generate(twice, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


class SharedMachine(LayerMachine):
    """A prompt of one sequence, sometimes narrowed or evicted from, becomes two or three samples; then anything may happen."""

    @initialize(
        heads=st.integers(1, 3), mode=st.sampled_from(["token", "channel", "sinks", "tiers"]), prompt=st.integers(5, 12),
        samples=st.integers(2, 3), seed=st.integers(0, 9999), first=st.sampled_from(["nothing", "keep", "code"]),
        slack=st.integers(0, 3),
    )
    def start(self, heads, mode, prompt, samples, seed, first, slack):
        self.layer = LabLayer(0, 0, track=True, slack=slack)
        self.layer.history = History(1, heads, 8)
        self.batch, self.heads, self.mode = 1, heads, mode
        self.lanes, self.fate = [[] for _ in range(heads)], [{} for _ in range(heads)]
        self.seen, self.others, self.places = 0, [], [0]
        self.key_codec = ChannelCodec(4, BLOCK) if mode == "channel" else TokenCodec(4, DIM)
        self.value_codec = TokenCodec(4, DIM)
        LayerMachine.append(self, count=prompt, seed=seed, padded=False)
        if first == "keep":
            LayerMachine.keep(self, seed=seed, share=0.6)
        least = min(map(len, self.lanes)) // BLOCK * BLOCK
        if first == "code" and mode in ("token", "channel") and least:
            for side in "kv":
                self.code_front(side, least)
        self.layer.repeat(samples)
        self.choose([0] * samples)
        assert self.layer.common is not None

    def code_front(self, side: str, count: int) -> None:
        codec = dict(k=self.key_codec, v=self.value_codec)[side]
        self.layer.code(dict(k="key", v="value")[side], codec, 0, count, self.seen - 1)
        for n, lane in enumerate(self.lanes):
            for e, x in zip(lane[:count], self.coded(codec, [e[side] for e in lane[:count]])):
                e[side], e[side + "bits"] = x, codec.bits
                if side == "k":
                    self.fate[n][e["pos"]] = (self.fate[n][e["pos"]][0], self.seen, codec.bits)

    @precondition(lambda self: self.started and max(map(len, self.lanes)) < MOST)
    @rule(seed=st.integers(0, 9999))
    def newest(self, seed):
        """What a decode step adds: one row for each sample."""
        LayerMachine.append(self, count=1, seed=seed, padded=False)

    @precondition(lambda self: self.started)
    @rule(seed=st.integers(0, 9999))
    def read(self, seed):
        """One row of two query heads per KV head, by the general path and, over exact rows, in two merged parts."""
        groups, layer = 2, self.layer
        q = torch.randn(self.batch, self.heads * groups, 1, DIM, generator=torch.Generator().manual_seed(seed))
        ctx = LayerContext(layer, 0, 1, "decode", q, None, layer.seen, 0.3, None, None, layer.seen)
        found = [general(ctx, [], [], True, False)]
        if layer.split is not None:
            found.append(one_row(ctx))
        for lane, entries in enumerate(self.lanes):
            b, h = divmod(lane, self.heads)
            if not entries:
                continue
            k, v = (torch.stack([e[side] for e in entries]) for side in "kv")
            p = torch.softmax(q[b, h * groups : (h + 1) * groups, 0] @ k.mT * 0.3, -1)
            for result in found:
                assert torch.allclose(result.out[b, h * groups : (h + 1) * groups, 0], p @ v, atol=1e-4)
            assert torch.allclose(found[0].mass[b, h, : len(entries)], p.sum(0), atol=1e-4)


SharedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=14)
TestShared = SharedMachine.TestCase


def test_positions_of_uneven_heads_that_dropped_rows_of_their_own():
    """Common and own entries both uneven: a place behind a short lane's end overwrites nothing."""
    layer = LabLayer(0, track=True)

    def add(count: int) -> None:
        batch = layer.batch if layer.is_initialized else 1
        k, v = torch.randn(batch, 2, count, 8), torch.randn(batch, 2, count, 8)
        layer.update(k, v)
        layer.append(k, v, torch.arange(layer.seen, layer.seen + count).expand(batch, -1), None)

    add(10)
    mask = torch.ones(1, 2, 10, dtype=torch.bool)
    mask[0, 1, 5:] = False
    layer.keep(mask, 9)
    layer.prompt_done = True
    layer.repeat(2)
    for _ in range(5):
        add(1)
    for _ in range(2):  # the first head of either sample lets two of its own rows go
        layer.drop_one(torch.tensor([[10, 5], [10, 5]]), layer.seen - 1, [0, 2])
    apart = layer.clone()
    apart.part()
    valid = layer.valid()
    assert layer.common is not None and torch.equal(layer.positions()[valid], apart.positions()[valid])
