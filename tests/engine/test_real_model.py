"""The bundled real model: dense is transformers' own generate token for token; techniques do what they promise.

Marked `model`: skipped, with the reason, where the model cannot be had.
"""

from __future__ import annotations

import pydoc_data.topics
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from lab.engine.attach import is_attached
from lab.engine.cache import LabCache
from lab.engine.session import Session
from lab.errors import LabError

pytestmark = [pytest.mark.model, pytest.mark.slow]
PROMPTS = [
    "The most surprising thing about octopuses is",
    "Write a short story about a lighthouse keeper who collects lost letters.\n\n",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
]
NEW = 200


@pytest.fixture(scope="module")
def loaded():
    from lab.models import load

    try:
        return load("default", device="cpu", dtype="float32", weights="float32")
    except (LabError, OSError) as error:
        pytest.skip(f"the default model is not available: {error}")


@pytest.fixture(scope="module")
def eager(loaded):
    """The same weights as transformers reads them, never attached."""
    from lab.models.sources import locate

    model = AutoModelForCausalLM.from_pretrained(locate("default").folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert not is_attached(model)
    return model


@pytest.fixture(scope="module")
def prose(loaded):
    """A few hundred tokens of English that every Python carries."""
    text = pydoc_data.topics.topics["assignment"]
    return loaded.tokenizer(text)["input_ids"][:408]


def free_run(session: Session, ids: list[int], new: int) -> list[int]:
    logits, out = session.prefill(ids), []
    for _ in range(new):
        out.append(int(logits.argmax()))
        logits = session.step(torch.tensor(out[-1:]))
    return out


@pytest.mark.parametrize("prompt", PROMPTS, ids=["fact", "story", "code"])
def test_dense_is_token_identical_to_generate(loaded, eager, prompt):
    """Greedy, float32, 200 tokens, through our session and through generate with our cache."""
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    want = eager.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(want) == NEW
    session = Session(loaded.model, "dense", new_tokens=NEW)
    stop = eager.generation_config.eos_token_id
    logits, got = session.prefill(ids[0].tolist()), []
    for _ in range(NEW):
        for token in [stop] if isinstance(stop, int) else stop or []:
            logits = logits.index_fill(1, torch.tensor([token]), -torch.inf)  # as min_new_tokens does
        got.append(int(logits.argmax()))
        logits = session.step(torch.tensor(got[-1:]))
    assert got == want
    ours = loaded.model.generate(
        ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, past_key_values=LabCache(loaded.model, "dense")
    )
    assert ours[0, ids.shape[1] :].tolist() == want[:40]


@pytest.fixture(scope="module")
def kl(loaded, prose):
    """Mean KL(dense || spec) in nats over the last 24 tokens of the prose, teacher-forced; each stack runs once."""
    prompt = 384

    @cache
    def forced(spec: str) -> torch.Tensor:
        session = Session(loaded.model, spec, new_tokens=len(prose) - prompt)
        rows = [session.prefill(prose[:prompt])] + [session.step(torch.tensor([t])) for t in prose[prompt:-1]]
        return torch.cat(rows).log_softmax(-1)

    def mean(spec: str) -> float:
        dense = forced("dense")
        return float((dense.exp() * (dense - forced(spec))).sum(-1).mean())

    return mean


@pytest.mark.parametrize("spec,most", [
    ("int_codes(bits=8)", 0.01), ("kivi(bits=8,group=64)", 0.01), ("kivi(bits=4)", 0.3), ("h2o(budget=0.5)", 1.0),
    ("snapkv(budget=0.5)", 1.0), ("streaming_llm(budget=0.5)", 3.0), ("zerotuning(gamma=1)", 1e-5),
    ("a_shape(window=4096)", 1e-5),
])
def test_techniques_stay_close_to_dense(kl, spec, most):
    """The difference a technique makes on real text is in the expected range."""
    assert -1e-6 < kl(spec) < most


def test_pairs_are_ordered_as_theory_says(kl):
    """More bits and larger budgets are closer to dense; KIVI beats per-token codes at two bits (outlier channels)."""
    assert kl("int_codes(bits=8)") < kl("int_codes(bits=4)")
    assert kl("kivi(bits=2)") < kl("int_codes(bits=2)")
    assert kl("streaming_llm(budget=0.5)") < kl("streaming_llm(budget=0.1,sinks=0)")


def test_a_stack_frees_memory_and_text_goes_on(loaded, prose):
    session = Session(loaded.model, "h2o(budget=0.25)+kivi(bits=2)", new_tokens=12)
    out = free_run(session, prose, 12)
    facts = loaded.facts
    assert session.cache.kv_bytes < 0.25 * facts.kv_bytes_per_token * (len(prose) + 11)
    assert 0.2 < session.cache.kept_fraction < 0.3 and len(set(out)) > 3
