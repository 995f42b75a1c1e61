"""Steps without the modules around the blocks: the model's own numbers, and nothing that listens is passed by."""

from __future__ import annotations

import copy
from typing import Any, Callable

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


def _halved(module: nn.Module) -> None:
    """Put a forward before the module's own."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out / 2
        for name in ("logits", "last_hidden_state"):
            if hasattr(out, name):
                setattr(out, name, getattr(out, name) / 2)
                return out
        return (out[0] / 2, *out[1:])

    module.forward = forward


def _exchanged(model: Any) -> None:
    layers = model.model.layers
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp


CHANGES: dict[str, Callable[[Any], None]] = {
    "the model's forward": _halved,
    "the base's forward": lambda m: _halved(m.model),
    "the head's forward": lambda m: _halved(m.lm_head),
    "an attention's forward": lambda m: _halved(m.model.layers[1].self_attn),
    "an MLP's forward": lambda m: _halved(m.model.layers[1].mlp),
    "a product's forward": lambda m: _halved(m.model.layers[1].self_attn.o_proj),
    "two MLPs": _exchanged,
    "a norm": lambda m: setattr(m.model.layers[1], "input_layernorm", nn.Identity()),
    "the last norm": lambda m: setattr(m.model, "norm", nn.Identity()),
    "the head": lambda m: m.set_output_embeddings(nn.Linear(64, 128)),
    "an activation": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.Tanh()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_takes_a_modules_place_is_used(name: str, counted: list[bool]) -> None:
    model = quick("llama")
    assert shorten(model)
    before, _ = run(model, "dense", True, steps=2)
    counted.clear()
    CHANGES[name](model)
    found, _ = run(model, "dense", True, steps=2)
    wanted, _ = run(model, "dense", False, steps=2)
    assert counted == [False, False] and torch.equal(found, wanted) and not torch.allclose(found[1:], before[1:], atol=1e-2)


def test_a_hook_on_every_module_is_called() -> None:
    model, called = quick("llama"), []
    assert shorten(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        run(model, "dense", True, steps=2)
    finally:
        handle.remove()
    projection = model.model.layers[1].self_attn.q_proj
    assert called.count(model.model.norm) == called.count(projection) == 3  # the prompt and two steps


def test_a_model_that_was_cast_later_takes_its_own_way(counted: list[bool]) -> None:
    model = quick("llama")
    assert shorten(model)
    counted.clear()
    run(model.bfloat16(), "dense", True, steps=2)
    assert counted == [False, False]


def test_a_copy_takes_short_steps_of_its_own(counted: list[bool]) -> None:
    """Norms, whose weights training may change, and hooks are the copy's, not the first model's."""
    model = quick("llama")
    assert shorten(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].input_layernorm.weight.mul_(2)
    counted.clear()
    session = Session(twin, "dense")
    session.prefill(IDS)
    found, wanted = session.step(torch.tensor([3])), Session(twin, "dense").prefill([*IDS, 3])
    assert counted == [True] and torch.allclose(found, wanted, atol=1e-4)
    twin.model.norm.register_forward_hook(lambda *_: None)
    counted.clear()
    run(twin, "dense", True, steps=1), run(model, "dense", True, steps=1)
    assert counted == [False, True]
