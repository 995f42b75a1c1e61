"""Sessions and sampling: what a run is made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, llama, tokens

from lab.engine.sampling import Sampling
from lab.engine.session import Session
from lab.errors import LabError


def test_prefill_and_step_equal_the_model():
    ids = tokens(40).tolist()
    session = Session(llama(), "dense", chunk=16, new_tokens=5)
    got = [session.prefill(ids[:35])] + [session.step(torch.tensor([t])) for t in ids[35:]]
    with torch.no_grad():
        want = llama()(torch.tensor([ids])).logits[0, 34:]
    assert torch.allclose(torch.cat(got), want, atol=1e-4)
    assert session.last_ms > 0 and got[0].dtype == torch.float32


@pytest.mark.parametrize("before", [0, 200, 40])
def test_angles_that_grow_with_the_text_are_those_of_this_text(before):
    """Dynamic NTK: what the model has read before, and in what chunks a prompt is fed, changes nothing."""
    def fresh():
        return build("llama", head_dim=16, max_position_embeddings=32,
                     rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})

    ids, model = tokens(80).tolist(), fresh()
    session = Session(model, "dense", chunk=16, new_tokens=5)
    if before:
        session.prefill(tokens(before, seed=1).tolist())
    got = [session.prefill(ids[:76])] + [session.step(torch.tensor([t])) for t in ids[76:]]
    reference, cache, want = fresh(), None, []
    with torch.no_grad():
        for part in (ids[:76], *([t] for t in ids[76:])):
            out = reference(torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            want.append(out.logits[:, -1])
    assert torch.allclose(torch.cat(got), torch.cat(want), atol=1e-4)


def test_progress_is_shown_between_chunks_and_the_caller_may_stop():
    session = Session(llama(), "dense", chunk=10)
    steps = session.prefill_steps(tokens(35).tolist())
    assert next(steps) == pytest.approx(10 / 35) and next(steps) == pytest.approx(20 / 35)
    steps.close()
    assert session.cache.get_seq_length() == 20


def test_an_empty_prompt_is_refused():
    with pytest.raises(LabError, match="prompt is empty"):
        Session(llama(), "dense").prefill([])


@pytest.mark.parametrize("prompt", [1, 2, 3])
@pytest.mark.parametrize("spec", ["dense", "h2o", "streaming_llm(sinks=0)", "kivi", "int_codes", "zerotuning", "a_shape+delta"])
def test_very_short_prompts(prompt, spec):
    session = Session(llama(), spec, new_tokens=3)
    rows = [session.prefill(tokens(prompt).tolist())] + [session.step(torch.tensor([5])) for _ in range(3)]
    assert torch.isfinite(torch.cat(rows)).all()


def test_taps_keep_queries_and_keys_of_all_tokens():
    ids = tokens(30).tolist()
    session = Session(llama(), "h2o(budget=8)", chunk=10, capture=True, new_tokens=4)
    session.prefill(ids[:26])
    for t in ids[26:]:
        session.step(torch.tensor([t]))
    assert all(layer.tap is not None for layer in session.cache.lab_layers)
    twin = session.fork()
    assert all(layer.tap is None for layer in twin.cache.lab_layers)


# -- sampling ----------------------------------------------------------------------------------------------------------
LOGITS = st.integers(0, 10**6).map(lambda seed: torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 3)


@given(LOGITS)
@settings(max_examples=20)
def test_greedy_is_argmax(logits):
    sampling = Sampling()
    assert sampling.greedy and sampling.generator(torch.device("cpu")) is None
    assert torch.equal(sampling.pick(logits, None), logits.argmax(-1))


@given(LOGITS, st.integers(1, 25), st.integers(0, 99))
@settings(max_examples=40)
def test_top_k_picks_among_k(logits, k, seed):
    sampling = Sampling(temperature=1.5, top_k=k, seed=seed)
    picked = sampling.pick(logits, sampling.generator(logits.device))
    ranks = (logits > logits.gather(1, picked[:, None])).sum(-1)
    assert (ranks < k).all()


@given(LOGITS, st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=40)
def test_top_p_picks_among_the_smallest_set_that_reaches_p(logits, p, seed):
    sampling = Sampling(temperature=0.7, top_p=p, seed=seed)
    picked = sampling.pick(logits, sampling.generator(logits.device))
    probs = (logits / 0.7).softmax(-1)
    before = torch.where(probs > probs.gather(1, picked[:, None]), probs, torch.zeros_like(probs)).sum(-1)
    assert (before < p + 1e-6).all()


def test_a_seed_repeats_and_temperature_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(4000, -1)
    sampling = Sampling(temperature=1.0, seed=3)
    a, b = (sampling.pick(logits, sampling.generator(logits.device)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.allclose(torch.bincount(a, minlength=3) / 4000, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize("bad", [
    dict(temperature=-1), dict(temperature=11), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5), dict(temperature=float("nan")),
])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(LabError, match="out of range"):
        Sampling(**bad)
