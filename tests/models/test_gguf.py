"""GGUF files: recognised, refused when damaged, and converted to the same numbers and tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.errors import LabError
from lab.models import gguf, load
from lab.models.sources import locate

writer_package = pytest.importorskip("gguf", reason="the gguf package is part of requirements.txt")

HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 64, 4, 2, 96, 2


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in GGUF (Q8_0 and F32) with a byte-level tokenizer of the SmolLM kind."""
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĠĠ"]
    out = writer_package.GGUFWriter(path, "llama")
    out.add_context_length(512)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(WIDE)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(letters))
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(letters)
    out.add_token_types([3] + [1] * (len(letters) - 1))
    out.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    out.add_eos_token_id(0)
    out.add_pad_token_id(0)
    out.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.05, shape).astype(np.float32) + (1.0 if len(shape) == 1 else 0.0)
        if len(shape) == 1:
            out.add_tensor(name, values.astype(np.float32))
        else:
            kind = writer_package.GGMLQuantizationType.Q8_0
            out.add_tensor(name, writer_package.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(letters), HIDDEN)
    for layer in range(LAYERS):
        kv = HIDDEN // HEADS * KV_HEADS
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", kv, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", kv, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, WIDE)
    add("output_norm.weight", HIDDEN)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_the_header_is_read_without_the_weights(gguf_file: Path) -> None:
    header = gguf.read_header(gguf_file)
    assert header.architecture == "llama" and header.tensors == 2 + 9 * LAYERS
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"
    assert header.needed_bytes <= gguf_file.stat().st_size < header.needed_bytes + 64


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.6, 0.99])
def test_a_truncated_file_is_refused(gguf_file: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:int(gguf_file.stat().st_size * share)])
    with pytest.raises(LabError, match="truncated|not a GGUF"):
        gguf.read_header(cut)


def test_other_files_and_versions_and_parts_are_refused(gguf_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "page.gguf"
    wrong.write_text("<!doctype html><title>404</title>")
    with pytest.raises(LabError, match="not a GGUF file"):
        gguf.read_header(wrong)
    wrong.write_bytes(b"GGUF" + struct.pack("<I", 9) + bytes(64))
    with pytest.raises(LabError, match="GGUF version 9"):
        gguf.read_header(wrong)
    wrong.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**61) + bytes(64))
    with pytest.raises(LabError, match="truncated"):
        gguf.read_header(wrong)
    part = writer_package.GGUFWriter(wrong, "llama")
    part.add_uint16("split.count", 3)
    part.write_header_to_file()
    part.write_kv_data_to_file()
    part.write_tensors_to_file()
    part.close()
    with pytest.raises(LabError, match="one of 3 parts"):
        gguf.read_header(wrong)


def test_conversion_gives_the_logits_that_transformers_gives(gguf_file: Path, own_cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = locate(str(gguf_file)).folder
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {item.name for item in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 70, 33]])
    assert torch.equal(direct(ids).logits, again(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_digits_stand_alone_as_the_smollm_family_was_trained(gguf_file: Path, own_cache: Path) -> None:
    loaded = load(str(gguf_file), device="cpu")
    # Without the digit rule the second space, or the second newline, would cling to the digit.
    assert loaded.tokenizer.tokenize("a\n\n1") == ["a", "ĊĊ", "1"]
    assert loaded.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert loaded.tokenizer.decode(loaded.tokenizer("a  12 .\n\n").input_ids) == "a  12 .\n\n"
    assert loaded.tokenizer.model_max_length == loaded.facts.context == 512
    assert loaded.tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "x"
    assert loaded.facts.id == "tiny" and loaded.facts.kv_heads == KV_HEADS


def test_progress_is_told_and_nothing_is_drawn(
    gguf_file: Path, own_cache: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    told: list[tuple[float, str]] = []
    locate(str(gguf_file), lambda fraction, text: told.append((fraction, text)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert sum("Decoding the weights" in text for _, text in told) > 2
    assert "%|" not in capfd.readouterr().err


def test_other_words_on_stderr_pass_the_listener(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from lab.models.quiet import bars_to

    heard: list[float] = []
    with bars_to(heard.append):
        print("a warning", file=sys.stderr)
        print("\rWork:  40%|####      | 2/5", end="", file=sys.stderr)
    assert heard == [0.4] and capsys.readouterr().err.strip() == "a warning"


def test_a_second_load_reads_the_converted_folder(
    gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = locate(str(gguf_file))
    monkeypatch.setattr(gguf, "convert", _must_not_run)
    assert locate(str(gguf_file)) == first


def test_a_failed_conversion_leaves_nothing_behind(
    gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(path: Path, folder: Path, progress: Callable[..., None]) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "convert", breaks)
        locate(str(gguf_file))
    assert list((own_cache / "models").iterdir()) == []
    assert (locate(str(gguf_file)).folder / "config.json").is_file()


def test_a_disk_that_fills_up_is_one_sentence(
    gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(LabError, match="No space left on device.*LAB_CACHE"):
        locate(str(gguf_file))
    assert list((own_cache / "models").iterdir()) == []


def test_an_architecture_transformers_cannot_decode_is_named(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "odd.gguf"
    out = writer_package.GGUFWriter(path, "wavenet")
    out.add_tensor("x", np.zeros(32, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(LabError, match="wavenet"):
        load(str(path))


def _must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("converted again")
