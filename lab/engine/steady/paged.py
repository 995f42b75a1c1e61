"""Steps in place that read chosen pages of exact rows: every row is kept, a summary of each page's keys lies beside them, and a
step reads the pages whose summaries its query likes best (`lab.engine.reads.Paging`).

The newest page is always read, so a step's own row enters the summaries after it has attended; on a GPU beside what follows.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels import cpu_attention as core
from kernels import select
from kernels.decode import TierView
from lab.engine.steady.exact import Growing, int32
from lab.engine.steady.plan import FILLING, Unfit
from lab.engine.steady.step import SPARE


class Paged(Growing):
    """tables: the summaries [lanes, P, d], with room for pages to come; None on a CPU as long as everything is read anyway."""

    changes = True

    def __init__(self, policy, store, clock=None) -> None:
        self.paging = paging = policy.paging(store.index)
        if clock is not None and min(store.counts) <= paging.first:
            raise Unfit(FILLING)
        super().__init__(policy, store, clock)
        if self.bias is not None:
            raise Unfit("the stack edits single entries and chooses what to read")
        self.tables: list[torch.Tensor] | None = None
        self.told = 0  # pages that the layer's state shows
        self.sparse = False  # the newest row read chosen pages
        self.looked = self.fetched = 0  # bytes of summaries, and entries, that it read
        if clock is None:
            if self.common is not None and not self.common.pair[0].rows.level:
                raise Unfit("heads that choose what to read keep different numbers of entries")
            self._line, self._laid = torch.arange(paging.page), None
            return
        if self.common is not None:
            raise Unfit("the stack chooses what to read, and no kernel chooses from what samples share")
        if (paging.first or paging.last > 1) and not store.exact_k.rows.level:
            raise Unfit("the stack chooses what to read, and its heads keep different numbers of entries")
        longest = store.longest + clock.room
        self._build(longest)
        self.front = self._part_front()
        self.most = paging.count(longest) - -(paging.last + paging.page - 1) // paging.page
        self.page_bytes = sum(x[:, :1].numel() * x.element_size() for x in self.tables)
        self.level = store.exact_k.rows.level
        self.asked = self._foresee(store.longest + 1)
        self.want = int32([self.asked], store.device)

    @property
    def held(self) -> int:
        """Entries of a lane, of the longest where they differ, the row of this step not counted."""
        return self.ahead + self.store.exact_k.rows.longest

    def _part_front(self) -> TierView | None:
        """Under a graph: the entries in front by themselves, so that pages begin where the kernels' tier begins."""
        first, tier = self.paging.first, self.tiers[0]
        if not first:
            return None
        front = replace(tier, start=tier.start.clone(), length=int32([first] * self.lanes, self.store.device), capacity=first)
        tier.start += first
        tier.length -= first
        tier.capacity -= first
        return front

    # -- summaries ---------------------------------------------------------------------------------------------------
    def _build(self, entries: int) -> None:
        """Summaries of what is stored, with room for `entries` entries a lane."""
        store, rows = self.store, self.store.exact_k.rows
        keys, starts = rows.fields["x"], rows.starts
        if self.common is not None:
            keys = store.all_keys().contiguous()
            keys, starts = keys.view(-1, keys.shape[-1]), [i * keys.shape[2] for i in range(self.lanes)]
        first, device = self.paging.first, store.device
        tier = TierView(
            16, keys, keys, int32([s + first for s in starts], device), int32([n - first for n in store.counts], device),
            entries - first)
        self.tables = [x for x in select.page_summaries(tier, self.paging.page, self.paging.kind) if x is not None]

    def _wide(self) -> list[torch.Tensor]:
        """The summaries as [B, Hk, P, d]."""
        return [x.view(self.batch, self.heads, *x.shape[1:]) for x in self.tables]

    def change(self, q, mass) -> None:
        """The newest row enters the summary of its page."""
        paging = self.paging
        if self.clock is not None:
            tier, grow = self.tiers[0], select.grow_bounds if paging.kind == "bounds" else select.grow_means
            grow(*self.tables, tier.k, tier.start, tier.length, paging.page)
            return
        if self.tables is None:
            return
        page, place = divmod(self.held - paging.first, paging.page)
        if page == self.tables[0].shape[1]:
            more = -(-SPARE // paging.page)
            self.tables = [torch.cat([x, x.new_zeros(x.shape[0], more, x.shape[2])], 1) for x in self.tables]
            self.told = 0
        if paging.kind == "mean":  # pages are chosen among whole ones only
            if place == paging.page - 1:
                slots = (self._line + self.held - place).expand(self.batch, self.heads, -1)
                self._wide()[0][:, :, page] = self._at("key", slots).sum(2) / paging.page
            return
        own = self.store.exact_k.rows
        key = own.whole("x")[:, :, own.lens[0]]
        for table, join in zip(self._wide(), (torch.minimum, torch.maximum)):
            row = table[:, :, page]
            row.copy_(key) if place == 0 else join(row, key, out=row)

    # -- reading -----------------------------------------------------------------------------------------------------
    def write(self, handle) -> None:
        if self.clock is None:  # whole pages are fetched, so the last one has its room
            need = self.paging.first + self.paging.pages(self.held + 1) * self.paging.page - self.ahead
            for rows in (self.store.exact_k.rows, self.store.exact_v.rows):
                if need > rows.caps[0]:
                    rows.reserve(SPARE + self.paging.page)
        super().write(handle)

    def read(self, q, call):
        paging = self.paging
        if self.clock is not None:
            low, high = self.tables if paging.kind == "bounds" else (self.tables[0], None)
            found = select.attend_best(
                q[:, :, 0].contiguous(), self.tiers[0], low, high, self.most, call.scale, page=paging.page, last=paging.last,
                want=self.want, front=self.front, softcap=call.softcap, sink=call.sink, gate=self.gate,
            )
            return found.out.unsqueeze(1), None
        n = self.held + 1
        self.sparse = paging.candidates(n) > paging.count(n)
        if not self.sparse:
            return super().read(q, call)
        if self.tables is None:
            self._build(n + SPARE)
        keys, values = self._chosen(self._best(q, n), n)
        self.fetched = keys.shape[2] * self.lanes
        return self.flat(core.plain(self.packed(q), keys, values, call.scale)[0]), None

    def _best(self, q: torch.Tensor, n: int) -> torch.Tensor:
        """The pages of n entries that q [B,Hq,1,d] likes best, int64 [lanes, count]; of equals the earlier ones (rule R4)."""
        paging, rows = self.paging, q.reshape(self.lanes, self.groups, -1)
        middle = paging.candidates(n)
        tables = [x[:, : paging.pages(n) if paging.whole else middle] for x in self.tables]
        self.looked = sum(x[:, :1].numel() * x.element_size() for x in tables) * (paging.pages(n) if paging.whole else middle)
        if paging.kind == "bounds":
            low, high = tables
            scores = torch.bmm(rows.clamp_min(0), high.mT).baddbmm_(rows.clamp_max(0), low.mT).amax(1)
        else:
            scores = torch.bmm(rows.mean(1, keepdim=True), tables[0].mT).squeeze(1)
        return scores[:, :middle].argsort(dim=-1, descending=True, stable=True)[:, : paging.count(n)]

    def _chosen(self, best: torch.Tensor, n: int) -> list[torch.Tensor]:
        """Keys and values [B,Hk,m,d] of the entries in front, of the pages best [lanes,count], and of the newest entries."""
        paging, held = self.paging, (self.store.exact_k.rows, self.store.exact_v.rows)
        first, page, middle, pages = paging.first, paging.page, paging.candidates(n), paging.pages(n)
        used = n - first - (middle - best.shape[1]) * page
        if self.common is not None:
            newest = torch.arange(middle, pages).expand(self.lanes, -1)
            slots = (torch.cat([best, newest], 1).unsqueeze(-1) * page + self._line).flatten(1)[:, :used] + first
            slots = torch.cat([torch.arange(first).expand(self.lanes, -1), slots], 1).view(self.batch, self.heads, -1)
            return [self._at(side, slots) for side in ("key", "value")]
        cap = held[0].caps[0]
        if self._laid != (cap, middle, pages, best.shape):  # where pages begin; only those of the best change at every step
            self._laid = cap, middle, pages, best.shape
            self._starts = torch.arange(first, self.lanes * cap, cap).view(-1, 1)
            self._places = torch.empty(self.lanes, best.shape[1] + pages - middle, dtype=torch.int64)
            self._places[:, best.shape[1] :] = self._starts + torch.arange(middle, pages) * page
        torch.add(self._starts, best, alpha=page, out=self._places[:, : best.shape[1]])
        runs = [_runs(rows.fields["x"], self._places.view(-1), page) for rows in held]
        found = [x.view(self.batch, self.heads, -1, x.shape[1] // page)[:, :, :used] for x in runs]
        return [torch.cat([rows.whole("x")[:, :, :first], x], 2) for rows, x in zip(held, found)] if first else found

    def _at(self, side: str, slots: torch.Tensor) -> torch.Tensor:
        """Rows of one side at slots int64 [B,Hk,n], of what samples share and of their own: [B,Hk,n,d]."""
        own = (self.store.exact_k if side == "key" else self.store.exact_v).rows
        found = _rows(own, (slots - self.ahead).clamp(0, own.caps[0] - 1))
        if self.common is None:
            return found
        shared = _rows(self.common.views[side][0].rows, slots.clamp_max(self.ahead - 1))
        return torch.where((slots < self.ahead).unsqueeze(-1), shared, found)

    # -- the host's numbers ------------------------------------------------------------------------------------------
    def count(self) -> None:
        super().count()
        store, paging = self.store, self.paging
        if self.clock is not None:
            self._counted()
        if not self.sparse:
            return
        store.last_read, store.last_probe = self.fetched, self.looked
        pages = paging.pages(self.held)
        if pages != self.told:
            self.told = pages
            store.state.update({name: x[:, :, :pages] for name, x in zip(paging.fields, self._wide())})

    def _counted(self) -> None:
        """What a captured step has read, and how many pages the next one reads. All layers do this on the host while the graph
        runs, where a few microseconds each are soon more than the graph takes."""
        paging, (n, count, whole, pages) = self.paging, self.next
        self.sparse = whole > count
        if self.sparse:
            lens = self.store.exact_k.rows.lens
            dropped = self.lanes * (whole - count) if self.level else sum(max(0, paging.candidates(x) - count) for x in lens)
            self.fetched = sum(lens) - paging.page * dropped
            self.looked = self.page_bytes * (pages if paging.whole else whole)
        asked = self._foresee(n + 1)
        if asked != self.asked:
            self.asked = asked
            self.want.fill_(asked)

    def _foresee(self, n: int) -> int:
        """Note what a captured step reads whose longest lane holds n entries: how many pages, those read anyway counted."""
        paging = self.paging
        self.next = n, paging.count(n), paging.candidates(n), paging.pages(n)
        return self.next[1] + self.next[3] - self.next[2]

    @property
    def spare_bytes(self) -> int:
        if self.tables is None:
            return 0
        shown = (self.store.state.get(name) for name in self.paging.fields)
        return sum(x.numel() * x.element_size() for x in self.tables) - sum(
            x.numel() * x.element_size() for x in shown if x is not None)

    def settle(self, target) -> None:
        """Without the room for pages to come."""
        target.state.update({name: target.state[name].contiguous() for name in self.paging.fields if name in target.state})

    def changed(self) -> list[torch.Tensor]:
        """The summaries of the pages that new rows come to."""
        first, page = self.paging.first, self.paging.page
        return [x[lane, (n - first) // page] for x in self.tables for lane, n in enumerate(self.store.counts)]


def _runs(x: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """Rows place .. place+length of x [rows,d] at every one of places int64 [n]: [n, length*d], each run copied at once."""
    width = x.shape[1]
    return x.as_strided((x.shape[0] - length + 1, length * width), (width, 1)).index_select(0, places)


def _rows(rows, slots: torch.Tensor) -> torch.Tensor:
    """Exact rows at slots int64 [B,Hk,n] of lanes that have one capacity: [B,Hk,n,d]."""
    starts = torch.tensor(rows.starts).view(rows.batch, rows.heads, 1)
    return rows.fields["x"].index_select(0, (slots + starts).flatten()).view(*slots.shape, -1)
