"""Steps without the modules around the blocks: the model's own numbers, and nothing that listens is passed by."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from lab.engine.session import Session
from lab.models.norms import replace_norms
from lab.models.packed import find_siblings, pack
from lab.models.quick import quicken
from lab.models.short import ShortStep, shorten

SERVED = ("llama", "mistral", "qwen2")
OTHERS = ("qwen3", "gemma2", "gpt2", "olmo2", "cohere", "phi3")
IDS = list(range(3, 40))


def quick(family: str, mode: str = "float32") -> Any:
    model = tiny_models.build(family)
    replace_norms(model)
    pack(model, mode, find_siblings(model))
    quicken(model)
    return model


def run(model: Any, spec: str, short: bool, samples: int = 1, steps: int = 12) -> tuple[torch.Tensor, list]:
    """Logits of a prompt and some steps, and what the cache then holds."""
    kept, model.lab_short = model.lab_short, model.lab_short if short else None
    session = Session(model, spec, new_tokens=steps, record=True)
    rows = [session.prefill(IDS, samples=samples)]
    for step in range(steps):
        rows.append(session.step(torch.full((samples,), (7 * step + 3) % 50)))
    model.lab_short = kept
    cache = session.cache
    return torch.stack(rows), [cache.kv_bytes, cache.entries, cache.read_fraction, [x.seen for x in cache.lab_layers]]


@pytest.fixture
def counted(monkeypatch) -> list[bool]:
    """Whether each short step was taken."""
    taken, own = [], ShortStep.__call__

    def call(self, ids, cache):
        out = own(self, ids, cache)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(ShortStep, "__call__", call)
    return taken


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("spec", [
    "dense", "h2o(budget=12)", "streaming_llm(budget=12)", "kivi(bits=4,residual=32)", "quest(budget=0.3,page=4)",
    "snapkv(budget=20,window=8)+rotated(bits=4)",
])
def test_the_models_own_logits_and_cache(spec: str, mode: str, counted: list[bool]) -> None:
    model = quick("llama", mode)
    assert shorten(model)
    counted.clear()
    (found, cache), (wanted, theirs) = run(model, spec, True), run(model, spec, False)
    assert counted == [True] * 12  # and none in the run that was to go the model's own way
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max())) and cache == theirs


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("samples", [1, 3])
def test_other_models_of_the_kind_and_samples(family: str, samples: int, counted: list[bool]) -> None:
    model = quick(family)
    assert shorten(model)
    counted.clear()
    (found, cache), (wanted, theirs) = run(model, "dense", True, samples), run(model, "dense", False, samples)
    assert counted == [True] * 12
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max())) and cache == theirs


@pytest.mark.parametrize("family", OTHERS)
def test_other_kinds_go_their_own_way(family: str) -> None:
    model = quick(family)
    assert not shorten(model) and model.lab_short is None
    run(model, "dense", True, steps=2)


@pytest.mark.parametrize("name", ["residual_multiplier", "embedding_multiplier"])
def test_a_model_that_does_something_else_between_its_blocks_is_refused(name: str) -> None:
    """Granite is put together as Llama is, and multiplies where its configuration says so."""
    model = quick("granite")
    assert shorten(model)
    for module in (model.base_model, *model.base_model.layers):
        if hasattr(module, name):
            setattr(module, name, 0.5)
    assert not shorten(model)


@pytest.mark.parametrize("where", ["model", "base", "layer", "norm", "o_proj", "down_proj", "act_fn", "lm_head"])
def test_a_hook_is_still_called(where: str, counted: list[bool]) -> None:
    model = quick("llama")
    assert shorten(model)
    layer = model.base_model.layers[1]
    module: nn.Module = {
        "model": model, "base": model.base_model, "layer": layer, "norm": layer.input_layernorm, "o_proj": layer.self_attn.o_proj,
        "down_proj": layer.mlp.down_proj, "act_fn": layer.mlp.act_fn, "lm_head": model.get_output_embeddings(),
    }[where]
    called = []
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        called.clear()
        handle = register(lambda *_: called.append(1))
        run(model, "dense", True, steps=2)
        handle.remove()
        assert len(called) == 3  # the prompt and two steps
    counted.clear()
    run(model, "dense", True, steps=2)
    assert counted == [True, True]


def test_a_layer_that_stands_in_for_another_is_asked(counted: list[bool]) -> None:
    model = quick("llama")
    assert shorten(model)
    model.base_model.layers[0].forward = lambda hidden_states, **_: hidden_states
    counted.clear()
    with pytest.raises(Exception):  # nothing is stored by the layer that does nothing, and the lab notices
        run(model, "dense", True, steps=1)
    del model.base_model.layers[0].forward
    run(model, "dense", True, steps=1)
    assert counted[-1]


def test_hidden_states_that_a_technique_looks_at(counted: list[bool]) -> None:
    """Hooks that the lab itself leaves on the layers are no reason to go another way, techniques that use them are."""
    from lab.engine.depth import install

    model = quick("llama")
    assert shorten(model)
    install(model)
    counted.clear()
    run(model, "dense", True, steps=2)
    assert counted == [True, True]
