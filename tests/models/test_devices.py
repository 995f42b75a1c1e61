"""Device and dtype choices: with a made-up GPU here, and on a real one where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lab.errors import LabError
from lab.models import load
from lab.models.devices import available_bytes, check_memory, plan


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that torch sees one Hopper card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_the_cpu_takes_float32_activations_over_packed_weights() -> None:
    chosen = plan("cpu", "auto", "auto", None)
    assert (chosen.device.type, chosen.dtype, chosen.weights, chosen.dtype_name) == ("cpu", torch.float32, "auto", "float32")
    assert plan("cpu", "float32", "int8", None).weights == "int8"
    assert plan("cpu", "bfloat16", "auto", None).weights is None


def test_a_gpu_is_taken_by_itself_in_bfloat16(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan("auto", "auto", "auto", None)
    assert (str(chosen.device), chosen.dtype, chosen.weights) == ("cuda:0", torch.bfloat16, None)
    assert plan("cuda", "float16", "auto", None).dtype == torch.float16
    assert plan("cuda", "auto", "float32", None).dtype == torch.float32
    assert plan("cpu", "auto", "auto", None).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert plan("cuda:0", "auto", "auto", None).dtype == torch.float16


def test_a_device_map_goes_to_accelerate_where_there_are_gpus(one_gpu: None) -> None:
    assert plan("auto", "auto", "auto", "auto").device_map == "auto"


def test_all_means_every_gpu_through_accelerate(one_gpu: None) -> None:
    assert plan("all", "auto", "auto", None).device_map == "auto"
    assert plan("all", "auto", "auto", {"": 0}).device_map == {"": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_all_gpus_where_there_are_none_is_refused() -> None:
    with pytest.raises(LabError, match="torch sees none"):
        plan("all", "auto", "auto", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_map_means_the_cpu_where_there_are_none() -> None:
    chosen = plan("auto", "auto", "auto", "auto")
    assert chosen.device_map is None and chosen.device.type == "cpu"


@pytest.mark.parametrize("settings, reason", [
    (("cuda:3", "auto", "auto"), "no cuda:3: this machine has 1"),
    (("cuda", "auto", "int8"), "not available on cuda:0"),
    (("cuda", "float16", "bfloat16"), "share one dtype"),
])
def test_what_a_gpu_cannot_do(one_gpu: None, settings: tuple[str, str, str], reason: str) -> None:
    with pytest.raises(LabError, match=reason):
        plan(*settings, None)


def test_memory_is_compared_with_what_is_free(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes() is None or available_bytes() > 1 << 20
    check_memory(tiny_folder, plan("cpu", "auto", "auto", None))
    monkeypatch.setattr("lab.models.devices.available_bytes", lambda: None)
    check_memory(tiny_folder, plan("cpu", "auto", "auto", None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_loads_on_a_gpu(tiny_folder: Path, own_cache: Path) -> None:
    for device_map in (None, "auto"):
        loaded = load(str(tiny_folder), device_map=device_map)
        assert loaded.facts.device == "cuda:0" and loaded.facts.weights == loaded.facts.dtype
        assert loaded.facts.weights_kl is None
        ids = torch.tensor([[4, 5, 6]], device="cuda")
        with torch.inference_mode():
            assert bool(loaded.model(ids).logits.isfinite().all())
    exact = load(str(tiny_folder), device="cuda", dtype="float32")
    here = load(str(tiny_folder), device="cpu", weights="float32")
    with torch.inference_mode():
        assert torch.allclose(exact.model(ids).logits.cpu(), here.model(ids.cpu()).logits, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_too_large_for_the_gpu_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(LabError, match="cuda:0 has 0.0 GiB free"):
        load(str(tiny_folder), device="cuda")
