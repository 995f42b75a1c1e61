"""Decode steps as one CUDA graph: every kernel of a token replayed in a single launch.

A stack qualifies when its decode steps only append exact rows: dense attention, one-shot prompt compression (SnapKV, PyramidKV,
AdaKV, ...), sparse prefill, head pruning. Lengths, slots and the position live in device tensors that the graph itself advances, so
nothing is sized or chosen on the host between tokens. Everything else runs step by step, and the session says which.

Inside a graph a step is the model's own forward, or `lean`'s few launches where those give the same numbers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kernels import decode
from kernels.decode import TierView
from lab.engine import lean
from lab.engine.cache import LabCache
from lab.engine.layer import Handle, LabLayer
from lab.engine.policy import Policy

log = logging.getLogger("lab")


@dataclass
class Static:
    """One layer's place in a graph. slot int64 [lanes]: the flat row the new key and value go to; tag the same in `meta`
    (or None); length int32 [lanes] counts the new row; position int64 [1, 1]."""

    slot: torch.Tensor
    tag: torch.Tensor | None
    start: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    capacity: int


def why_not(cache: LabCache) -> str | None:
    """The reason a cache's decode steps cannot be captured, or None."""
    policy = cache.policy
    if len(cache.lab_layers) != len(cache.layers):
        return "the model has layers the lab does not store"
    if policy.encoder is not None or policy.tiered:
        return "the stack codes entries while decoding"
    if policy.scorer is not None and policy.scorer.evicts_in_decode:
        return "the stack evicts while decoding"
    if any(not t.fixed_gate for t in policy.routes) or policy.probe is not None:
        return "the stack decides at every step which heads or layers take part"
    if policy.edits or policy.movers or policy.observers or policy.watchers or policy.want_mass or policy.want_last:
        return "the stack looks at or edits every step"
    if any("decode" in t.select_phases for t in policy.selects) or policy.stack.filling("weigh"):
        return "the stack chooses what to read at every step"
    for layer in cache.lab_layers:
        k, v = layer.exact_k.rows, layer.exact_v.rows
        if layer.window or layer.shared or layer.tap is not None or "pad" in layer.state:
            return "a layer slides, is shared, is padded or is being watched"
        if k.starts != v.starts or k.caps != v.caps or k.fields["x"].shape != v.fields["x"].shape:
            return "keys and values are stored unevenly"
    return None


def attend(policy: Policy, handle: Handle, q: torch.Tensor, call) -> torch.Tensor:
    """The layer's step inside a graph: store the row, attend, gate. q [B,Hq,1,d] -> [B,1,Hq,d]."""
    store: LabLayer = handle.layer
    place: Static = store.static
    k, v = store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"]
    k.index_copy_(0, place.slot, handle.k.reshape(-1, k.shape[-1]))
    v.index_copy_(0, place.slot, handle.v.reshape(-1, v.shape[-1]))
    if place.tag is not None:
        tags = store.meta.fields["pos"]
        tags.index_copy_(0, place.tag, place.position.view(1).expand(place.tag.shape).to(tags.dtype))
    handle.fresh = False
    return read(policy, store, q[:, :, 0].contiguous(), call.scale, softcap=call.softcap, sink=call.sink)


def read(policy: Policy, store: LabLayer, q: torch.Tensor, scale: float, early: bool = False, **options) -> torch.Tensor:
    """Attention of q [B,Hq,d] over a layer's rows, the newest included, gated: [B,1,Hq,d]. early: see `kernels.decode`."""
    place: Static = store.static
    k, v = store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"]
    tier = TierView(16, k, v, place.start, place.length, place.capacity)
    out = decode.attend(q, [tier], scale, early=early, **options).out.unsqueeze(1)
    for gate in place_gates(policy, store):
        out = out * gate.to(out.dtype).transpose(1, 2)
    return out


