"""What the lab's cache hands to the model in place of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.errors import LabError

if TYPE_CHECKING:
    from lab.engine.layer import LabLayer


class Touched(LabError, AttributeError):
    """The model did something with keys or values between the cache and the attention function."""


class Handle:
    """What `update` returns as both key and value: the layer, and the rows that were just appended."""

    __slots__ = ("layer", "k", "v", "fresh")

    def __init__(self, layer: "LabLayer", k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer, self.k, self.v, self.fresh = layer, k, v, True

    def to(self, *args, **kwargs) -> "Handle":
        """Models that share a layer's cache ask for it on the reader's device; rows are read where they lie."""
        return self

    def __getattr__(self, name: str):
        raise Touched(
            f"This model changes keys or values after the cache returned them (it asked for .{name})",
            "The lab serves models that pass the cache's answer straight to the attention function",
            "Choose a model such as Llama, Qwen, Gemma, Mistral or SmolLM",
        )
