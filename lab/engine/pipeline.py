"""The pipeline of one layer and one step: attend by the stack's slots, then change the cache (never before)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import cpu_attention as core
from kernels.backend import has_triton
from kernels.merge import sink_logit
from lab.engine import attend, fused, sparse, steady
from lab.engine.context import LayerContext
from lab.engine.handle import Handle
from lab.engine.history import History
from lab.engine.layer import LabLayer
from lab.engine.policy import Policy
from lab.engine.slots import Band, ColumnBias
from lab.errors import LabError

_DENSE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Call:
    """What the attention function was called with beside q, k, v."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sink: torch.Tensor | None = None
    mask: torch.Tensor | None = None  # bool [B, seen+T], True where a token is real; None without padding


def run(policy: Policy, handle: Handle, q: torch.Tensor, call: Call) -> torch.Tensor:
    """One layer's step. q [B,Hq,T,d]; returns [B,T,Hq,dv]. Stores the handle's rows, attends, then applies the dial."""
    store = handle.layer
    if store.static is not None:
        return store.static(handle, q, call)
    if policy.bare and policy.probe is None and q.shape[2] == 1:
        if handle.fresh and call.mask is None and not call.softcap and call.sink is None and dense_fits(store):
            handle.fresh = False
            return dense_row(store, q, handle.k, handle.v, call.scale)
    elif policy.not_in_place is None and policy.probe is None and store.seen:
        out = steady.run(policy, handle, q, call)
        if out is not None:
            return out
    ctx = _append(policy, handle, q, call)
    if store.tap is not None:
        store.tap.add(ctx, handle)
    store.groups = ctx.groups
    early = policy.early(ctx)
    result = _attend(policy, ctx, handle, call) if early is None else early
    if early is None:
        for technique in policy.movers:
            result.out = technique.settle(ctx, result.out)
    out = result.out
    for technique in policy.routes:
        gate = technique.route(ctx)
        if gate is not None:
            out = out * gate.to(out.dtype)
        technique.remember(ctx, out)
    if policy.probe is not None:
        out = policy.probe(ctx, out)
    if handle.fresh:
        handle.fresh = False
        policy.after(ctx, result)
        if store.window and not store.shared:
            store.trim_window()
    return out.transpose(1, 2)


def dense_fits(store: LabLayer) -> bool:
    """Whether `dense_row` serves this layer's next row: on a CPU, with nothing that needs the whole pipeline.

    Dense steps are what everything is compared with, and at this size their bookkeeping is a tenth of a token's time.
    """
    if not store.prompt_done or store.tap is not None or store.meta is not None or store.window or store.device.type != "cpu":
        return False
    k, v = store.exact_k.rows, store.exact_v.rows
    if k.lens[0] >= k.caps[0] or k.fields["x"].shape != v.fields["x"].shape or store.dtype not in _DENSE_DTYPES:
        return False
    return store.common is None or store.common.exact is not None


