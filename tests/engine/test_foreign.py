"""The lab's cache in anybody's script: `model.generate(..., past_key_values=LabCache(model, spec))`."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, llama, tokens

from lab.engine.attach import attach
from lab.engine.cache import LabCache
from lab.engine.session import Session
from lab.errors import LabError

STACKS = ["dense", "h2o(budget=12)", "streaming_llm(budget=12)", "kivi(bits=4,group=16,residual=16)",
          "snapkv(budget=20,window=8)+int_codes(bits=4)"]


@pytest.fixture(scope="module")
def eager():
    return build("llama", head_dim=16, max_position_embeddings=2048)


@pytest.mark.parametrize("batch", [1, 2])
def test_dense_beam_search_is_token_identical(eager, batch):
    ids = tokens(batch, 12)
    options = dict(max_new_tokens=10, num_beams=3, do_sample=False, early_stopping=False)
    want = eager.generate(ids, **options)
    assert torch.equal(llama().generate(ids, past_key_values=LabCache(llama()), **options), want)


@pytest.mark.parametrize("spec", STACKS)
def test_beam_search_reorders_every_tier(spec):
    """Beams carry their own cache: the best beam, refed token by token, has the score beam search gave it."""
    ids, new = tokens(1, 40), 8
    out = llama().generate(ids, past_key_values=LabCache(llama(), spec), max_new_tokens=new, num_beams=3, do_sample=False,
                           return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    session = Session(llama(), spec, chunk=None, new_tokens=new)
    logits, score = session.prefill(ids[0].tolist()), 0.0
    for token in out.sequences[0, 40:].tolist():
        score += float(logits.log_softmax(-1)[0, token])
        logits = session.step(torch.tensor([token]))
    assert float(out.sequences_scores[0]) == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize("spec", STACKS)
def test_sampled_sequences_and_streamers(spec):
    """num_return_sequences, do_sample and a streamer work; batches of equal prompts give equal greedy rows."""
    ids = tokens(1, 30)
    out = llama().generate(ids, past_key_values=LabCache(llama(), spec), max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, 35)
    seen = []

    class Streamer:
        def put(self, x):
            seen.append(x.flatten().tolist())

        def end(self):
            seen.append("end")

    one = llama().generate(ids, past_key_values=LabCache(llama(), spec), max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert seen[-1] == "end" and sum(seen[1:-1], []) == one[0, 30:].tolist()
    both = llama().generate(ids.expand(2, -1), past_key_values=LabCache(llama(), spec), max_new_tokens=5, do_sample=False)
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], one[0])


def test_a_prompt_in_chunks_waits_for_its_end_when_its_length_is_announced():
    ids, spec = tokens(1, 50), "snapkv(budget=20,window=8)"
    options = dict(max_new_tokens=6, do_sample=False)
    whole = llama().generate(ids, past_key_values=LabCache(llama(), spec), **options)
    chunked = llama().generate(ids, past_key_values=LabCache(llama(), spec, prompt=50), prefill_chunk_size=16, **options)
    assert torch.equal(whole, chunked)


def test_a_second_turn_equals_the_dense_model_and_refeeds_nothing(eager):
    ids, more = tokens(1, 20), tokens(1, 9, seed=3)
    cache, calls = LabCache(llama()), []
    hook = llama().register_forward_pre_hook(lambda m, a, kw: calls.append(kw["input_ids"].shape[1]), with_kwargs=True)
    try:
        first = llama().generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        turn = torch.cat([first, more], 1)
        second = llama().generate(turn, past_key_values=cache, max_new_tokens=5, do_sample=False)
    finally:
        hook.remove()
    assert torch.equal(second, eager.generate(turn, max_new_tokens=5, do_sample=False))
    assert calls == [20, 1, 1, 1, 1, 10, 1, 1, 1, 1]


def test_assisted_decoding_is_refused_rather_than_wrong():
    """Candidates would have to be rolled back, which a cache that evicts cannot do."""
    with pytest.raises(Exception) as error:
        llama().generate(tokens(1, 10), past_key_values=LabCache(llama()), max_new_tokens=5, do_sample=False,
                         assistant_model=build("llama", head_dim=16))
    assert "roll" in str(error.value).lower() or "crop" in str(error.value).lower() or "cache" in str(error.value).lower()


def test_an_impossible_budget_is_refused_before_anything_runs():
    with pytest.raises(LabError, match="must protect"):
        LabCache(llama(), "snapkv(budget=10)", prompt=100)
    with pytest.raises(LabError, match="Did you mean h2o"):
        LabCache(llama(), "h20")


def test_repeat_and_clone_of_a_cache():
    cache, ids = LabCache(llama(), "h2o(budget=12)"), tokens(1, 30)
    with torch.no_grad():
        llama()(ids, past_key_values=cache)
        twin = cache.clone()
        twin.repeat(2)
        step = tokens(2, 1, seed=4)
        a = llama()(step, past_key_values=twin).logits
        b = llama()(step[1:], past_key_values=cache).logits
    assert torch.allclose(a[1], b[0], atol=1e-5) and cache.get_seq_length() == twin.get_seq_length() == 31
    assert twin.entries == 2 * cache.entries


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "lfm2"])
def test_hybrids_keep_their_linear_layers(name):
    """Layers without attention keep transformers' own state; samples and forks carry it too."""
    extra = dict(
        num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ) if name != "lfm2" else dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
    try:
        model = build(name, **extra)
    except Exception as error:
        pytest.skip(f"this transformers does not build it: {error}")
    ids = tokens(1, 20)
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    attach(model)
    assert torch.equal(model.generate(ids, past_key_values=LabCache(model), max_new_tokens=8, do_sample=False), want)
    session = Session(model, "dense", chunk=None)
    logits, twin = session.prefill(ids[0].tolist(), samples=2), session.fork()
    for token in want[0, 20:].tolist():
        assert logits.argmax(-1).tolist() == [token] * 2
        logits = session.step(torch.tensor([token] * 2))
    assert torch.allclose(twin.step(want[:, 20].expand(2)), Session(model, "dense").prefill(want[0, :21].tolist()), atol=1e-4)
