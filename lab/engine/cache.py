"""The lab's cache: a transformers `Cache` whose attention layers are the lab's, usable with any `model.generate`."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lab.engine.calibrate import calibrated
from lab.engine.depth import install
from lab.engine.layer import LabLayer
from lab.engine.learnt import find
from lab.engine.policy import Policy
from lab.engine.stack import Stack
from lab.errors import LabError


class LabCache(DynamicCache):
    """Keys and values of one or more sequences under a stack of techniques.

    Args:
        model: a causal LM switched to the lab's attention (`lab.engine.attach`), or any that `attach` accepts.
        stack: a Stack, or its text such as "h2o(budget=0.25)+kivi(bits=2)".
        prompt: length of the prompt when it will be fed in pieces, so that compression waits for its end; 0 when each
            call of several tokens is a whole prompt (as in `model.generate`).
        reserve: tokens to make room for at once (prompt and new tokens).
        record: keep, per position, when it was narrowed or dropped.

    Use it anywhere transformers takes a cache: `model.generate(ids, past_key_values=LabCache(model, "snapkv"))`.
    Raises LabError for a stack this model cannot serve.
    """

    def __init__(
        self, model: torch.nn.Module, stack: Stack | str = "dense", *, prompt: int = 0, reserve: int = 0, seed: int = 0,
        record: bool = False,
    ) -> None:
        from lab.engine.attach import attach, is_attached

        if not is_attached(model):
            attach(model)
        stack = Stack.parse(stack) if isinstance(stack, str) else stack
        config = model.config.get_text_config(decoder=True)
        super().__init__(config=model.config)
        if stack.techniques and getattr(config, "num_kv_shared_layers", 0):
            raise LabError(
                f"{config.model_type} models share one layer's cache among several layers",
                "Techniques change a layer's cache after one reader", "Run this model dense, or choose another model",
            )
        self.policy = Policy(stack, len(self.layers), model, prompt=prompt, seed=seed, record=record)
        if prompt:
            self.policy.check(prompt)
        if stack.one("calibrate") is not None:
            self.policy.calibration = calibrated(model, stack)
        for technique in stack.techniques:
            if technique.learns:
                self.policy.shared[f"learnt/{technique.name}"] = find(technique, model).tensors
        track = self.policy.tracks
        for i, layer in enumerate(self.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                window = getattr(layer, "sliding_window", None)
                self.layers[i] = LabLayer(i, reserve, track, window, self.policy.slack)
                self.layers[i].policy = self.policy
                self.layers[i].shared = bool(getattr(config, "num_kv_shared_layers", 0))
        self.policy.stores = [layer for layer in self.layers if isinstance(layer, LabLayer)]
        if self.policy.trimmer is not None or self.policy.enterers:
            install(model)
        self.stack = stack

    @property
    def lab_layers(self) -> list[LabLayer]:
        """The layers this cache stores itself (linear-attention layers of hybrids are not among them)."""
        return [layer for layer in self.layers if isinstance(layer, LabLayer)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live entries of all layers: codes, scales, positions and running statistics included."""
        return sum(layer.live_bytes for layer in self.lab_layers)

    @property
    def slack_bytes(self) -> int:
        """Bytes allocated beyond the live entries: room to grow."""
        return sum(layer.allocated_bytes - layer.live_bytes for layer in self.lab_layers)

    @property
    def entries(self) -> int:
        """Entries kept, summed over layers, sequences and KV heads."""
        return sum(sum(layer.counts) for layer in self.lab_layers if layer.is_initialized)

    @property
    def kept_fraction(self) -> float:
        """Entries kept over entries seen."""
        seen = sum(layer.seen * layer.batch * layer.heads for layer in self.lab_layers if layer.is_initialized)
        return self.entries / seen if seen else 1.0

    @property
    def read_fraction(self) -> float:
        """Entries the newest row read over entries seen."""
        ready = [layer for layer in self.lab_layers if layer.is_initialized]
        seen = sum(layer.seen * layer.batch * layer.heads for layer in ready)
        return sum(layer.last_read for layer in ready) / seen if seen else 1.0

    def repeat(self, times: int) -> None:
        """Turn the cache of one prompt into that of `times` samples of it."""
        order = torch.arange(max((layer.batch for layer in self.lab_layers), default=1)).repeat(times)
        for layer in self.layers:
            if isinstance(layer, LabLayer):
                layer.repeat(times)
            else:  # linear-attention layers of hybrids
                layer.reorder_cache(order)

    def clone(self) -> "LabCache":
        """An independent copy that may continue with other tokens."""
        twin = Cache.__new__(LabCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [layer.clone() if isinstance(layer, LabLayer) else _copied(layer) for layer in self.layers]
        return twin


def _copied(layer):
    import copy

    return copy.deepcopy(layer)
