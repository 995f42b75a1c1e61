"""Where a model comes from: a name in, a ready model and its facts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.models.facts import ModelFacts
    from lab.models.loader import LoadedModel, load
    from lab.models.quality import measure_weights_kl

__all__ = ["LoadedModel", "ModelFacts", "load", "measure_weights_kl"]

_HOMES = {"LoadedModel": "loader", "load": "loader", "ModelFacts": "facts", "measure_weights_kl": "quality"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that naming this package (for `environment`) does not import transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
