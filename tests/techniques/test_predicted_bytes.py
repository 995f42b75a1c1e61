"""Predicted bytes equal stored bytes wherever nothing about the text decides them."""

import pytest
import torch
from techniques.cases import CASES
from tiny_models import llama, tokens

from lab.engine.session import Session
from lab.measure.cost import predict
from lab.measure.record import dense_bytes

FACTS = {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "parameters": 1}
IDS = tokens(140, seed=1).tolist()
EXACT = (
    "adakv arkv_score cam d2o_budget d2o_merge expected_attention fp8 global_top hrp keydiff knorm kvquant kvzip min_variance "
    "random_score rotated think tova uniform vatp"
).split()
MORE = ("adakv+h2o(budget=40)+int_codes", "vatp(budget=40,first=4,wo=true)", "d2o_merge+h2o(budget=40)",
        "rotated(mode=inner)+snapkv(budget=50)", "rotated(mode=quarot)+h2o(budget=50)")


@pytest.mark.parametrize("spec", [*(CASES[n].lossy for n in EXACT), *MORE])
def test_prediction_is_exact(spec):
    session = Session(llama(), spec, chunk=50)
    session.prefill(IDS[:120])
    assert predict(FACTS, spec, 120, 120).kv_bytes == session.cache.kv_bytes
    for t in IDS[120:]:
        session.step(torch.tensor([t]))
    assert predict(FACTS, spec, 120, 140).kv_bytes == session.cache.kv_bytes


SHARED = ("dense", "int_codes", "int_codes(bits=4,sinks=2)", "kivi(group=16,residual=32)", "kivi(group=32,residual=32,bits=4)",
          "kivi", "snapkv(budget=50)+kivi(group=16,residual=16)", "h2o(budget=40)", "h2o(budget=150)",
          "streaming_llm(budget=0.5)", "snapkv(budget=50)", "snapkv(budget=50)+int_codes(bits=2)", "snapkv(budget=50)+adakv",
          "snapkv(budget=50,window=8)+pyramidkv(window=8)")


@pytest.mark.parametrize("spec", [*(CASES[n].lossy for n in EXACT), *MORE, *SHARED])
def test_what_samples_share_is_predicted_too(spec):
    """The prompt once, or copies where a stack changes it: before the first step, after it, and after twenty."""
    session = Session(llama(), spec, chunk=50, new_tokens=20)
    session.prefill(IDS[:120], samples=3)
    # running statistics of their own are common until the first step; the prediction counts them for each sample at once
    statistics = "d2o_merge" in spec or "wo=true" in spec
    for at in range(120, 141):
        if at in (121, 129, 140) or at == 120 and not statistics:
            assert predict(FACTS, spec, 120, at, trials=3).kv_bytes == session.cache.kv_bytes, at
        if at < 140:
            session.step(torch.tensor([IDS[at], IDS[at - 1], IDS[at]]))
    assert predict(FACTS, "dense", 120, 140, trials=3).kv_bytes == dense_bytes(session.cache)


def test_policies_that_depend_on_the_text_are_predicted_roughly():
    """ARKV's split is not known beforehand: predicted as if nothing were quantised. DWB is predicted at its target."""
    for spec, low, high in (("arkv(budget=40,window=8)", 0.5, 1.01), ("dwb(target=4)", 0.9, 1.3)):
        session = Session(llama(), spec, chunk=50)
        session.prefill(IDS[:120])
        for t in IDS[120:]:
            session.step(torch.tensor([t]))
        assert low <= session.cache.kv_bytes / predict(FACTS, spec, 120, 140).kv_bytes <= high
