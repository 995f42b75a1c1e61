"""Models on another card than the first, and spread over two: the same numbers as on one card. Skipped with fewer than two."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch

from lab.engine.session import Session
from lab.errors import LabError
from lab.techniques import registry

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
STEPS = 12
SPECS = ["dense", *sorted(registry()), "snapkv+pyramidkv+kivi", "h2o+cam", "h2o(budget=20)+d2o_merge",
         "streaming_llm(budget=20)+zerotuning(gamma=2)", "h2o(budget=20)+int_codes(bits=4)",
         "a_shape(sinks=2,window=16)+delta(gamma=8)"]


def on_one(device: str) -> torch.nn.Module:
    return copy.deepcopy(tiny_models.llama()).to(device)


def spread() -> torch.nn.Module:
    """The first layer, the embedding and the head on one card; the rest on the other."""
    from accelerate import dispatch_model

    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1,
              "model.rotary_emb": 0, "lm_head": 0}
    return dispatch_model(copy.deepcopy(tiny_models.llama()), places, main_device="cuda:0")


def walk(model: torch.nn.Module, spec: str, graph: bool) -> tuple[torch.Tensor, int, float, str]:
    """Logits of forced steps [STEPS, V] on the CPU, bytes, share kept, and how the steps ran."""
    session = Session(model, spec, new_tokens=STEPS + 4, record=True)
    ids = tiny_models.tokens(180 + STEPS, seed=5).tolist()
    session.prefill(ids[:180])
    if not graph:
        session.path = "step by step: asked for"
    rows = [session.step(torch.tensor([t], device=session.device))[0].cpu() for t in ids[180:]]
    return torch.stack(rows), session.cache.kv_bytes, session.cache.kept_fraction, session.path


@pytest.mark.parametrize("spec", SPECS)
def test_two_cards_give_what_one_gives(spec: str) -> None:
    try:
        want, size, kept, _ = walk(on_one("cuda:0"), spec, graph=False)
    except LabError as refusal:
        pytest.skip(f"not on this model: {refusal}")
    got, bytes_here, kept_here, path = walk(spread(), spec, graph=True)
    assert path.startswith("step by step"), path
    assert float((got - want).norm() / want.norm()) < 1e-3
    assert (bytes_here, round(kept_here, 9)) == (size, round(kept, 9))


@pytest.mark.parametrize("spec", [
    "dense", "snapkv(budget=0.5,window=8)", "h2o(budget=20)", "streaming_llm(budget=20)", "int_codes(bits=4)", "kivi",
])
def test_the_second_card_alone_captures_its_steps(spec: str) -> None:
    want, size, _, how = walk(on_one("cuda:0"), spec, graph=True)
    got, bytes_here, _, path = walk(on_one("cuda:1"), spec, graph=True)
    assert path == how
    assert float((got - want).norm() / want.norm()) < 1e-3
    assert bytes_here == size


def test_a_folder_is_spread_over_every_card_and_generates_the_same(tmp_path) -> None:
    pytest.importorskip("accelerate")
    from lab.models.loader import _model, read_config  # the tokenizer of a random model would only be in the way
    from lab.models.devices import plan
    from lab.models.places import Located

    model = tiny_models.llama()
    model.save_pretrained(tmp_path)
    located = Located(tmp_path, "tiny", str(tmp_path), "0")
    chosen = plan("all", "float32", "auto", None)
    both = _model(located, read_config(located), chosen)
    assert len({p.device for p in both.parameters()}) == 2, both.hf_device_map
    want = walk(on_one("cuda:0"), "dense", graph=False)[0]
    got = walk(both, "dense", graph=True)[0]
    assert float((got - want).norm() / want.norm()) < 1e-3
