"""The body of a captured decode step, run eagerly: it gives what ordinary steps give; on a GPU, captured."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from kernels import codes
from kernels.encode.evict import evict
from lab.engine.graph import GraphedDecode, why_not
from lab.engine.session import Session
from lab.engine.steady import FILLING, Unfit
from lab.engine.steady import exact as steady_exact
from lab.engine.steady import paged as steady_paged
from lab.engine.steady import step as steady_step
from lab.techniques import registry
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GRAPHABLE = ["dense", "snapkv(budget=0.5,window=8)", "snapkv(budget=0.5,window=8)+pyramidkv(window=8)",
             "snapkv(budget=0.5,window=8)+adakv", "a_shape(sinks=2,window=16)", "a_shape(sinks=2,window=16)+delta(gamma=8)",
             "head_pruning(heads=1)", "zerotuning(gamma=2)"]
CHOOSING = ["quest(budget=0.2,page=4,dense_layers=1)", "quest(budget=72,page=8,dense_layers=0)",
            "quest(budget=0.93,page=4,dense_layers=0)", "quest(budget=0.2,page=16,dense_layers=0)+head_pruning(heads=1)",
            "snapkv(budget=0.5,window=8)+adakv+quest(budget=0.2,page=4,dense_layers=0)",
            "block_topk(budget=0.1,page=4,local=10)", "block_topk(budget=20,page=8,sinks=0,local=1)",
            "block_topk(budget=0.2,page=7,sinks=5,local=9)+head_pruning(heads=1)"]
CHANGING = ["streaming_llm(budget=20)", "streaming_llm(budget=20,renumber=false)", "h2o(budget=20)", "h2o(budget=20,norm=true)",
            "tova(budget=20)", "keydiff(budget=20,window=4)", "streaming_llm(budget=20)+zerotuning(gamma=3)",
            "h2o(budget=20)+pyramidkv(window=8)"]
CODING = ["int_codes", "int_codes(bits=4)", "int_codes(bits=2)", "snapkv(budget=0.5,window=8)+int_codes(bits=4)",
          "int_codes+zerotuning(gamma=3)", "kivi(group=16,residual=16)", "kivi(group=32,residual=32,bits=4)",
          "snapkv(budget=0.7,window=8)+kivi(group=16,residual=32)", "kivi(group=16,residual=16)+head_pruning(heads=1)",
          "h2o(budget=20)+int_codes(bits=4)", "fp8", "rotated(bits=4)", "rotated(mode=quarot,bits=4)",
          "rotated(bits=8,value_bits=4)", "rotated(mode=inner,bits=4)",
          "h2o(budget=20)+rotated(bits=4)", "snapkv(budget=0.5,window=8)+rotated(mode=quarot)", "rotated+zerotuning(gamma=3)"]
OTHERS = ["quest+int_codes", "block_topk(mode=random)", "snapkv(budget=0.5,window=8)+adakv+block_topk(budget=0.1,page=4)",
          "quest(dense_layers=0)+zerotuning(gamma=2)",
          "moh", "h2o(budget=20)+kivi(group=16,residual=16)", "h2o(budget=20)+cam", "int_codes(sinks=2)"]
STEPS = 30


def prepared(model, spec, samples=1):
    session = Session(model, spec, new_tokens=STEPS + 6, record=True)
    ids = tiny_models.tokens(60 + STEPS, seed=5).tolist()
    return session, session.prefill(ids[:60], samples=samples), ids[60:]


def life(session) -> torch.Tensor:
    return torch.stack([torch.cat([x.long() for x in layer.history.upto(layer.seen)], -1) for layer in session.cache.lab_layers])


@pytest.mark.parametrize("spec,samples", [(spec, 1) for spec in (*GRAPHABLE, *CHOOSING, *CHANGING, *CODING)] + [
    ("snapkv(budget=0.5,window=8)+adakv", 2), ("streaming_llm(budget=20)", 2), ("h2o(budget=20)", 2),
    ("kivi(group=16,residual=16)", 2)])
def test_the_body_is_an_ordinary_step(spec, samples):
    model = tiny_models.llama()
    session, _, ids = prepared(model, spec, samples)
    other, _, _ = prepared(model, spec, samples)
    other.cache.policy.not_in_place = "asked for"
    assert why_not(session.cache) is None
    near = 2e-1 if spec in CODING else 1e-4  # of logits around 10: one code may round the other way
    with torch.inference_mode():
        graph = GraphedDecode(model, session.cache, samples, STEPS, capture=False)
        for token in ids:
            step = torch.full((samples,), token)
            assert torch.allclose(graph.step(step), other.step(step), atol=near)
            assert session.cache.kv_bytes == other.cache.kv_bytes and session.cache.kept_fraction == other.cache.kept_fraction
            assert session.cache.read_fraction == other.cache.read_fraction
    twin, theirs = session.fork(), other.fork()
    follow = torch.full((samples,), 9)
    assert torch.allclose(twin.step(follow), theirs.step(follow), atol=near)
    assert (life(session) == life(other)).float().mean() > 0.98
    graph.release()
    for ours, theirs in zip(session.cache.lab_layers, other.cache.lab_layers):
        assert ours.static is None and torch.equal(ours.positions().sort(-1).values, theirs.positions().sort(-1).values)
        if spec not in CODING:
            assert torch.equal(ours.positions(), theirs.positions())
            assert torch.allclose(ours.all_keys(), theirs.all_keys(), atol=1e-5)
    assert torch.allclose(session.step(follow), other.step(follow), atol=near)  # steps go on from there
    with pytest.raises(IndexError):
        graph.left = 0
        graph.step(follow)


class NoSync(TorchDispatchMode):
    """Refuses what would make a host wait for a device, or size a tensor by its contents."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not any(name.startswith(bad) for bad in self.FORBIDDEN), f"{name} inside a captured step"
        if name.startswith("index.Tensor") or name.startswith("index_put"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask inside a captured step"
        return func(*args, **(kwargs or {}))


def places(session) -> list[int]:
    """Where everything a session's layers store lies."""
    tables = []
    for layer in session.cache.lab_layers:
        for part in layer._parts():
            tables += [part.rows, *([part.blocks] if hasattr(part, "blocks") else [])] if hasattr(part, "rows") else [part]
    return [field.data_ptr() for table in tables for field in table.fields.values()]


@pytest.mark.parametrize("spec", [*GRAPHABLE, *CHOOSING, *CHANGING, *CODING])
def test_a_captured_step_never_waits_and_keeps_its_tensors(spec, monkeypatch):
    """The attention and encode kernels are known to be safe; their references and numpy stand-ins, which run here, are not."""
    model = tiny_models.llama()
    session, _, ids = prepared(model, spec)

    def aside(owner, name):
        original = getattr(owner, name)

        def called(*args, **options):
            with _disable_current_modes():
                return original(*args, **options)

        monkeypatch.setattr(owner, name, called)

    aside(steady_step.decode, "attend")
    aside(steady_paged.select, "attend_best")
    monkeypatch.setattr(steady_exact.encode, "evict", lambda *args, **options: evict(*args, **{**options, "impl": "torch"}))
    monkeypatch.setattr(codes, "FEW", 0)
    with torch.inference_mode():
        graph = GraphedDecode(model, session.cache, 1, STEPS, capture=False, shorten=False)
        before = places(session)
        for token in ids[:6]:
            graph.ids.fill_(token)
            with NoSync():
                graph._forward()
                graph.clock.advance()
            for layer in session.cache.lab_layers:
                layer.static.count()
        assert places(session) == before


@pytest.mark.parametrize("spec", ["streaming_llm(budget=20)", "h2o(budget=20)", "int_codes(bits=4)", "kivi(group=16,residual=16)",
                                  "h2o(budget=20)+int_codes", "quest(budget=0.2,page=4,dense_layers=0)"])
def test_trial_runs_leave_no_trace(spec):
    """What a capture does before it records: attend without changing, then whole steps whose changes are put back."""
    model = tiny_models.llama()
    session, _, ids = prepared(model, spec)
    other, _, _ = prepared(model, spec)
    with torch.inference_mode():
        graph, plain = (GraphedDecode(model, s.cache, 1, STEPS, capture=False) for s in (session, other))
        graph.ids.fill_(77)
        graph.clock.trial = True
        graph._forward()
        graph.clock.trial = False
        altered = [x for layer in session.cache.lab_layers for x in layer.static.changed()]
        before = [x.clone() for x in altered]
        for _ in range(2):
            graph._forward()
        for x, old in zip(altered, before):
            x.copy_(old)
        for token in ids:
            assert torch.allclose(graph.step(torch.tensor([token])), plain.step(torch.tensor([token])), atol=1e-5)


def test_a_cache_still_filling_is_asked_again():
    session, _, ids = prepared(tiny_models.llama(), "h2o(budget=64)")
    assert why_not(session.cache) == FILLING
    for token in ids[:5]:
        session.step(torch.tensor([token]))
    assert why_not(session.cache) is None


@pytest.mark.parametrize("name", sorted(n for n, t in registry().items() if "encode" in t.slots))
def test_whatever_codes_is_captured_right_or_refused(name):
    """Every code of the registry: a captured step either gives the ordinary numbers or is refused with a reason."""
    model = tiny_models.build("llama", head_dim=64)
    session, _, ids = prepared(model, name)
    other, _, _ = prepared(model, name)
    other.cache.policy.not_in_place = "asked for"
    if why_not(session.cache) is not None:
        return
    with torch.inference_mode():
        try:
            graph = GraphedDecode(model, session.cache, 1, STEPS, capture=False)
        except Unfit:
            return
        for token in ids[:8]:
            a, b = graph.step(torch.tensor([token])), other.step(torch.tensor([token]))
            assert (a - b).abs().mean() < 0.03 * b.abs().mean()


@pytest.mark.parametrize("spec", OTHERS)
def test_other_stacks_say_why_not(spec):
    session, _, _ = prepared(tiny_models.llama(), spec)
    reason = why_not(session.cache)
    if reason is None:
        with torch.inference_mode(), pytest.raises(Unfit) as refusal:
            GraphedDecode(session.model, session.cache, 1, STEPS, capture=False)
        reason = str(refusal.value)
        assert all(layer.static is None for layer in session.cache.lab_layers)
    assert "the stack" in reason or "stored unevenly" in reason


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_sliding_layers_say_why_not(architecture):
    session, _, _ = prepared(tiny_models.build(architecture), "dense")
    assert "slides" in why_not(session.cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [*GRAPHABLE, *CHOOSING, *CHANGING, *CODING])
def test_captured(spec):
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=2048).to("cuda")
    session, _, ids = prepared(model, spec)
    other, _, _ = prepared(model, spec)
    other.path = "step by step: asked for"
    near = 3e-1 if spec in CODING else 2e-2
    for token in ids:
        step = torch.tensor([token], device="cuda")
        assert torch.allclose(session.step(step), other.step(step), atol=near)
    assert session.path == "CUDA graph" and (life(session) == life(other)).float().mean() > 0.98
    twin = session.fork()
    step = torch.tensor([7], device="cuda")
    assert torch.allclose(twin.step(step), session.step(step), atol=near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [*GRAPHABLE, *CHOOSING, *CHANGING, *CODING])
def test_two_streams_give_what_one_gives(spec):
    """A wrong overlap would raise nothing: over many steps every logit and the whole history are the same bits."""
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=2048).to("cuda")
    (one, _, ids), (two, _, _) = prepared(model, spec), prepared(model, spec)
    with torch.inference_mode():
        graphs = [GraphedDecode(model, s.cache, 1, STEPS, beside=beside) for s, beside in ((one, False), (two, True))]
        assert graphs[1].clock.side is not None
        for token in ids:
            a, b = (g.step(torch.tensor([token], device="cuda")) for g in graphs)
            assert torch.equal(a, b)
        for graph in graphs:
            graph.release()
    assert torch.equal(life(one), life(two))
