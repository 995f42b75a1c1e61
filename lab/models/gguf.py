"""GGUF files: a quick check that one is whole, and its conversion to a folder of safetensors.

The format (little endian): magic, version, tensor count, key count, typed key/value pairs, tensor descriptions,
then the tensors' data from an aligned offset on. Only the header is read here; the weights are decoded by
transformers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lab.errors import LabError
from lab.models.places import Progress, disk_error, nothing, part
from lab.models.quiet import bars_to, quiet

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 1 << 24

# llama.cpp names the rule that splits text before byte-pair merging. transformers assumes GPT-2's rule for all of
# these, which is wrong for the families that first split off every digit: "\n\n1" would get other tokens.
_SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself: scalar metadata, and the bytes its tensors need."""

    metadata: dict[str, Any]
    tensors: int
    needed_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; takes milliseconds, whatever the file's size.

    Raises:
        LabError: the file is no GGUF file, is one part of several, or is shorter than its header promises.
    """
    try:
        with path.open("rb") as file:
            header = _parse(file, path)
    except OSError as error:
        raise LabError(f"The GGUF file {path} could not be read ({error.strerror or error})") from error
    except (struct.error, EOFError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise _truncated(path, None) from error
    if int(header.metadata.get("split.count", 1) or 1) > 1:
        raise LabError(f"{path.name} is one of {header.metadata['split.count']} parts of a split GGUF model",
                       "One whole .gguf file was expected", "Join the parts with `llama-gguf-split --merge`")
    size = path.stat().st_size
    if size < header.needed_bytes:
        raise _truncated(path, header.needed_bytes)
    return header


def convert(path: Path, folder: Path, progress: Progress = nothing) -> None:
    """Decode a GGUF file once and write model.safetensors, config.json and the tokenizer into ``folder``.

    transformers' ``save_pretrained`` refuses a model that came from GGUF, so the state dict (without the tied
    head, which shares the embedding's memory) and the config are written directly. Weights are stored in float32:
    what the file's blocks decode to exactly.

    Raises:
        LabError: the architecture is one transformers cannot read from GGUF, or the gguf package is missing.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    header = read_header(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    progress(0.0, f"Reading the tokenizer of {path.name}")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            share = part(progress, 0.3, 0.85)
            text = f"Decoding the weights of {path.name}, once"
            share(0.0, text)
            with bars_to(lambda fraction: share(fraction, text)):
                model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except ImportError as error:
        raise _no_gguf(error) from error
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise LabError(
            f"{path.name} could not be decoded: {error}",
            f"Its architecture, {header.architecture or 'unnamed'}, must be one that transformers reads from GGUF",
            "Use the model's safetensors folder or hub id instead",
        ) from error
    progress(0.85, "Writing safetensors")
    tied = model.config.get_text_config().tie_word_embeddings
    head = model.get_output_embeddings()
    skip = {name for name, module in model.named_modules() if module is head} if tied else set()
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()
             if key.rpartition(".")[0] not in skip}
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise disk_error(OSError(str(error)), folder.parent) from error
    config = json.loads(model.config.to_json_string())
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    config.update(architectures=[type(model).__name__], dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    _write_tokenizer(tokenizer, header, model.config.get_text_config().max_position_embeddings, folder)
    progress(1.0, "Converted")


def _write_tokenizer(tokenizer: Any, header: Header, context: int, folder: Path) -> None:
    """Save the tokenizer with the digit rule its family needs and the model's context as its length."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if header.metadata.get("tokenizer.ggml.pre") in _SPLITS_DIGITS and backend.pre_tokenizer is not None:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.model_max_length = context
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


def _parse(file: BinaryIO, path: Path) -> Header:
    if file.read(4) != b"GGUF":
        raise LabError(f"{path.name} is not a GGUF file: it does not begin with the letters GGUF",
                       fix="Check that the download was complete and is not a web page")
    version, = struct.unpack("<I", _exactly(file, 4))
    if version not in (2, 3):
        raise LabError(f"{path.name} uses GGUF version {version}", "Versions 2 and 3 are read",
                       "Convert the model again with a current llama.cpp")
    count, pairs = struct.unpack("<QQ", _exactly(file, 16))
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = _string(file)
        value = _value(file, struct.unpack("<I", _exactly(file, 4))[0])
        if value is not None:
            metadata[key] = value
    end = max((_tensor_end(file) for _ in range(count)), default=0)
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // alignment) * alignment
    return Header(metadata, count, start + end)


def _tensor_end(file: BinaryIO) -> int:
    """Read one tensor description; the offset in the data section just after its last byte."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise _no_gguf(error) from error
    _string(file)
    dimensions, = struct.unpack("<I", _exactly(file, 4))
    elements = 1
    for size in struct.unpack(f"<{dimensions}Q", _exactly(file, 8 * dimensions)):
        elements *= size
    kind, offset = struct.unpack("<IQ", _exactly(file, 12))
    try:
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise LabError(f"A tensor is stored in the unknown GGUF type {kind}",
                       fix="Update the gguf package, or use another quantisation of the model") from error
    return offset + elements // block * nbytes


def _value(file: BinaryIO, kind: int) -> Any:
    """One metadata value; arrays are walked over and answered as None."""
    if kind in _SCALARS:
        layout = _SCALARS[kind]
        return struct.unpack(layout, _exactly(file, struct.calcsize(layout)))[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise EOFError(f"value type {kind}")
    item, length = struct.unpack("<IQ", _exactly(file, 12))
    if item in _SCALARS:
        file.seek(length * struct.calcsize(_SCALARS[item]), 1)
    else:
        for _ in range(length):
            _value(file, item)
    return None


def _string(file: BinaryIO) -> str:
    length, = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, length).decode("utf-8", errors="replace")


def _exactly(file: BinaryIO, count: int) -> bytes:
    if count > _LONGEST_STRING:  # a damaged length must not ask for gigabytes of memory
        raise EOFError(f"{count} bytes asked for at once")
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count} bytes expected, {len(data)} left")
    return data


def _no_gguf(error: ImportError) -> LabError:
    return LabError(f"Reading GGUF files needs the gguf package ({error})", fix="Run `pip install gguf`")


def _truncated(path: Path, needed: int | None) -> LabError:
    have = path.stat().st_size
    expected = f"Its header asks for {needed:,} bytes" if needed else "Even its header is incomplete"
    return LabError(f"The GGUF file {path.name} is truncated: it holds {have:,} bytes", expected,
                    "Download it again")
