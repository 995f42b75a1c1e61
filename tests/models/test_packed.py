"""Packed linear layers: right products, right siblings, nothing held too long, reversible."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from lab.models import stores
from lab.models.head import PackedHead
from lab.models.packed import FusedLinear, PackedLinear, Siblings, find_siblings, pack
from lab.models.stores import MODES, kernels_only, make_store

ERROR = {"float32": 1e-5, "bfloat16": 8e-3, "int8": 8e-3, "int4": 8e-3}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(192, 64), (64, 192), (96, 96), (80, 64)])
@pytest.mark.parametrize("rows", [1, 2, 5, 23, 24, 90])
def test_products_are_those_of_the_dense_form(mode: str, shape: tuple[int, int], rows: int, threads: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    store = make_store(weight, mode)
    wanted = x @ store.dense().t()
    assert (store.rows, store.columns) == shape and store.nbytes > 0
    for kernels in (False, True):
        if kernels:
            with kernels_only():
                found = store.product(x)
        else:
            found = store.product(x)
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert float((found - wanted).norm() / wanted.norm()) < ERROR[mode]


def test_float32_is_exact_and_the_others_take_fewer_bytes() -> None:
    weight = torch.randn(256, 128)
    held = {mode: make_store(weight, mode) for mode in MODES}
    assert torch.equal(held["float32"].dense(), weight)
    sizes = [held[mode].nbytes / weight.numel() for mode in MODES]
    assert sizes == [4.0, 2.0, pytest.approx(1.0, abs=0.02), pytest.approx(1.25, abs=0.02)]


def test_shapes_that_int4_cannot_hold_fall_back_to_int8() -> None:
    assert make_store(torch.randn(72, 64), "int4").mode == "int8"
    assert make_store(torch.randn(64, 72), "int4").mode == "int8"
    assert make_store(torch.randn(64, 64), "int4").mode == "int4"


def test_large_blocks_are_unpacked_piecewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_BLOCK", 32)
    weight, x = torch.randn(80, 64), torch.randn(40, 64)
    for mode in ("int8", "int4"):
        store = make_store(weight, mode)
        wanted = x @ store.dense().t()
        assert float((store.product(x) - wanted).norm() / wanted.norm()) < ERROR[mode]


def test_a_packed_layer_keeps_shape_bias_and_dtype() -> None:
    linear = nn.Linear(64, 96)
    packed = PackedLinear(make_store(linear.weight, "float32"), linear.bias)
    x = torch.randn(2, 3, 64)
    assert torch.allclose(packed(x), linear(x), atol=1e-5) and torch.equal(packed.weight, linear.weight)
    assert packed(x.bfloat16()).dtype == torch.bfloat16


def test_siblings_compute_once_and_hold_nothing() -> None:
    calls: list[int] = []

    class Counting(PackedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x)

    weight = torch.randn(96, 64)
    siblings = Siblings(Counting(make_store(weight, "float32"), None), [64, 32])
    first, second = FusedLinear(siblings, 0), FusedLinear(siblings, 1)
    x = torch.randn(1, 4, 64)
    assert torch.allclose(first(x), x @ weight[:64].t(), atol=1e-4)
    assert torch.allclose(second(x), x @ weight[64:].t(), atol=1e-4)
    assert len(calls) == 1
    assert siblings._input is None and siblings._waiting == [None, None]
    # Another tensor, even an equal one, is computed anew; so is a second call of the same layer.
    first(x)
    second(x.clone())
    second(x)
    assert len(calls) == 4
    # A sibling that is never asked leaves no reference to its input behind.
    y = torch.randn(1, 1, 64)
    alive = weakref.ref(y)
    first(y)
    del y
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt2", "phi", "opt", "gpt_oss"])
def test_packing_in_float32_changes_nothing(kind: str) -> None:
    model = tiny_models.build(kind)
    ids = torch.randint(2, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(ids).logits
        packing = pack(model, "float32", find_siblings(model), keep=True)
        assert packing.layers > 0
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
        assert torch.allclose(model(ids[:, :1]).logits, wanted[:, :1], atol=1e-4)
        packing.undo()
        assert torch.equal(model(ids).logits, wanted)
    assert not [module for module in model.modules() if isinstance(module, (PackedLinear, FusedLinear))]


def test_siblings_are_found_by_what_they_receive() -> None:
    groups = {tuple(name.split(".")[-1] for name in group) for group in find_siblings(tiny_models.build("llama"))}
    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",)}


def test_layers_called_twice_or_never_or_with_changed_input_stand_alone() -> None:
    class Odd(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.twice, self.never, self.after = (nn.Linear(64, 64) for _ in range(5))
            self.gate = nn.Linear(64, 64)

        def forward(self, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = torch.ones(1, 2, 64)
            out = self.a(x) + self.b(x) + self.twice(x) + self.twice(x) + self.gate(x)
            x += 1  # the same object with other contents
            return out + self.after(x)

    found = sorted(map(tuple, find_siblings(Odd())))  # type: ignore[arg-type]
    assert found == [("a", "b"), ("after",), ("never",), ("twice",)]


def test_the_embedding_stays_when_the_tied_head_is_packed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    packing = pack(model, "int4", find_siblings(model))
    assert isinstance(model.lm_head, PackedHead) and model.lm_head.store.mode == "int8"
    assert model.get_input_embeddings().weight is embedding and embedding.dtype == torch.float32
    assert packing.stores["model.layers.0.self_attn.q_proj"].mode == "int4"
    assert model.dtype == torch.float32 and model.device.type == "cpu"


def test_original_layers_are_freed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    old = weakref.ref(model.model.layers[0].mlp.gate_proj)
    packing = pack(model, "int8", find_siblings(model), keep=True)
    assert old() is not None
    packing.settle()
    gc.collect()
    assert old() is None


def test_stores_do_not_live_in_a_mapped_file(tmp_path: Any) -> None:
    """safetensors maps files; rewriting one in place would end a process that still reads from it."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "w.safetensors"
    save_file({"wide": torch.randn(128, 64), "narrow": torch.randn(64, 128)}, path)
    mapped = load_file(path)
    held = [make_store(weight, mode) for weight in mapped.values() for mode in MODES]
    path.write_bytes(b"")
    assert all(bool(store.dense().isfinite().all()) for store in held)


