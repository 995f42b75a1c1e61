"""Decode steps in place: what a stack does in every step, at shapes known beforehand; on a CPU and inside CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.engine.steady.plan import FILLING, Unfit, not_in_place, unfit

if TYPE_CHECKING:
    from lab.engine.handle import Handle
    from lab.engine.layer import LabLayer
    from lab.engine.policy import Policy
    from lab.engine.steady.clock import Clock
    from lab.engine.steady.step import Step


def run(policy: "Policy", handle: "Handle", q: torch.Tensor, call) -> torch.Tensor | None:
    """A decode step in place on a CPU, [B,1,Hq,d]; None where this step, layer or stack needs the ordinary path, to which the
    layer has then been brought back."""
    store = handle.layer
    if q.shape[2] > 1 or call.mask is not None or call.softcap or call.sink is not None or not handle.fresh:
        if handle.fresh:
            store.settle()
        return None
    if store.step is None:
        if store.step_refused or not store.prompt_done or q.device.type != "cpu":
            return None
        store.groups = q.shape[1] // store.heads
        try:
            store.step = begin(policy, store)
        except Unfit as reason:
            store.step_refused = str(reason) != FILLING
            return None
    if store.tap is not None:
        store.tap.note(q, handle.k, call.scale, call.softcap, call.window)
    return store.step(handle, q, call)


def begin(policy: "Policy", store: "LabLayer", clock: "Clock | None" = None) -> "Step":
    """The step of a layer whose prompt is complete. Raises Unfit with the reason where it has none."""
    from lab.engine.steady.blocks import Blocks
    from lab.engine.steady.exact import Evicting, Growing
    from lab.engine.steady.paged import Paged
    from lab.engine.steady.rows import CodedRows, CodedEvicting
    from lab.engine.steady.plan import evicts

    reason = policy.not_in_place or unfit(policy, store)
    if reason is None and store.common is not None:
        if evicts(policy):
            store.part()
            reason = unfit(policy, store)
        elif policy.encoder is not None:
            policy.part_exact(store)
        elif clock is None and (store.split is None or store.meta is not None and not store.meta.level):
            reason = "heads keep different numbers of entries"
    if reason is None and clock is None and not store.exact_k.rows.level:
        reason = "heads keep different numbers of entries"
    if reason is not None:
        raise Unfit(reason)
    if policy.encoder is None:
        growing = Growing if policy.paging(store.index) is None else Paged
        kind = Evicting if evicts(policy) else growing
    elif policy.encoder.codes_in_place == "blocks":
        kind = Blocks
    else:
        kind = CodedEvicting if evicts(policy) else CodedRows
    return kind(policy, store, clock)


__all__ = ["FILLING", "Unfit", "begin", "not_in_place", "run", "unfit"]
