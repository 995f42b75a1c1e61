"""Changing one layer and measuring what follows, without computing the layers below it again."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import Any, Iterator

import torch

from lab.engine.depth import decoder_layers
from lab.engine.stack import Stack
from lab.measure.fitting.common import Probe, forward


class Replay:
    """What every decoder layer gave for one input of the unchanged model.

    Inside `below(layer)` the layers under `layer` answer with what they gave then instead of computing: the forward of
    the same input is exact as long as nothing under `layer` is meant to differ, and costs half as much on average.
    Nothing is left on the model afterwards.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = decoder_layers(model)
        self.outputs: list[Any] = [None] * len(self.layers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the outputs of the forward that runs inside."""
        hooks = [layer.register_forward_hook(self._noting(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def below(self, layer: int) -> Iterator[None]:
        """Layers under `layer` give what they gave while recording."""
        own = [self.layers[i].__dict__.get("forward") for i in range(layer)]  # where accelerate put its own
        try:
            for i in range(layer):
                self.layers[i].forward = lambda *args, _i=i, **kwargs: self.outputs[_i]
            yield
        finally:
            for i, before in enumerate(own):
                self.layers[i].__dict__.pop("forward", None)
                if before is not None:
                    self.layers[i].forward = before

    def _noting(self, index: int):
        def hook(module, args, output):
            self.outputs[index] = output

        return hook


EVERY = 50  # trials between collections: a cache and its layers name each other, and would pile up by the gigabyte


class Trials:
    """The same inputs again and again, each time with something else changed from some layer on.

    inputs: int64 [T] or [B, T] each. keep: last rows whose logits are wanted, 0 for all. base: logits of the unchanged
    model, float32 [B, T or keep, V] each.
    """

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module, inputs: list[torch.Tensor], keep: int = 0) -> None:
        self.model, self.inputs, self.keep = model, inputs, keep
        self.replays, self.base, self.count = [Replay(model) for _ in inputs], [], 0
        for ids, replay in zip(inputs, self.replays):
            with replay.recording():
                self.base.append(forward(model, ids, keep=keep))

    @torch.no_grad()
    def under(self, stack: Stack | None = None, layer: int = 0, probe: Probe | None = None) -> Iterator[torch.Tensor]:
        """Logits of each input under a stack or probe that changes nothing below `layer`."""
        self.count += 1
        if self.count % EVERY == 0:
            gc.collect()
        for ids, replay in zip(self.inputs, self.replays):
            with replay.below(layer):
                logits = forward(self.model, ids, stack, probe, keep=self.keep)
            yield logits