def _place(store: LabLayer) -> lean.Place:
    """Where a layer's new key, value and position go."""
    place: Static = store.static
    k, v = store.exact_k.rows.fields["x"], store.exact_v.rows.fields["x"]
    return lean.Place(k, v, place.slot, None if place.tag is None else store.meta.fields["pos"], place.tag)


def place_gates(policy: Policy, store: LabLayer) -> list[torch.Tensor]:
    """Head gates [.., Hq, 1, 1] that do not depend on the step (found during the prompt, kept in `shared`)."""
    found = (policy.shared.get((t.name, store.index)) for t in policy.routes)
    return [gate for gate in found if gate is not None]


class GraphedDecode:
    """Captured decode steps of one cache. `capture=False` runs the same body eagerly (tests on a CPU).

    shorten: do the step in a few launches where the model allows it; `own` then says why it does not, or is None.
    """

    def __init__(
        self, model: torch.nn.Module, cache: LabCache, batch: int, room: int, capture: bool = True, shorten: bool = True
    ) -> None:
        self.model, self.cache, self.left = model, cache, room
        layers = cache.lab_layers
        device = layers[0].device
        for layer in layers:
            for part in (layer.exact_k.rows, layer.exact_v.rows, *([layer.meta] if layer.meta is not None else [])):
                part.reserve(room)
        lanes = batch * layers[0].heads
        stack = lambda pick: torch.tensor([pick(layer) for layer in layers], device=device)  # noqa: E731
        ends = lambda rows: [s + n for s, n in zip(rows.starts, rows.lens)]  # noqa: E731
        self.slots = stack(lambda layer: ends(layer.exact_k.rows))
        self.lengths = stack(lambda layer: [n + 1 for n in layer.exact_k.rows.lens]).int()
        starts = stack(lambda layer: layer.exact_k.rows.starts).int()
        tagged = all(layer.meta is not None for layer in layers)
        self.tags = stack(lambda layer: ends(layer.meta)) if tagged else None
        self.position = torch.full((1, 1), layers[0].seen, device=device)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        for i, layer in enumerate(layers):
            capacity = max(layer.exact_k.rows.caps)
            layer.static = Static(self.slots[i], self.tags[i] if tagged else None, starts[i], self.lengths[i], self.position, capacity)
        assert self.slots.shape == (len(layers), lanes)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.lean: lean.Lean | None = None
        self.own: str | None = "asked for"
        if shorten:
            self._shorten(batch, room)
        if capture:
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
            self._advance()
        self.left -= 1
        for layer in self.cache.lab_layers:
            layer.appended()
        return self.logits.clone()  # the graph writes its next logits to the same place

    def release(self) -> None:
        """Give the layers back to eager steps."""
        for layer in self.cache.lab_layers:
            layer.static = None
        self.graph = None

    def _shorten(self, batch: int, room: int) -> None:
        policy = self.cache.policy
        try:
            if policy.enterers:
                raise lean.NotLean("the stack changes what enters a layer")
            found = lean.prepare(
                self.model, self.cache.lab_layers, self.position, room, batch,
                _place, lambda store, q, scale: read(policy, store, q, scale, early=True),
            )
            found.check(self.model, self._forward, self.ids)
            self.lean, self.own = found, None
        except lean.NotLean as reason:
            self.own = str(reason)
        except Exception as error:  # whatever this card or this Triton cannot take: each raises its own kind
            log.warning("the short decode step failed, the model's modules run instead: %s", error)
            self.own = "its kernels failed here"

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and fills workspaces; writes only the slot the first step overwrites
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._forward()
            self._advance()

    def _forward(self) -> torch.Tensor:
        if self.lean is not None:
            return self.lean.run(self.ids)
        out = self.model(
            input_ids=self.ids, position_ids=self.position.expand(self.ids.shape[0], 1), past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _advance(self) -> None:
        self.slots.add_(1)
        self.lengths.add_(1)
        self.position.add_(1)
        if self.tags is not None:
            self.tags.add_(1)