@pytest.mark.parametrize("mode", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("biased", [False, True])
def test_the_likeliest_tokens_of_a_packed_head_are_exact(mode: str, rows: int, biased: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 600, bias=biased)
    nn.init.normal_(linear.weight)
    x = torch.randn(1, rows, 64)
    head = PackedHead(make_store(linear.weight.detach(), mode), linear.weight, linear.bias)
    with torch.inference_mode():
        wanted, found = linear(x), head(x)
        with kernels_only():
            kernels = head(x)
    top = wanted.topk(100).indices
    for logits in (found, kernels):
        assert torch.allclose(logits.gather(-1, top), wanted.gather(-1, top), atol=1e-4)
        assert torch.allclose(logits, wanted, atol=0.4) and logits.dtype == torch.float32
    assert torch.equal(head.weight, linear.weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_layers_can_be_differentiated_with_respect_to_their_input(mode: str, rows: int) -> None:
    """Diagnostics ask for gradients; the packed products themselves have none."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    packed = PackedLinear(make_store(linear.weight.detach(), mode), linear.bias)
    x = torch.randn(rows, 64, requires_grad=True)
    (got,) = torch.autograd.grad(packed(x).square().sum(), x)
    (want,) = torch.autograd.grad((x @ packed.weight.t() + packed.bias).square().sum(), x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    head = PackedHead(make_store(linear.weight.detach(), mode), linear.weight, linear.bias)
    (got,) = torch.autograd.grad(head(x).sum(), x)
    assert torch.allclose(got, linear.weight.detach().sum(0).expand(rows, 64), rtol=1e-4, atol=1e-3)
