"""Diagnostics that a person gives something to: documents, prompts, a place to look from; and the lab's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import from_weights, sink, uniform

from lab.errors import LabError
from lab.inspect.capture import Capture
from lab.inspect.diagnostics import Session, atlas, basin, groups, massive, own_kernels, registry, run, sink_inputs, sinks
from lab.inspect.diagnostics.deviation import compare, naive, tiled
from lab.inspect.diagnostics.probe import ModelProbe

torch.set_num_threads(1)


class Fake:
    """A probe whose attention is a function of the tokens."""

    device = "cpu"

    def __init__(self, attend, layers: int = 2) -> None:
        self.attend, self.layers = attend, layers
        self.model = type("Model", (), {"get_input_embeddings": lambda _: torch.nn.Embedding(50, 4)})()

    def attention(self, ids, first=0):
        w = self.attend(ids)
        return w[first:].expand(self.layers, 2, -1, -1)

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids % 8, 8).float()

    def states(self, x, mask=None):
        return [x, x * 2]


def test_every_input_is_declared_with_its_words():
    kinds = {"position", "number", "words", "text", "documents", "prompts"}
    given = [i for d in registry().values() for i in d.inputs]
    assert {i.name for i in given} >= {"output", "marked", "lists", "question", "first", "second", "head", "layer", "split"}
    assert all(i.kind in kinds and i.label and i.help.endswith(".") for i in given)
    assert all(len(i.example.splitlines()) >= 3 for i in given if i.kind in ("documents", "prompts"))


def ends(ids):
    """Documents of four tokens: the first and last get attention, and document 5 gets some wherever it stands."""
    t = len(ids)
    w = torch.ones(t) * 0.1
    w[:4], w[20:24] = 1.0, 1.0
    w[:24] += (ids[:24] == 5) * 0.5
    return (w / w.sum()).expand(t, t)


def test_shuffling_shows_the_place_and_tells_the_document():
    documents = [[n] * (4 + n % 2) for n in range(6)]
    session = Session(probe=Fake(ends), lists=documents, question=[40, 41, 42], options={"shuffles": 40})
    found = run("basin_shuffled", session)
    assert found["curve"].shape == (6,) and found["by_layer"].shape == (2, 6) and found["tokens"] == 4
    assert found["score"] > 0.02 and min(found["curve"][[0, 5]]) > max(found["curve"][1:5]) and found["content"].argmax() == 5
    low, high = found["interval"]
    assert (low <= found["curve"] + 1e-9).all() and (found["curve"] <= high + 1e-9).all()


@pytest.mark.parametrize("lists, words", [
    ([[1] * 9] * 2, "2 documents"), ([[1] * 9] * 3 + [[2, 2]], "Document 4 has only 2"), ([[1] * 200] * 12, "too many"),
])
def test_documents_that_cannot_be_shuffled_are_named(lists, words):
    with pytest.raises(LabError, match=words):
        run("basin_shuffled", Session(probe=Fake(ends), lists=lists, question=[1, 2]))
    with pytest.raises(LabError, match="at least three documents"):
        run("basin_shuffled", Session(probe=Fake(ends), question=[1]))


def test_orders_of_the_same_documents_agree_with_one_by_hand():
    probe, docs = Fake(ends), basin.even([[n] * 4 for n in range(6)], [40])
    got = basin.ordered(probe, docs, [40, 41], [3, 1, 2, 0, 5, 4])
    ids = torch.tensor([3] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [5] * 4 + [4] * 4 + [40, 41])
    want = ends(ids)[-1][:24].view(6, 4).mean(1)
    np.testing.assert_allclose(got, want.double().expand(2, 6), atol=1e-6)


def test_two_sets_of_prompts_are_measured_and_told_apart():
    def attend(ids):
        return sink(len(ids), 0.9) if int(ids[0]) == 1 else uniform(len(ids))

    prompts = {"parked": [[1, *range(2, 8 + n)] for n in range(5)], "even": [[2, *range(2, 8 + n)] for n in range(5)]}
    found = run("groups", Session(probe=Fake(attend), prompts=prompts))
    d, q = (dict(zip(found["metrics"], found[name])) for name in ("d", "q"))
    assert d["sink"] > 3 and d["entropy"] < -1 and q["sink"] < 0.05 and d["tokens"] == 0 and found["auroc"] > 0.9
    assert found["means"].shape == (2, len(found["metrics"]))
    one = groups.measure(Fake(attend), prompts["even"][0])
    assert one["entropy"] == pytest.approx(np.mean([np.log(i) for i in range(1, 8)]), abs=1e-4)
    with pytest.raises(LabError, match="fewer than four tokens"):
        run("groups", Session(probe=Fake(attend), prompts={"a": [[1, 2]] * 3, "b": [[1] * 9] * 3}))
    with pytest.raises(LabError, match="sets hold 5 and 2"):
        run("groups", Session(probe=Fake(attend), prompts={**prompts, "even": prompts["even"][:2]}))
    with pytest.raises(LabError, match="prompts for each set"):
        run("groups", Session(probe=Fake(attend)))


def test_sinks_without_meaning_on_planted_attention():
    parked = run("sink_inputs", Session(probe=Fake(lambda ids: sink(len(ids), 0.6)), token_ids=list(range(100))))
    assert parked["rates"].shape == (4, 4) and (parked["rates"][:, :3] == 1).all() and (parked["rates"][:, 3] == 0).all()
    even = run("sink_inputs", Session(probe=Fake(lambda ids: uniform(len(ids))), token_ids=list(range(100))))
    assert (even["rates"] == 0).all()
    np.testing.assert_allclose(even["received"][0][0], np.mean([1 / i for i in range(1, 65)]), atol=1e-5)
    assert {tuple(sorted(set(row.tolist()))) for row in sink_inputs.texts(range(90), 50, "one token repeated")}
    own, cut = (sink_inputs.texts(range(90), 50, k, 3) for k in sink_inputs.KINDS[:2])
    assert (cut == own + 1).all() and own.shape == (3, 64)
    with pytest.raises(LabError, match="only 3 tokens"):
        run("sink_inputs", Session(probe=Fake(uniform), token_ids=[1, 2, 3]))


def test_a_key_bias_is_a_constant_advantage():
    q, k = torch.ones(1, 40, 2), torch.zeros(1, 40, 2)
    k[0, 0, 0] = 5
    mean, spread = sinks.advantage(Capture(q, k, scale=1.0))
    assert mean[0] == pytest.approx(5, abs=1e-5) and spread[0] == pytest.approx(0, abs=1e-6)
    q[0, ::2] *= 2
    assert sinks.advantage(Capture(q, k, scale=1.0))[1][0] > 1


def test_strength_by_distance_of_known_heads():
    t = 40
    before = torch.zeros(t, t)
    before[0, 0] = 1
    before[torch.arange(1, t), torch.arange(t - 1)] = 1
    assert atlas.strength(from_weights([torch.eye(t)]))[0] == pytest.approx(1, abs=1e-4)
    assert atlas.strength(from_weights([before]))[1] == pytest.approx(1, abs=1e-4)
    even = atlas.strength(from_weights([uniform(t)]))
    assert even.sum() == pytest.approx(1, abs=1e-4)
    shares, names = atlas.reached(even[None], t)
    assert names == ["0", "1", "2 to 3", "4 to 7", "8 to 15", "16 or more"] and shares.sum() == pytest.approx(1, abs=1e-4)
    assert even[0] == pytest.approx(np.mean([1 / i for i in range(2, t + 1)]), abs=1e-4)


@pytest.mark.parametrize("name", list(own_kernels.kernels(torch.device("cpu"))))
@pytest.mark.parametrize("label", list(own_kernels.DTYPES))
def test_own_kernels_are_exact_but_for_rounding(name, label):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, 16, generator=g, dtype=torch.float64) for _ in range(3))
    dtype, attend = own_kernels.ways(torch.device("cpu"))[f"{name} | {label}"]
    ways = {"own": (dtype, attend), "naive": (dtype, naive), "worst": (dtype, lambda *a: tiled(*a, 16, late=False))}
    found = compare(q, k, v, 0.25, ways)
    assert found["own"][1] < {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[label]
    assert label == "float32" or found["own"][1] < found["worst"][1]


def test_deviation_chooses_its_layer_and_head_or_says_why_not():
    torch.manual_seed(0)
    captures = [Capture(torch.randn(4, 40, 8), torch.randn(2, 40, 8), layer=n) for n in (2, 5)]
    found = run("deviation", Session(captures=captures, options={"layer": 2, "head": 3}))
    assert (
        (found["shown_layer"], found["shown_head"]) == (2, 3) and found["kernel_rms"].shape == (3, 3)
        and (found["kernel_rms"][:, 0] < 0.01).all()
    )
    with pytest.raises(LabError, match="Captured layers are 2, 5"):
        run("deviation", Session(captures=captures, options={"layer": 3}))
    with pytest.raises(LabError, match="Heads are numbered 0 to 3"):
        run("deviation", Session(captures=captures, options={"head": 9}))


@pytest.fixture(scope="module")
def probe() -> ModelProbe:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    )
    return ModelProbe(transformers.LlamaForCausalLM(config).eval())


def test_an_edit_that_changes_nothing_changes_nothing(probe):
    x = probe.embed(torch.arange(20)[None])
    plain = probe.logits(x)
    assert torch.equal(probe.logits(x, edit=(1, lambda h: h)), plain)
    assert not torch.allclose(probe.logits(x, edit=(1, torch.zeros_like)), plain)
    weights = probe.attention(torch.arange(20), first=15)
    assert weights.shape == (3, 4, 5, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 5))
    torch.testing.assert_close(weights, probe.attention(torch.arange(20))[:, :, 15:])


def test_interventions_replace_the_spot_by_zero_and_by_its_mean(probe):
    ids = torch.randint(64, (120,), generator=torch.Generator().manual_seed(0))
    flags = np.array([[2, 0, 3, 500.0, 2000.0]])
    same, zero, mean = massive.interventions(probe, ids, [], flags)
    loss = torch.nn.functional.cross_entropy(probe.logits(probe.embed(ids[None]))[0, :-1], ids[1:])
    assert same == pytest.approx(float(loss.detach().exp()), rel=1e-5)
    cut = probe.logits(probe.embed(ids[None]), edit=(1, lambda h: torch.stack([massive.replace(one, [(0, 3)]) for one in h])))
    assert zero == pytest.approx(float(torch.nn.functional.cross_entropy(cut[0, :-1], ids[1:]).detach().exp()), rel=1e-5)
    assert np.isfinite(mean)
    hidden = [torch.randn(120, 32) for _ in range(4)]
    hidden[2][0, 3] = 1e5
    assert np.isfinite(run("massive", Session(hidden=hidden, probe=probe, token_ids=ids.tolist()))["perplexity"]).all()
    assert np.isnan(run("massive", Session(hidden=hidden))["perplexity"]).all()
