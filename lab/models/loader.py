"""Loading a model: from a name to a LoadedModel whose attention is the lab's."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lab
from lab.errors import LabError, out_of_memory
from lab.models import checks, devices, weights as packing
from lab.models.fuse import fuse
from lab.models.facts import ModelFacts, describe
from lab.models.places import Located, Progress, nothing, part
from lab.models.quick import quicken
from lab.models.quiet import quiet
from lab.models.record import Record, machine
from lab.models.short import shorten
from lab.models.sources import locate


@dataclass
class LoadedModel:
    """A model ready for the lab.

    Attributes:
        model: in eval mode, its attention switched to the lab's (``lab.engine.attach``).
        tokenizer: the model's own.
        facts: what it is, as plain values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts


def load(
    source: str = "default", *, device: str = "auto", dtype: str = "auto", weights: str = "auto",
    device_map: Any = None, progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and switch its attention to the lab's.

    Args:
        source: ``default`` (SmolLM2-135M-Instruct), a hub id, a folder with safetensors, a ``.gguf`` file, or the
            alias of a packaged model (``gemma3-270m``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``, of activations and cache.
        weights: how linear weights are held on a CPU: ``float32``, ``bfloat16``, ``int8``, ``int4``, or ``auto`` for the
            fastest whose measured KL to float32 is under 0.02 nats per token.
        device_map: for several GPUs, what accelerate takes: ``"auto"`` or a dict of module names to devices.
        progress: called with (fraction, text) while it goes on.

    Raises:
        LabError: anything that keeps the model from being loaded, in words for the user.
    """
    progress = progress or nothing
    chosen = devices.plan(device, dtype, weights, device_map)
    located = locate(source, part(progress, 0.0, 0.6))
    config = read_config(located)
    checks.check_config(config)
    devices.check_memory(located.folder, chosen)
    progress(0.62, f"Loading {located.id}")
    with quiet():
        tokenizer = _tokenizer(located)
        try:
            model = _model(located, config, chosen)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            record = Record(located.key)
            progress(0.75, "Checking that the lab's attention gives this model's own results")
            _check_hook(model, record)
            held, kl = chosen.dtype_name, None
            if chosen.weights is not None:
                held, kl = packing.hold_weights(model, tokenizer, chosen.weights, located.key, record,
                                                part(progress, 0.8, 1.0))
                quicken(model)
            elif chosen.device.type == "cuda" and chosen.device_map is None:
                fuse(model)
            _own_memory(model)
            if chosen.weights is not None:
                shorten(model)
        except Exception as error:
            if not out_of_memory(error):
                raise
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise LabError(f"There is not enough memory for {located.id} on {chosen.device}",
                           fix="Choose a smaller model or dtype" + (
                               ", or device all, which spreads it over every GPU" if torch.cuda.device_count() > 1 else ""
                           )) from error
    facts = describe(model, parameters, id=located.id, source=source, revision=located.revision,
                     dtype=chosen.dtype_name, weights=held, weights_kl=kl)
    progress(1.0, f"{located.id} is ready")
    model.lab_facts, model.lab_tokenizer = facts, tokenizer  # what calibration files are matched with and learnt from
    return LoadedModel(model, tokenizer, facts)


def read_config(located: Located) -> PreTrainedConfig:
    """The model's config.

    Raises:
        LabError: it is missing or damaged, of a type this transformers does not know, or asks for code of its own.
    """
    try:
        return AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    except Exception as error:  # transformers, its validators and JSON each raise their own kinds
        text = str(error)
        if "trust_remote_code" in text or "auto_map" in text:
            raise LabError(f"{located.id} needs Python code from its own repository, which this lab never runs",
                           checks.WORKS, "Choose a model that transformers supports itself") from error
        if "model type" in text or "model_type" in text:
            raise LabError(f"{located.id} is of a model type that transformers {transformers.__version__} does not "
                           f"know: {_first_sentence(text)}", checks.WORKS) from error
        raise LabError(f"The config.json of {located.id} could not be read: {_first_sentence(text)}",
                       fix="Fetch the model again") from error


def _model(located: Located, config: PreTrainedConfig, chosen: devices.Plan) -> PreTrainedModel:
    """Build the model and read its weights.

    Raises:
        LabError: the weights are damaged, do not fit the config, or need a package that is not here.
    """
    where: dict[str, Any] = {"device_map": chosen.device_map} if chosen.device_map is not None else {}
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            located.folder, config=config, dtype=chosen.dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **where)
    except ImportError as error:
        raise LabError(f"{located.id} needs a package that is not installed: {_first_sentence(str(error))}",
                       fix="Choose an unquantised safetensors model, or a GGUF file") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise LabError(f"The weights of {located.id} could not be loaded: {_first_sentence(str(error))}",
                       "Whole safetensors files that fit config.json were expected", "Fetch the model again") from error
    missing = sorted(notes["missing_keys"])
    if missing:
        raise LabError(f"The weights of {located.id} are incomplete: {missing[0]} and {len(missing) - 1} more are missing"
                       if len(missing) > 1 else f"The weights of {located.id} are incomplete: {missing[0]} is missing",
                       fix="Fetch the model again")
    if chosen.device_map is None and chosen.device.type != "cpu":
        model = model.to(chosen.device)
    return model.eval().requires_grad_(False)


def _own_memory(model: PreTrainedModel) -> None:
    """Copy CPU parameters out of the mapped safetensors file, whose rewriting would otherwise end this process."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _tokenizer(located: Located) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(located.folder, trust_remote_code=False)
    except Exception as error:  # missing files, missing packages and damaged JSON each raise their own kinds
        raise LabError(f"The tokenizer of {located.id} could not be loaded: {_first_sentence(str(error))}",
                       "A tokenizer.json or the model's own tokenizer files were expected beside the weights") from error


def _check_hook(model: PreTrainedModel, record: Record) -> None:
    """Attach the lab's attention, comparing logits the first time a model version meets these library versions."""
    from lab.engine.attach import attach

    context = (transformers.__version__, lab.__version__, machine())
    if record.get("hook", *context):
        attach(model)
        return
    checks.check_hook(model)
    record.put(True, "hook", *context)


def _first_sentence(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line[:240].rstrip(".")
