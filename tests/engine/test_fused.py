"""The kernels' view of a layer gives what the torch paths give; on a GPU, through Triton, the same and with graphs of tokens."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from kernels.prefill import api as prefill_api
from kernels.prefill import rectify
from lab.engine import fused, pipeline
from lab.engine.session import Session

SPECS = ["dense", "h2o(budget=24)", "h2o(budget=24,recent=0.1)", "snapkv(budget=0.5,window=8)", "int_codes(bits=8)",
         "int_codes(bits=4)", "int_codes(bits=2)", "h2o(budget=24)+int_codes(bits=4)", "snapkv(budget=0.4,window=8)+adakv",
         "streaming_llm(budget=20,renumber=false)"]


def steps(model, spec, count=6, prompt=60):
    session = Session(model, spec, new_tokens=16)
    ids = tiny_models.tokens(prompt + count, seed=3).tolist()
    rows = [session.prefill(ids[:prompt])]
    device = session.device
    return torch.stack(rows + [session.step(torch.tensor([t], device=device)) for t in ids[prompt:]])


def fuse_everywhere(monkeypatch):
    """Send every step the kernels can serve through them, on whatever device, and count the steps."""
    served = []
    original = fused.one_row

    def counted(ctx, want_mass):
        got = original(ctx, want_mass)
        served.append(got is not None)
        return got

    monkeypatch.setattr(pipeline, "fusable", lambda q: True)
    monkeypatch.setattr(pipeline, "dense_fits", lambda store: False)
    monkeypatch.setattr(pipeline.steady, "run", lambda *_: None)
    monkeypatch.setattr(fused, "one_row", counted)
    return served


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_see_the_same_entries(spec, monkeypatch):
    model = tiny_models.llama()
    expected = steps(model, spec)
    served = fuse_everywhere(monkeypatch)
    assert torch.allclose(steps(model, spec), expected, atol=2e-4)
    assert served and all(served)


@pytest.mark.parametrize("spec,by_kernel", [
    ("rotated(mode=quarot,bits=4)", True), ("rotated(bits=8)", True), ("rotated(mode=quarot,bits=4)+h2o(budget=24)", False),
    ("rotated(bits=3)", False),
])
def test_turned_codes_are_read_as_turned(spec, by_kernel, monkeypatch):
    """Codes of a rotated vector look like any others; read without the rotation they are noise. Its rounding may move a code."""
    model = tiny_models.llama()
    expected = steps(model, spec)
    served = fuse_everywhere(monkeypatch)
    assert (steps(model, spec) - expected).abs().max() < 0.02 * expected.abs().max() and set(served) == {by_kernel}


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "mistral", "gpt_oss", "gpt2"])
def test_windows_caps_and_sinks(architecture, monkeypatch):
    model = tiny_models.build(architecture)
    expected = steps(model, "dense")
    fuse_everywhere(monkeypatch)
    assert torch.allclose(steps(model, "dense"), expected, atol=2e-4)


@pytest.mark.parametrize("spec", [
    "kivi(group=16,residual=16)", "streaming_llm(budget=20)", "zerotuning(gamma=3)", "tova(budget=20)",
])
def test_what_the_kernels_do_not_serve_takes_the_torch_path(spec, monkeypatch):
    model = tiny_models.llama()
    expected = steps(model, spec)
    fuse_everywhere(monkeypatch)
    assert torch.allclose(steps(model, spec), expected, atol=2e-4)


@pytest.mark.parametrize("spec", [
    "a_shape(sinks=2,window=16)", "a_shape(sinks=2,window=16)+h2o(budget=24)", "a_shape(window=16)+delta(gamma=8)",
])
def test_prompts(spec, monkeypatch):
    model = tiny_models.llama()
    expected = steps(model, spec)
    fuse_everywhere(monkeypatch)
    assert torch.allclose(steps(model, spec), expected, atol=2e-4)


@pytest.mark.parametrize("spec,served,interpreted", [
    ("rectified(block=16,share=0.5)", True, False), ("rectified(block=16,share=0.5)", True, True),
    ("xattention(block=16,tau=0.5)", True, False), ("rectified(block=16,share=0.5,rectify=false)", True, False),
    ("rectified(block=8)", False, False), ("rectified(block=16)+h2o(budget=24)", False, False),
])
@pytest.mark.parametrize("chunk", [512, 23])
def test_prompts_by_blocks(spec, served, interpreted, chunk, monkeypatch):
    """Whole blocks are read by the block-sparse kernel, in one piece or many, and what the newest row read is noted."""
    if interpreted and (chunk != 23 or torch.cuda.is_available()):
        pytest.skip("one length is enough in the interpreter, and a GPU has tests of its own")
    model = tiny_models.llama()
    ids = tiny_models.tokens(60, seed=3).tolist()

    def prompt():
        session = Session(model, spec, new_tokens=16, chunk=chunk)
        return session.prefill(ids), [layer.last_read for layer in session.cache.lab_layers]

    expected, _ = prompt()
    fuse_everywhere(monkeypatch)
    calls, original = [], fused.block_rows
    monkeypatch.setattr(fused, "block_rows", lambda *args: calls.append(original(*args)) or calls[-1])
    if interpreted:
        pytest.importorskip("triton")
        monkeypatch.setattr(prefill_api, "choose", lambda *_: "triton")
        monkeypatch.setattr(rectify, "choose", lambda *_: "triton")
    got, read = prompt()
    assert torch.allclose(got, expected, atol=2e-4)
    assert (bool(calls) and all(c is not None for c in calls)) == served
    assert all(0 < n <= 60 * model.config.num_key_value_heads for n in read)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", SPECS + [
    "rotated(mode=quarot,bits=4)", "rotated(bits=4)", "rectified(block=16,share=0.5)", "kivi(group=16,residual=16)",
    "a_shape(window=16)+delta(gamma=8)", "streaming_llm(budget=20)",
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(spec, dtype, monkeypatch):
    """Through Triton as through torch on the same device. In bfloat16 what is rounded decides which entry leaves and which code a
    number gets, so both are compared with float32 and ours may be no further from it than torch's own path."""
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=2048).to("cuda", dtype)
    got = steps(model, spec)
    monkeypatch.setattr(pipeline, "fusable", lambda q: False)
    monkeypatch.setattr(Session, "_prepare_graph", lambda self, batch: self._leave_graph("asked for"))
    theirs = steps(model, spec)
    if dtype == torch.float32:
        assert (got - theirs).abs().mean() < 5e-3 * theirs.abs().mean()
        return
    exact = steps(model.float(), spec)
    off, theirs_off = (float((x - exact).abs().mean() / exact.abs().mean()) for x in (got, theirs))
    assert off < max(0.1, 2 * theirs_off)
