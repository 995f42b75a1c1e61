"""Choosing how a CPU model holds its linear weights, and holding them so."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.models import quality
from lab.models.norms import replace_norms
from lab.models.packed import Packing, find_siblings, pack
from lab.models.places import Progress, cache_dir
from lab.models.record import Record, machine
from lab.models.stores import PARTS, Int4Store, Store

# The revision of the quantiser; a change here makes kept files and measurements be made anew.
_VERSION = 2
_BY_BYTES = ("int4", "int8")


def hold_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: str, key: str, record: Record,
    progress: Progress,
) -> tuple[str, float]:
    """Pack a float32 CPU model in place and answer (mode, mean KL to float32 in nats).

    ``auto`` is the fastest mode whose measured KL is under ``quality.KL_LIMIT``. The modes are tried in the order of
    the bytes they read per token, which is what decoding waits for, and the time of a step is measured as well, so
    that a mode this processor is slow at is not chosen. What is measured is kept in ``record``.
    """
    groups = record.get("siblings", transformers.__version__)
    if groups is None:
        progress(0.0, "Looking at the model's layers")
        groups = find_siblings(model)
        record.put(groups, "siblings", transformers.__version__)
    replace_norms(model)
    context = (machine(), _VERSION)
    mode = record.get("auto", *context) if wanted == "auto" else wanted
    if mode is None:
        return _choose(model, tokenizer, groups, key, record, progress)
    kl = 0.0 if mode == "float32" else record.get("kl", mode, *context)
    if kl is None:
        progress(0.1, f"Measuring what {mode} weights cost in fidelity")
        reference = _reference(model, tokenizer)
        pack_kept(model, mode, groups, key)
        kl = quality.mean_kl(reference[1], quality.log_probabilities(model, reference[0]))
        record.put(kl, "kl", mode, *context)
        return mode, kl
    progress(0.5, f"Packing weights as {mode}")
    pack_kept(model, mode, groups, key)
    return mode, kl


def pack_kept(
    model: PreTrainedModel, mode: str, groups: list[list[str]], key: str, *, keep: bool = False,
) -> Packing:
    """``pack``, but int4 codes are read from the cache where an earlier load left them, and left there if not."""
    path = _packed_path(key)
    made = _read(path) if mode == "int4" else {}
    packing = pack(model, mode, groups, keep=keep, made=made)
    if mode == "int4" and not made:
        _write(path, packing)
    return packing


def _choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: list[list[str]], key: str, record: Record,
    progress: Progress,
) -> tuple[str, float]:
    """Measure modes from the smallest on and keep the first that is faithful and faster than plain float32."""
    context = (machine(), _VERSION)
    progress(0.05, "Measuring weight formats on sample text")
    ids, reference = _reference(model, tokenizer)
    plain_ms = quality.step_ms(model)
    for index, mode in enumerate((*_BY_BYTES, "bfloat16")):
        progress(0.15 + 0.25 * index, f"Measuring {mode} weights")
        if mode == "bfloat16":
            packing = pack(model, "float32", groups, keep=True)
            plain_ms = quality.step_ms(model)
            packing.undo()
        packing = pack_kept(model, mode, groups, key, keep=True)
        kl = quality.mean_kl(reference, quality.log_probabilities(model, ids))
        record.put(kl, "kl", mode, *context)
        if kl < quality.KL_LIMIT and quality.step_ms(model) < plain_ms:
            packing.settle()
            record.put(mode, "auto", *context)
            return mode, kl
        packing.undo()
    pack(model, "float32", groups)
    record.put("float32", "auto", *context)
    return "float32", 0.0


def _reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample ids [1, N] and the unpacked model's log-probabilities [N, V] on them."""
    ids = quality.sample_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
    return ids, quality.log_probabilities(model, ids)


def _packed_path(key: str) -> Path:
    mark = f"{machine()} v{_VERSION}".replace(" ", "-").replace("+", "-")
    return cache_dir() / "packed" / f"{key}-int4-{mark}.safetensors"


def _read(path: Path) -> dict[str, Store]:
    """Int4 stores by group name; empty where the file is missing or damaged."""
    try:
        tensors = load_file(path)
        names = {name.rpartition("|")[0] for name in tensors}
        return {name: Int4Store.restored({part: tensors[f"{name}|{part}"] for part in PARTS})
                for name in names}
    except (OSError, SafetensorError, KeyError):
        return {}


def _write(path: Path, packing: Packing) -> None:
    """Keep the int4 stores of ``packing``; a cache that cannot be written costs only time."""
    tensors = {f"{name}|{part}": tensor for name, store in packing.stores.items() if isinstance(store, Int4Store)
               for part, tensor in store.parts.items()}
    if not tensors:
        return
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        save_file(tensors, scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError):
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
