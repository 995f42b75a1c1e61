"""Facts of a model that is not loaded: from its configuration alone, so that sizes can be predicted for any model."""

from __future__ import annotations

from pathlib import Path

from lab.errors import LabError
from lab.models.facts import ModelFacts, describe
from lab.models.places import Progress, nothing


def facts_of(source: str, dtype: str = "bfloat16", progress: Progress = nothing) -> ModelFacts:
    """Facts of `default`, a config.json, a folder that holds one, or a hub id, with weights and cache in `dtype`.

    Weights are neither read nor needed; parameters are counted on a model without memory.
    Raises LabError where there is no configuration, or transformers cannot build a language model from it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _place(source, progress)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as problem:
        reason = str(problem).strip().splitlines()
        raise LabError(f"{source} has no configuration that can be used "
                       f"({reason[0][:160] if reason else type(problem).__name__})",
                       "A hub id, a folder with config.json or a config.json of a causal language model was expected") from None
    return describe(model, model.num_parameters(), id=Path(source).name if Path(source).exists() else source, source=source,
                    revision="", dtype=dtype, weights=dtype, weights_kl=None)


def _place(source: str, progress: Progress) -> str:
    from lab.models import packaged
    from lab.models.sources import locate

    if source == "default" or source in packaged.PACKAGED:
        return str(locate(source, progress).folder)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        raise LabError(f"{source} is a GGUF file, whose sizes are known once it is loaded",
                       fix="Give the model's config.json or its hub id")
    return str(path) if path.exists() else source
