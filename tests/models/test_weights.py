"""Choosing a weight format by what it costs, and measuring that once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.errors import LabError
from lab.models import load, measure_weights_kl, quality, weights
from lab.models.packed import FusedLinear
from lab.models.places import nothing
from lab.models.record import Record


def test_kl_is_zero_for_itself_and_right_for_a_known_case() -> None:
    uniform = torch.full((3, 4), 0.25).log()
    other = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(3, 4)
    assert quality.mean_kl(uniform, uniform) == 0.0
    assert quality.mean_kl(uniform, other) == pytest.approx(0.25 * (torch.tensor([0.5, 1, 2, 2]).log().sum().item()), 1e-5)


def test_sample_text_is_prose_of_a_few_hundred_tokens(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    ids = quality.sample_ids(AutoTokenizer.from_pretrained(tiny_folder), 288)
    assert ids.shape == (1, 384)
    assert quality.sample_ids(AutoTokenizer.from_pretrained(tiny_folder), 300_000).shape[1] < 200


def test_measuring_leaves_the_model_as_it_was(tiny_folder: Path, tiny_model: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(tiny_folder)
    found = {mode: measure_weights_kl(model, tokenizer, mode) for mode in ("float32", "bfloat16", "int8", "int4")}
    assert found["float32"] < 1e-9 and 0 < found["bfloat16"] < found["int4"]
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "int8", "int4"])
def test_a_mode_can_be_asked_for(tiny_folder: Path, own_cache: Path, mode: str) -> None:
    loaded = load(str(tiny_folder), device="cpu", weights=mode)
    assert loaded.facts.weights == mode and loaded.facts.dtype == "float32"
    assert loaded.facts.weights_kl == 0.0 if mode == "float32" else loaded.facts.weights_kl > 0
    assert loaded.model.model.layers[0].mlp.gate_proj.siblings.linear.store.mode == mode


def test_auto_takes_the_smallest_that_is_faithful_and_faster(
    tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = {"int4": 0.3, "int8": 0.003}
    packed: list[str] = []

    def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
        return cost[packed[-1]]

    def spy(model: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
        packed.append(mode)
        return real(model, mode, *args, **kwargs)

    real = weights.pack
    monkeypatch.setattr(weights, "pack", spy)
    monkeypatch.setattr(quality, "mean_kl", kl)
    monkeypatch.setattr(quality, "step_ms", lambda model: 1.0 if packed else 9.0)
    first = load(str(tiny_folder), device="cpu")
    assert (first.facts.weights, first.facts.weights_kl) == ("int8", 0.003) and packed == ["int4", "int8"]
    # The second load measures nothing.
    monkeypatch.setattr(quality, "log_probabilities", _must_not_run)
    monkeypatch.setattr(weights, "find_siblings", _must_not_run)
    second = load(str(tiny_folder), device="cpu")
    assert second.facts == first.facts and packed == ["int4", "int8", "int8"]


def test_auto_falls_back_to_float32(tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "mean_kl", lambda reference, other: 0.5)
    loaded = load(str(tiny_folder), device="cpu")
    assert (loaded.facts.weights, loaded.facts.weights_kl) == ("float32", 0.0)
    kept = json.loads(next((own_cache / "measured").glob("*.json")).read_text())
    assert {name.split(" | ")[1] for name in kept if name.startswith("kl")} == {"int4", "int8", "bfloat16"}


def test_a_slow_format_is_not_chosen(tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(quality, "mean_kl", lambda reference, other: 0.0001)
    monkeypatch.setattr(quality, "step_ms", lambda model: next(times))
    assert load(str(tiny_folder), device="cpu").facts.weights == "float32"


def test_int4_codes_are_kept_and_read_back(
    tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = load(str(tiny_folder), device="cpu", weights="int4")
    file, = (own_cache / "packed").glob("*-int4-*.safetensors")
    monkeypatch.setattr("lab.models.stores.quantise_int4", _must_not_run)
    second = load(str(tiny_folder), device="cpu", weights="int4")
    ids = torch.tensor([[4, 5, 6]])
    with torch.inference_mode():
        assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    monkeypatch.undo()
    monkeypatch.setenv("LAB_CACHE", str(own_cache))
    file.unlink()
    file.write_bytes(b"damaged")
    third = load(str(tiny_folder), device="cpu", weights="int4")
    with torch.inference_mode():
        assert torch.equal(first.model(ids).logits, third.model(ids).logits)


def test_measurements_survive_damage_and_a_read_only_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("k")
    record.put(0.5, "kl", "int8", "torch 2")
    assert Record("k").get("kl", "int8", "torch 2") == 0.5 and Record("k").get("kl", "int8", "torch 3") is None
    record.path.write_text("{ half")
    assert Record("k").get("kl", "int8", "torch 2") is None
    monkeypatch.setenv("LAB_CACHE", "/proc/nowhere")
    Record("k").put(1, "x")


def test_hold_weights_reports_progress(tiny_folder: Path, own_cache: Path, tiny_model: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    heard: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    weights.hold_weights(tiny_model(), tokenizer, "int8", "k", Record("k"), lambda fraction, text: heard.append(text))
    assert heard == ["Looking at the model's layers", "Measuring what int8 weights cost in fidelity"]
    weights.hold_weights(tiny_model(), tokenizer, "int8", "k", Record("k"), nothing)


@pytest.mark.parametrize("settings, reason", [
    (dict(weights="int3"), "no int3 weights"),
    (dict(dtype="float8"), "no dtype float8"),
    (dict(dtype="float16", device="cpu"), "slow and imprecise"),
    (dict(dtype="bfloat16", weights="int8", device="cpu"), "packed for float32 activations"),
    (dict(device="tpu"), "no device tpu"),
    (dict(device="mps"), "not supported"),
])
def test_settings_that_make_no_sense(tiny_folder: Path, settings: dict[str, str], reason: str) -> None:
    with pytest.raises(LabError, match=reason):
        load(str(tiny_folder), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said(tiny_folder: Path) -> None:
    with pytest.raises(LabError, match="sees no CUDA GPU"):
        load(str(tiny_folder), device="cuda")


def test_bfloat16_activations_are_not_packed(tiny_folder: Path, own_cache: Path) -> None:
    loaded = load(str(tiny_folder), device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and loaded.facts.weights == "bfloat16" and loaded.facts.weights_kl is None
    assert loaded.facts.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2


def test_a_model_that_does_not_fit_is_refused_with_sizes(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.models.devices.available_bytes", lambda: 1000)
    with pytest.raises(LabError, match="GiB for its weights in float32"):
        load(str(tiny_folder), device="cpu")


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_running_out_of_memory_is_one_sentence(
    problem: Exception, tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise problem

    monkeypatch.setattr("lab.models.weights.pack", full)
    with pytest.raises(LabError, match="not enough memory for tiny-llama"):
        load(str(tiny_folder), device="cpu", weights="int8")


def _must_not_run(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("measured or packed again")
