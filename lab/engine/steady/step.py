"""A decode step in place: store the row, attend, change what is stored, with every shape known beforehand.

The same body serves a CPU, where it saves the bookkeeping of general steps, and a CUDA graph, where nothing may be sized, chosen
or read on the host. With a clock (`lab.engine.steady.clock`) lengths and places are device tensors that the graph advances;
without one they are the host's own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels import cpu_attention as core
from kernels import decode
from kernels.decode import TierView
from lab.engine.attend import samples_row
from lab.engine.context import LayerContext
from lab.engine.fused import tier_of
from lab.engine.handle import Handle
from lab.engine.layer import LabLayer
from lab.engine.steady.clock import Clock
from lab.engine.steady.plan import Unfit, standing

if TYPE_CHECKING:
    from lab.engine.policy import Policy

SPARE = 64  # entries of room added when a growing lane is full


@dataclass
class Reading:
    """How a captured step reads: the call's numbers; early launches before the query's kernel has ended (`kernels.decode`)."""

    scale: float
    softcap: float | None = None
    sink: torch.Tensor | None = None
    early: bool = False



class Step:
    """One layer's step. `settle` brings a layer's storage back to what ordinary steps expect."""

    changes = True  # `change` does something
    orderly = True  # the store's entries are where ordinary steps have them, all the time

    def __init__(self, policy: "Policy", store: LabLayer, clock: Clock | None = None) -> None:
        self.policy, self.store, self.clock = policy, store, clock
        self.batch, self.heads, self.lanes, self.groups = store.batch, store.heads, store.batch * store.heads, store.groups
        # what samples of one prompt share, and how many entries of each lane that is: in front of all others, for good
        self.common = store.common
        self.ahead = 0 if self.common is None else min(self.common.pair[0].rows.lens)
        self.shared = 0 if self.common is None else sum(self.common.pair[0].rows.lens) * self.batch
        self.ctx = context(policy, store, clock)
        self.front, self.bias = standing(policy, self.ctx)
        if self.common is not None and self.bias is not None:
            if self.bias[0] >= self.ahead:
                raise Unfit("the stack edits an entry that samples do not share")
            if clock is None and not self.common.pair[0].rows.level:
                raise Unfit("the stack edits heads that keep different numbers of entries")
        self.gates = [g.transpose(1, 2).to(store.dtype) for g in fixed_gates(policy, store)]
        self.gate: torch.Tensor | None = None  # under a graph the kernel multiplies by what is the same for all sequences
        if clock is not None and self.gates and all(g.shape[0] == 1 for g in self.gates):
            found = [g.float().reshape(-1).expand(self.heads * self.groups) for g in self.gates]
            self.gate = torch.stack(found).prod(0).contiguous()
            self.gates = []
        self._mask: torch.Tensor | None = None
        # under a graph: what the decode kernel reads; the flat row of the exact tensors that takes the new key and value, and
        # that of `meta` which takes its position, where the step itself does not keep it
        self.tiers: list[TierView] = []
        self.slot: torch.Tensor | None = None
        self.tag: torch.Tensor | None = None

    def __call__(self, handle: Handle, q: torch.Tensor, call) -> torch.Tensor:
        """q [B,Hq,1,d] -> [B,1,Hq,d]; the handle's row is stored and the cache changed."""
        self.write(handle)
        handle.fresh = False
        out = self.stored(q, call)
        if self.clock is None:
            self.count()
        return out

    def stored(self, q: torch.Tensor, call) -> torch.Tensor:
        """The step once its row is stored. `call` has scale, softcap and sink, and under a graph `early`."""
        out, mass = self.read(q, call)
        if self.clock is None:
            self.change(q, mass)
        elif self.changes and not self.clock.trial:
            self.clock.aside(lambda: self.change(q, mass), q, mass)
        for gate in self.gates:
            out = out * gate
        return out

    # -- what kinds of step differ in --------------------------------------------------------------------------------
    def write(self, handle: Handle) -> None:
        """Store the new row where `read` finds it."""
        raise NotImplementedError

    def read(self, q: torch.Tensor, call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out [B,1,Hq,d], mass [B,Hk,N] where the policy wants it)."""
        raise NotImplementedError

    def change(self, q: torch.Tensor, mass: torch.Tensor | None) -> None:
        """Score, drop, code."""

    def count(self) -> None:
        """The host's numbers after a step: rows held, rows read. Under a graph it runs between replays."""
        raise NotImplementedError

    @property
    def spare_bytes(self) -> int:
        """Room beside the stored rows for what is kept beside them."""
        return 0

    def settle(self, target: LabLayer) -> None:
        """Bring `target`, this layer or a copy of it, to ordinary order."""

    def note(self, target: LabLayer) -> None:
        """Write into the target's history what steps have not told it yet."""

    def changed(self) -> list[torch.Tensor]:
        """Tensors a step alters beyond what the next step overwrites: a capture's trial runs must not leave a trace."""
        return []

    def write_at(self, handle: Handle) -> None:
        """The new row to its place, under a graph."""
        k, v = self.store.exact_k.rows.fields["x"], self.store.exact_v.rows.fields["x"]
        k.index_copy_(0, self.slot, handle.k.reshape(self.lanes, -1))
        v.index_copy_(0, self.slot, handle.v.reshape(self.lanes, -1))
        if self.tag is not None:
            tags = self.store.meta.fields["pos"]
            tags.index_copy_(0, self.tag, self.clock.position.view(1).expand(self.tag.shape).to(tags.dtype))

    # -- shared ------------------------------------------------------------------------------------------------------
    def packed(self, q: torch.Tensor) -> torch.Tensor:
        """Query heads of a KV head as rows: [B,Hk,G,d]."""
        return q.reshape(self.batch, self.heads, self.groups, q.shape[-1])

    def flat(self, out: torch.Tensor) -> torch.Tensor:
        """[B,Hk,G,d] as the model wants it: [B,1,Hq,d]."""
        return out.reshape(self.batch, 1, self.heads * self.groups, out.shape[-1])

    def by_kernel(
        self, q: torch.Tensor, call, want_mass: bool, tiers: list[TierView] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All tiers in one launch: (out [B,1,Hq,d], mass per tier)."""
        got = decode.attend(
            q[:, :, 0].contiguous(), tiers or self.tiers, call.scale, softcap=call.softcap, sink=call.sink, want_mass=want_mass,
            gate=self.gate, early=getattr(call, "early", False),
        )
        return got.out.unsqueeze(1), got.mass

    def mask(self, n: int, like: torch.Tensor) -> torch.Tensor | None:
        """The standing bias as an additive mask [B,Hk,G,n] in the query's dtype."""
        if self.bias is None:
            return None
        if self._mask is None or self._mask.shape[-1] < n:
            slot, bias = self.bias
            self._mask = torch.zeros(self.batch, self.heads, self.groups, n + 4 * SPARE, dtype=like.dtype, device=like.device)
            self._mask[..., slot] = bias
        return self._mask[..., :n]

    def common_tier(self) -> TierView:
        """Under a graph: the common rows, whose slots the lanes of all samples point to."""
        key, value = self.common.views["key"][0], self.common.views["value"][0]
        found = tier_of(key, value, self.store.device)
        if found is None:
            raise Unfit("samples share codes without a kernel")
        found.bias = self.bias_of(found)
        return found

    def add_bias(self, s: torch.Tensor) -> torch.Tensor:
        """s [B,Hk,G,N] with the standing bias."""
        if self.bias is not None:
            s[..., self.bias[0]] += self.bias[1]
        return s

    def bias_of(self, tier: TierView) -> torch.Tensor | None:
        """The standing bias per slot of the tier that holds its entry: float32 [G, slots]."""
        if self.bias is None:
            return None
        out = torch.zeros(self.groups, tier.slots, device=tier.k.device)
        place = tier.start.long() + self.bias[0]
        out[:, place] = self.bias[1].expand(self.batch, -1, -1).reshape(self.lanes, self.groups).mT
        return out

    def attend_exact(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call, want_mass: bool):
        """(out [B,Hk,G,d], mass [B,Hk,N] or None) over exact rows in torch."""
        rows = self.packed(q)
        if self.common is not None:
            mask = None if self.bias is None else self.mask(self.ahead, q)[:1]
            return samples_row(rows, self.common.pair, keys, values, call.scale, mask)[0], None
        if not want_mass:
            return core.plain(rows, keys, values, call.scale, mask=self.mask(keys.shape[2], q))[0], None
        p = torch.softmax(self.add_bias((rows @ keys.mT).float().mul_(call.scale)), -1)
        return p.to(values.dtype) @ values, p.sum(2)


def context(policy: "Policy", store: LabLayer, clock: Clock | None) -> LayerContext:
    """What techniques are told, made once: a decode row whose position is the clock's, or `first`, kept up to date."""
    like = store.exact_k.rows.fields["x"]
    q = like.new_zeros(store.batch, store.heads * store.groups, 1, like.shape[-1])
    return LayerContext(
        store=store, layer=store.index, layers=policy.layers, phase="decode", q=q,
        pos_q=None if clock is None else clock.position, first=store.seen, scale=1.0, softcap=None, window=None,
        prompt=policy.prompt or store.seen, seed=policy.seed,
        rope=policy.rope(store.index), shared=policy.shared, scorer=policy.scorer, encoder=policy.encoder, model=policy.model,
        calibrated=policy.calibrated_for(store.index),
    )


def fixed_gates(policy: "Policy", store: LabLayer) -> list[torch.Tensor]:
    """Head gates [.., Hq, 1, 1] that do not depend on the step (found during the prompt, kept in `shared`)."""
    found = (policy.shared.get((t.name, store.index)) for t in policy.routes)
    return [gate for gate in found if gate is not None]


def level_views(rows, capacity: int, *names: str) -> list[torch.Tensor]:
    """[lanes, capacity, ...] views of fields whose lanes are given `capacity` slots each."""
    rows.resize(capacity)
    return [rows.fields[name].view(rows.lanes, capacity, *rows.fields[name].shape[1:]) for name in names]