def dense_row(store: LabLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Store one row k, v [B,Hk,1,d] and attend with q [B,Hq,1,d] to everything stored: [B,1,Hq,d]. For layers that
    `dense_fits`."""
    batch, heads, n = q.shape[0], store.heads, store.exact_k.rows.lens[0]
    keys, values = store.exact_k.rows.whole("x"), store.exact_v.rows.whole("x")
    keys.narrow(2, n, 1).copy_(k)
    values.narrow(2, n, 1).copy_(v)
    store.appended()
    rows, keys, values = q.view(batch, heads, -1, q.shape[-1]), keys.narrow(2, 0, n + 1), values.narrow(2, 0, n + 1)
    if store.common is None:
        out = core.plain(rows, keys, values, scale)[0]
    else:
        store.last_read += sum(store.common.exact[0].rows.lens) * batch
        out = attend.samples_row(rows, store.common.exact, keys, values, scale)[0]
    return out.reshape(batch, 1, q.shape[1], -1)


def _append(policy: Policy, handle: Handle, q: torch.Tensor, call: Call) -> LayerContext:
    store, rows = handle.layer, q.shape[2]
    first = store.seen - (0 if handle.fresh else rows)
    pos_q, keep = None, None
    if call.mask is not None or (store.meta is not None and "pad" in store.state):
        if call.mask is None:
            call.mask = torch.ones(q.shape[0], first + rows, dtype=torch.bool, device=q.device)
        store.start_tracking()
        store.state["pad"] = True
        keep = call.mask[:, -rows:].bool()
        pos_q = (call.mask.long().cumsum(-1) - 1)[:, -rows:].masked_fill(~keep, -1)
    trimmed = policy.trimmed if handle.fresh and policy.trimmed is not None and policy.trimmed.shape[0] == rows else None
    if trimmed is not None:
        if keep is not None and not bool(call.mask.all()):
            raise LabError(
                f"{policy.trimmer.title} cannot choose among the tokens of padded prompts",
                "All prompts of a batch have one length", "Feed the prompts one at a time",
            )
        store.start_tracking()
        pos_q = (first + trimmed).expand(q.shape[0], -1)
    if policy.movers and handle.fresh:
        q = _moved(policy, handle, q, call, first, pos_q)
    if handle.fresh:
        if store.window and store.shared:  # later layers read these rows too, so they go before the next step
            store.trim_window()
        if policy.record and store.history is None:
            store.history = History(q.shape[0], handle.k.shape[1], store.reserve)
        pos = None
        if store.meta is not None:
            line = torch.arange(first, first + rows, device=q.device)
            pos = pos_q if pos_q is not None else line.expand(q.shape[0], -1)
        store.append(handle.k, handle.v, pos, keep)
        if trimmed is not None:
            if store.history is not None:
                store.history.skipped(trimmed, first, rows + policy.skipped)
            store.seen += policy.skipped
            first = store.seen - rows
    return _context(policy, store, q, call, first, pos_q)


def _moved(policy: Policy, handle: Handle, q: torch.Tensor, call: Call, first: int, pos_q) -> torch.Tensor:
    """Queries as the `edit` techniques that move vectors want them; the handle's keys change with them."""
    for technique in policy.movers:
        ctx = _context(policy, handle.layer, q, call, first, pos_q)
        q, handle.k, handle.v = technique.move(ctx, q, handle.k, handle.v)
    if handle.k.shape[1] != handle.layer.heads and handle.layer.seen == 0:
        handle.layer.lazy_initialization(handle.k, handle.v)
    return q


def _context(policy: Policy, store: LabLayer, q: torch.Tensor, call: Call, first: int, pos_q) -> LayerContext:
    rows = q.shape[2]
    return LayerContext(
        store=store, layer=store.index, layers=policy.layers, phase=policy.phase(store, rows), q=q, pos_q=pos_q,
        first=first, scale=call.scale, softcap=call.softcap, window=call.window, sink=call.sink,
        prompt=policy.prompt or first + rows, seed=policy.seed, rope=policy.rope(store.index), shared=policy.shared,
    )


def _attend(policy: Policy, ctx: LayerContext, handle: Handle, call: Call) -> attend.Result:
    store, rows = ctx.store, ctx.q.shape[2]
    prompt, want_mass = ctx.phase == "prefill", policy.wants_mass(ctx)
    chosen = [c for c in (t.select(ctx) for t in policy.selects if ctx.phase in t.select_phases) if c is not None]
    bands = [c for c in chosen if isinstance(c, Band)]
    edits = [e for t in policy.edits for e in t.edit(ctx)]
    weigh = policy.weigh(ctx)
    if weigh is not None or len(chosen) > len(bands) or (bands and not prompt):
        picks = [c for c in chosen if not isinstance(c, Band)]
        alone = not bands and not edits and weigh is None and not want_mass and not policy.want_last
        found = fused.block_rows(ctx, picks) if prompt and alone and fusable(ctx.q) else None
        if found is not None:
            return _finish(policy, ctx, attend.Result(*found), chosen, edits)
        result = sparse.attend(ctx, bands, picks, edits, weigh, want_mass, policy.want_last)
        return _finish(policy, ctx, result, chosen, edits)
    store.last_probe = 0
    quick = ctx.pos_q is None and not call.softcap and store.plain and store.longest == store.seen - store.base
    if prompt and rows > 1 and quick and all(isinstance(e, ColumnBias) for e in edits):
        possible, band = attend.single_band(bands, ctx.window, store.seen)
        if possible:
            if fusable(ctx.q):
                result = attend.Result(*fused.prompt_rows(ctx, band))
            else:
                result = attend.prompt_rows(ctx, handle.k, handle.v, band)
            if edits:
                result = attend.biased_columns(ctx, result, edits)
            return _finish(policy, ctx, _with_sink(ctx, result), bands, edits)
    if rows == 1 and fusable(ctx.q) and not bands and not edits and not policy.want_last and ctx.pos_q is None:
        found = fused.one_row(ctx, want_mass)
        if found is not None:
            store.last_read = min(sum(store.counts), (ctx.window or store.longest) * store.batch * store.heads)
            return attend.Result(*found)
    if rows == 1 and store.common is not None:  # nothing slides out of sight among what is left
        quick = ctx.pos_q is None and not call.softcap and store.split is not None and not ctx.window
    alone = rows == 1 and store.plain and not ctx.window and not call.softcap and ctx.pos_q is None  # sees all there is
    if rows == 1 and (quick or alone) and not bands and not edits and not want_mass and not policy.want_last:
        return _with_sink(ctx, attend.one_row(ctx))
    return _finish(policy, ctx, attend.general(ctx, bands, edits, want_mass, policy.want_last), bands, edits)


def fusable(q: torch.Tensor) -> bool:
    """Whether the fused kernels should serve this step: on CUDA, where triton is."""
    return q.is_cuda and has_triton()


def _with_sink(ctx: LayerContext, result: attend.Result) -> attend.Result:
    if ctx.sink is None:
        return result
    return attend.Result(*sink_logit(result.out, result.lse, ctx.sink))


def _finish(policy: Policy, ctx: LayerContext, result: attend.Result, bands: list, edits: list) -> attend.Result:
    if policy.combine is not None and bands and ctx.phase in policy.combine.combine_phases:
        result.out = policy.combine.combine(ctx, result.out, lambda rows: attend.dense_rows(ctx, rows, edits))
    if policy.wants_mass(ctx) and result.mass is None:
        result.mass = _prompt_mass(ctx, result.lse, bands, edits)
    return result


def _prompt_mass(ctx: LayerContext, lse: torch.Tensor, bands: list, edits: list) -> torch.Tensor:
    possible, band = attend.single_band(bands, ctx.window, ctx.store.seen)
    if fusable(ctx.q) and possible and not edits:
        return fused.column_mass(ctx, lse, band)
    return core.column_mass(
        ctx.q, ctx.store.exact_k.decode(), lse, ctx.scale, start=ctx.first - ctx.store.base, softcap=ctx.softcap,
        window=ctx.window, bands=[(b.sinks, b.window) for b in bands],
        biases=[(e.position - ctx.store.base, e.bias) for e in edits],
    )


def run_without_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """Dense attention of plain tensors (a forward without the lab's cache): q [B,Hq,T,d], k, v [B,Hk,N,d], N >= T."""
    store = LabLayer(0, track=call.mask is not None)
    handle = store.update(k, v)[0]
    policy = Policy.dense()
    rows = q.shape[2]
    padded = q if rows == k.shape[2] else torch.cat([q.new_zeros(*q.shape[:2], k.shape[2] - rows, q.shape[3]), q], 2)
    return run(policy, handle, padded, call)[:, -rows:]


__all__ = ["Call", "dense_fits", "dense_row", "run", "run_without_cache"]
