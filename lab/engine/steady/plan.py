"""Which stacks and caches can take decode steps in place, and why others cannot: asked of declarations, never of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lab.engine.segments import Exact
from lab.engine.slots import ColumnBias, Technique, Trailing

if TYPE_CHECKING:
    from lab.engine.context import LayerContext
    from lab.engine.layer import LabLayer
    from lab.engine.policy import Policy

FILLING = "the cache has not reached its budget yet"


class Unfit(Exception):
    """A layer cannot be stepped in place; the text says why."""


def not_in_place(policy: "Policy") -> str | None:
    """Why decode steps under this stack cannot write, choose and drop in place; None when they can."""
    if policy.tiered:
        return "the stack gives bits to single entries while decoding"
    if policy.encoder is not None and not policy.encoder.codes_in_place:
        return f"the stack codes entries while decoding ({policy.encoder.title}), in a way that needs the ordinary path"
    if any(not _fixed(t) for t in policy.routes):
        return "the stack decides at every step which heads or layers take part"
    if policy.weigher is not None or len(policy.choosers) > 1 or any(not t.pages_in_place for t in policy.choosers):
        return "the stack chooses what to read at every step, in a way that needs the ordinary path"
    if policy.choosers and policy.encoder is not None:
        return "the stack chooses what to read among codes"
    if policy.choosers and evicts(policy):
        return "the stack evicts while decoding from what it chooses among"
    if policy.movers or policy.observers or policy.watchers or policy.want_last:
        return "the stack looks at or edits every step"
    if any(type(t).standing_edit is Technique.standing_edit for t in policy.edits):
        return "the stack edits every step anew"
    if policy.scorer is None or not policy.scorer.evicts_in_decode:
        return "the stack adds up attention at every step" if policy.want_mass or policy.want_now else None
    if not policy.scorer.scores_in_place:
        return f"the stack evicts while decoding, by a score ({policy.scorer.title}) that needs the ordinary path"
    if policy.reducer is not None and type(policy.reducer).reduce is not Technique.reduce:
        return "the stack merges entries that leave"
    if policy.allocator is not None and type(policy.allocator).leave is not Technique.leave:
        return "the stack evicts several entries at once"
    if policy.encoder is not None and policy.encoder.codes_in_place != "rows":
        return "the stack evicts while decoding, out of blocks that share their scales"
    return None


def _fixed(technique: Technique) -> bool:
    kind = type(technique)
    return technique.fixed_gate and kind.replace is Technique.replace and kind.remember is Technique.remember


def unfit(policy: "Policy", store: "LabLayer") -> str | None:
    """Why this layer, as it lies now, cannot be stepped in place; None when it can. The stack is known to qualify."""
    if store.window or store.shared or "pad" in store.state:
        return "a layer slides, is shared or is padded"
    if not store.prompt_done:
        return "the prompt is not complete"
    if store.common is not None and evicts(policy):  # samples part before the first entry leaves
        return _unfilled(policy, store)
    k, v = store.exact_k.rows, store.exact_v.rows
    if policy.encoder is not None:
        return _uncoded(policy, store)
    if store.coded_k or store.coded_v or k.starts != v.starts or k.caps != v.caps or k.fields["x"].shape != v.fields["x"].shape:
        return "keys and values are stored unevenly"
    if store.common is not None and (store.common.pair is None or not isinstance(store.common.pair[0], Exact)):
        return "keys and values that samples share are stored unevenly"
    if not evicts(policy):
        return None
    return _unfilled(policy, store)


def evicts(policy: "Policy") -> bool:
    """Every decode step at a full budget drops one entry of each lane."""
    return policy.scorer is not None and policy.scorer.evicts_in_decode


def _unfilled(policy: "Policy", store: "LabLayer") -> str | None:
    budget = store.budget
    if not isinstance(budget, int):
        return "heads keep different numbers of entries while evicting"
    counts = store.counts
    if counts.count(counts[0]) != len(counts) or counts[0] > budget:
        return "heads keep different numbers of entries while evicting"
    if counts[0] < budget:
        return FILLING
    if len(store.meta.fields) > 2 or any(f.dim() != 1 for f in store.meta.fields.values()):
        return "the stack keeps several statistics"
    return None


def _uncoded(policy: "Policy", store: "LabLayer") -> str | None:
    if len(store.coded_k) != 1 or len(store.coded_v) != 1:
        return FILLING
    parts = [store.coded_k[0].rows, store.coded_v[0].rows, store.exact_k.rows, store.exact_v.rows]
    if not all(rows.level for rows in parts):
        return "heads hold different numbers of codes"
    if store.common is not None:
        shared = [s for s in (*store.common.views["key"], *store.common.views["value"]) if not isinstance(s, Exact)]
        if [s.rows.level for s in shared] not in ([True, True], []) or shared and shared[0].rows.lens != shared[1].rows.lens:
            return "codes that samples share are stored unevenly"
    if policy.encoder.codes_in_place == "blocks":
        if set(store.exact_lens("value")) != {policy.encoder.residual}:
            return FILLING
        return None if store.exact_k.rows.fields["x"].shape[-1] == store.exact_v.rows.fields["x"].shape[-1] else (
            "keys and values have different widths")
    if any(store.exact_lens("key")) or any(store.exact_lens("value")) or parts[0].lens != parts[1].lens:
        return "keys and values are stored unevenly"
    return _unfilled(policy, store) if evicts(policy) else None


def standing(policy: "Policy", ctx: "LayerContext") -> tuple[int, tuple[int, torch.Tensor] | None]:
    """(entries in front that always read as if they stood right before the rest, (slot, bias [B,Hk,G]) or None): what a
    layer's edits come to from here on.

    Looks at the positions on the host, once, before the first step. Raises Unfit.
    """
    found: list = []
    for technique in policy.edits:
        edits = technique.standing_edit(ctx)
        if edits is None:
            raise Unfit("the stack edits every step anew")
        found += edits
    trailing = [e for e in found if isinstance(e, Trailing)]
    biases = [e for e in found if isinstance(e, ColumnBias)]
    if len(trailing) > 1 or len(trailing) + len(biases) < len(found) or len({e.position for e in biases}) > 1:
        raise Unfit("the stack edits every step in several ways")
    stay = policy.scorer.protected(ctx.store.budget, ctx.prompt)[0] if evicts(policy) else None
    front = _in_front(trailing[0].before, ctx, stay, policy.encoder is not None) if trailing else 0
    return front, _bias(biases, ctx, stay) if biases else None


def _in_front(before: int, ctx: "LayerContext", stay: int | None, coded: bool) -> int:
    early = ctx.store.positions() < before
    count = int(early.sum(-1).max())
    ordered = bool(early[:, :, :count].all()) and not bool(early[:, :, count:].any())
    if not ordered or stay is None or stay < before or coded:
        raise Unfit("the stack renumbers entries that are not stored in front")
    return count


def _bias(biases: list[ColumnBias], ctx: "LayerContext", stay: int | None) -> tuple[int, torch.Tensor] | None:
    column, pos = biases[0].position, ctx.store.positions()
    here, valid = pos == column, ctx.store.valid()
    if valid is not None:
        here &= valid
    if not bool(here.any()):
        return None
    if stay is not None and stay <= column:
        raise Unfit("the stack edits an entry that may leave")
    slots = here.to(torch.uint8).argmax(-1)[here.any(-1)]
    if bool((slots != slots[0]).any()):
        raise Unfit("the stack edits an entry that lies in different places")
    total = sum(e.bias.to(pos.device).float() for e in biases).view(1, ctx.kv_heads, ctx.groups)
    return int(slots[0]), total * here.any(-1, keepdim=True)
