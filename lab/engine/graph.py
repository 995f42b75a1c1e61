"""Decode steps as one CUDA graph: every kernel of a token replayed in a single launch.

A stack qualifies when its decode steps can be taken in place (`lab.engine.steady`): lengths, places and the position live in
device tensors that the graph itself advances, so nothing is sized or chosen on the host between tokens. Everything else runs
step by step, and the session says why.

Inside a graph a step is the model's own forward, or `lean`'s few launches where those give the same numbers.
"""

from __future__ import annotations

import logging

import torch

from lab.engine import lean, steady
from lab.engine.cache import LabCache
from lab.engine.layer import LabLayer
from lab.engine.steady.clock import Clock
from lab.engine.steady.step import Reading

log = logging.getLogger("lab")


def why_not(cache: LabCache) -> str | None:
    """The reason a cache's decode steps cannot be captured, or None."""
    policy = cache.policy
    if len(cache.lab_layers) != len(cache.layers):
        return "the model has layers the lab does not store"
    if len({layer.device for layer in cache.lab_layers}) > 1:
        return "the model lies on several cards"
    if policy.not_in_place is not None:
        return policy.not_in_place
    if policy.probe is not None or any(layer.tap is not None for layer in cache.lab_layers):
        return "a layer is being watched"
    return next((reason for reason in (steady.unfit(policy, layer) for layer in cache.lab_layers) if reason is not None), None)


def read(store: LabLayer, q: torch.Tensor, scale: float) -> torch.Tensor:
    """For a lean step: attention of q [B,Hq,d] over a layer's rows, the newest stored, and what follows: [B,1,Hq,d]."""
    return store.static.stored(q.unsqueeze(2), Reading(scale, early=True))


def place(store: LabLayer) -> lean.Place:
    """For a lean step: where a layer's new key, value and position go."""
    step = store.static
    tags = None if step.tag is None else store.meta.fields["pos"]
    return lean.Place(store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"], step.slot, tags, step.tag)


class GraphedDecode:
    """Captured decode steps of one cache. `capture=False` runs the same body eagerly (tests on a CPU).

    shorten: do the step in a few launches where the model allows it; `own` then says why it does not, or is None.
    beside: capture what steps change on a second stream: 8 to 25% of a step on an H100, bit for bit what one stream gives.
    Raises `steady.Unfit` with the reason where a layer cannot be stepped in place.
    """

    def __init__(
        self, model: torch.nn.Module, cache: LabCache, batch: int, room: int, capture: bool = True, shorten: bool = True,
        beside: bool = True,
    ) -> None:
        self.model, self.cache, self.left = model, cache, room
        layers = cache.lab_layers
        for layer in layers:
            layer.settle()
        self.clock = Clock(layers[0].seen, room, layers[0].device)
        self.position = self.clock.position
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=layers[0].device)
        try:
            for layer in layers:
                layer.static = steady.begin(cache.policy, layer, self.clock)
        except steady.Unfit:
            self.release()
            raise
        self.clock.pool()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.lean: lean.Lean | None = None
        self.own: str | None = "asked for"
        if shorten:
            self._shorten(batch, room)
        if capture:
            if beside:
                self._capture_beside()
            else:
                self._capture()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B] -> logits float32 [B, V]. Raises IndexError when the reserved room is used up."""
        if self.left == 0:
            raise IndexError("the graph's room is used up")
        self.ids.copy_(ids.view(-1, 1))
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self._forward()
            self.clock.advance()
        self.left -= 1
        for layer in self.cache.lab_layers:
            layer.static.count()
        return self.logits.clone()  # the graph writes its next logits to the same place

    def release(self) -> None:
        """Give the layers back to eager steps."""
        for layer in self.cache.lab_layers:
            layer.settle()
        self.graph = None

    def _shorten(self, batch: int, room: int) -> None:
        policy = self.cache.policy
        try:
            if policy.enterers:
                raise lean.NotLean("the stack changes what enters a layer")
            found = lean.prepare(
                self.model, self.cache.lab_layers, self.position, room, batch,
                place, read,
            )
            self.clock.trial = True  # the same step twice, compared: nothing may leave or be coded in between
            found.check(self.model, self._forward, self.ids)
            self.lean, self.own = found, None
        except lean.NotLean as reason:
            self.own = str(reason)
        except Exception as error:  # whatever this card or this Triton cannot take: each raises its own kind
            log.warning("the short decode step failed, the model's modules run instead: %s", error)
            self.own = "its kernels failed here"
        finally:
            self.clock.trial = False

    def _capture_beside(self) -> None:
        """Capture with what steps change on a stream of its own; in one line where a card or driver refuses that."""
        self.clock.side = torch.cuda.Stream()
        try:
            self._capture()
        except RuntimeError as error:
            log.warning("a step with two streams was not captured, one takes its place: %s", error)
            self.clock.drop_side()
            self._capture()

    def _capture(self) -> None:
        self.graph = None
        altered = [x for layer in self.cache.lab_layers for x in layer.static.changed()]
        before = [x.clone() for x in altered]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels, fills workspaces; what the first step would not overwrite is put back
            try:
                for _ in range(2):
                    self._forward()
            finally:
                for x, old in zip(altered, before):
                    x.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):  # torch's own capture stream lies on the first card it was used on
            self.logits = self._forward()
            self.clock.advance()

    def _forward(self) -> torch.Tensor:
        logits = self.lean.run(self.ids) if self.lean is not None else self._modules()
        self.clock.join()
        return logits

    def _modules(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.ids, position_ids=self.position.expand(self.ids.shape[0], 1), past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )
        return out.logits[:, -1].float()
