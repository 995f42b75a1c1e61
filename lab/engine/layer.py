"""One attention layer's cache: tiers of stored rows, their positions, and the changes a policy may make to them.

Logical order. Entry n of a lane is the same entry on the key side, the value side and in `meta`. On each side rows lie
as [coded..., exact...]; the two sides may have coded different prefixes (KIVI codes keys by blocks, values one by one).

Samples of one prompt hold its entries once (`common`), each tier's common rows in front of the samples' own. What changes a
common entry first gives every sample its own copy (`part`); what only reads, adds entries or changes added ones never does.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from lab.engine.common import Common, Segment, Stacked
from lab.engine.handle import Handle
from lab.engine.history import History
from lab.engine.ragged import Ragged
from lab.engine.segments import Codec, Coded, Exact, drop
from lab.engine.sharing import Shares
from lab.engine.tap import Tap


class LabLayer(Shares, CacheLayerMixin):
    """A transformers cache layer whose storage the lab's attention function reads and changes.

    Attributes: index, the layer's place among the cache's layers; seen, tokens fed so far (never tokens kept);
    slack, entries per lane to allocate beyond what eviction leaves.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self, index: int, reserve: int = 0, track: bool = False, window: int | None = None, slack: int = 32
    ) -> None:
        super().__init__()
        self.index, self.reserve, self.track = index, reserve, track
        self.window, self.slack = window, slack
        self.shared = False  # other layers read this one's rows after it
        self.tap: Tap | None = None
        self.static = None  # its place in a captured graph, while there is one
        self.witness = None  # is told the queries, keys and values the model brings, while two ways of a step are compared
        self.step = None  # its step in place (lab.engine.steady), while decode steps take it
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.base = 0  # position of entry 0 while positions are implicit
        self.coded_k: list[Coded] = []
        self.coded_v: list[Coded] = []
        self.common: Common | None = None  # entries that the samples of one prompt hold once
        self.shared_rows = 0  # tokens that were seen when sequences became samples of one prompt
        self.exact_k: Exact | None = None
        self.exact_v: Exact | None = None
        self.meta: Ragged | None = None
        self.queries: torch.Tensor | None = None
        self.state: dict = {}
        self.step = None
        self.step_refused = False  # asked once after each prompt
        self._history: History | None = None
        self.prompt_done = False
        self.budget: torch.Tensor | int | None = None
        self.last_read: float = 0  # entries read by the newest query row, summed over lanes; a lone key or value is half
        self.groups = 1  # query heads that share a KV head
        self.last_probe = 0  # bytes read in order to choose them

    # -- transformers' side ----------------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.exact_k, self.exact_v = Exact(batch, heads), Exact(batch, heads)
        self.meta = Ragged(batch, heads) if self.track else None
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[Handle, Handle]:
        """Take the new rows k, v [B, Hk, T, d] and return a handle; the attention function stores and attends."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def get_seq_length(self, *args) -> int:
        return self.seen

    def get_mask_sizes(self, query_length, *args) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + count, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, *args) -> None:
        raise RuntimeError("The lab's cache changes entries after attending and cannot be rolled back.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch == 1:
            self.repeat(repeats)
        else:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.settle()
        chosen = [int(i) for i in indices]
        for part in self._parts():
            part.select_sequences(chosen)
        if self.common is not None:
            self.common = self.common.seen_by(len(chosen))
        if self.history is not None:
            self.history.select(chosen)
        self._each_sequence(lambda x: x[torch.tensor(chosen, device=x.device)])

    @property
    def in_place(self):
        """The step in place that is running, on a CPU or in a graph, or None."""
        return self.static if self.static is not None else self.step

    def settle(self) -> None:
        """Go back to ordinary steps: storage in ordinary order, history complete."""
        running, self.step, self.static, self.step_refused = self.in_place, None, None, False
        if running is not None:
            with torch.inference_mode():
                running.settle(self)

    @property
    def history(self) -> History | None:
        """The life of every position, where it is recorded; what steps in place have noted is told first."""
        running = self.in_place
        if running is not None and self._history is not None:
            with torch.inference_mode():
                running.note(self)
        return self._history

    @history.setter
    def history(self, value: History | None) -> None:
        self._history = value

    # -- what is stored --------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return self.exact_k.rows.batch

    @property
    def heads(self) -> int:
        return self.exact_k.rows.heads

    @property
    def widths(self) -> int:
        """Channels of a key plus channels of a value."""
        return self.exact_k.rows.fields["x"].shape[-1] + self.exact_v.rows.fields["x"].shape[-1]

    @property
    def keys_side(self) -> list[Segment]:
        if self.common is not None:
            return self.common.side("key", self.coded_k, self.exact_k)
        return [*self.coded_k, self.exact_k]

    @property
    def values_side(self) -> list[Segment]:
        if self.common is not None:
            return self.common.side("value", self.coded_v, self.exact_v)
        return [*self.coded_v, self.exact_v]

    @property
    def plain(self) -> bool:
        """Only exact rows, equally many in every lane: the fast paths apply."""
        alone = self.common is None and not self.coded_k and not self.coded_v
        return alone and self.exact_k.rows.level and self.exact_k.rows.dense

    @property
    def counts(self) -> list[int]:
        """Entries held per lane."""
        if not self.is_initialized:
            return [0]
        return [sum(lane) for lane in zip(*(s.rows.lens for s in self.keys_side))]

    @property
    def longest(self) -> int:
        return max(self.counts)

    @property
    def live_bytes(self) -> int:
        """Bytes of everything held for the entries kept: codes, scales, tags, positions, running statistics; common ones once."""
        common = 0 if self.common is None else self.common.live_bytes
        return sum(part.live_bytes for part in self._parts()) + common + self.table_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the tensors behind them; the difference to live_bytes is slack capacity."""
        common = 0 if self.common is None else self.common.allocated_bytes
        spare = 0 if self.in_place is None else self.in_place.spare_bytes
        return sum(part.allocated_bytes for part in self._parts()) + common + self.table_bytes + spare

    @property
    def table_bytes(self) -> int:
        """Bytes techniques keep beside the entries (page bounds, moments): the tensors in `state`."""
        return sum(x.numel() * x.element_size() for x in self.state.values() if isinstance(x, torch.Tensor))

    def bits_count(self) -> dict[int, int]:
        """Entries held at each width, summed over lanes. One whose key and value differ in width counts half at each, and an odd
        half at the wider."""
        halves = {16: 0} if self.is_initialized else {}
        for segment in (*self.keys_side, *self.values_side) if self.is_initialized else ():
            halves[segment.bits] = halves.get(segment.bits, 0) + sum(segment.rows.lens)
        table, before = {}, 0
        for bits in sorted(halves, reverse=True):
            table[bits] = (before + halves[bits] + 1) // 2 - (before + 1) // 2
            before += halves[bits]
        return table

    def positions(self) -> torch.Tensor:
        """Absolute position of every entry, int64 [B, Hk, longest]; past a lane's end the value is undefined."""
        if self.meta is not None:
            if self.common is not None and self.common.meta is not None:
                return self.common.positions(self.meta)
            return self.meta.padded("pos").long()
        line = torch.arange(self.base, self.base + self.longest, device=self.device)
        return line.expand(self.batch, self.heads, -1)

    def valid(self) -> torch.Tensor | None:
        """bool [B, Hk, longest], or None when every lane is full."""
        counts = self.counts
        if counts.count(counts[0]) == len(counts):
            return None
        lens = torch.tensor(counts, device=self.device).view(self.batch, self.heads, 1)
        return torch.arange(max(counts), device=self.device) < lens

    def spans(self, side: list[Segment]) -> list[tuple[Segment, torch.Tensor]]:
        """The segments of a side that hold rows, in logical order, each with its rows' positions [B, Hk, width]."""
        pos, out = self.positions(), []
        used = [segment for segment in side if segment.rows.longest]
        even = all(segment.rows.level for segment in used)
        start = torch.zeros(self.batch, self.heads, 1, dtype=torch.long, device=self.device)
        at = 0
        for segment in used:
            width = segment.rows.longest
            if even:
                out.append((segment, pos[:, :, at : at + width]))
            else:
                index = (start + torch.arange(width, device=self.device)).clamp_max(pos.shape[-1] - 1)
                out.append((segment, pos.gather(2, index)))
                start = start + segment.rows.lens_tensor(self.device).unsqueeze(-1)
            at += width
        return out

    def all_keys(self) -> torch.Tensor:
        """Stored keys in logical order, decoded: [B, Hk, longest, d]."""
        layer = self._orderly()
        return layer._gathered(layer.keys_side)

    def all_values(self) -> torch.Tensor:
        """Stored values in logical order, decoded: [B, Hk, longest, d]."""
        layer = self._orderly()
        return layer._gathered(layer.values_side)

    # -- changes ---------------------------------------------------------------------------------------------------
    def append(self, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor | None, keep: torch.Tensor | None) -> None:
        """Append rows k, v [B,Hk,T,d]; pos int [B,T] where positions are tracked, keep bool [B,T] drops padding."""
        spare = max(self.reserve - self.seen - k.shape[2], 64)
        if self.window and not self.track:
            spare = min(spare, self.window)
        self.exact_k.append(k, keep, spare)
        self.exact_v.append(v, keep, spare)
        self.seen += k.shape[2]
        if self.meta is not None:
            rows = {"pos": pos.to(torch.int32).unsqueeze(1).expand(-1, self.heads, -1)}
            for name in self.meta.fields:
                if name != "pos":
                    rows[name] = torch.zeros(self.batch, self.heads, k.shape[2], device=self.device)
            self.meta.append(rows, keep, spare)

    def appended(self) -> None:
        """Note one row per lane that a captured step has stored."""
        for part in (self.exact_k.rows, self.exact_v.rows, *([self.meta] if self.meta is not None else [])):
            part.lens = [n + 1 for n in part.lens]
        self.seen += 1
        self.last_read = sum(self.exact_k.rows.lens)

    def start_tracking(self) -> None:
        """Store positions from here on (padding was met, so they are no longer a plain range)."""
        if self.meta is None:
            self.track, self.meta = True, Ragged(self.batch, self.heads)
            if self.seen:
                line = torch.arange(self.base, self.base + self.longest, device=self.device, dtype=torch.int32)
                self.meta.append({"pos": line.expand(self.batch, self.heads, -1)})

    def attribute(self, name: str) -> torch.Tensor:
        """A running float32 statistic per entry, [B, Hk, longest]; created as zeros on first use."""
        self.part_meta()
        if name not in self.meta.fields:
            like = torch.zeros(self.batch, self.heads, self.longest, device=self.device)
            self.meta.add_field(name, like)
        return self.meta.padded(name)

    def set_attribute(self, name: str, value: torch.Tensor) -> None:
        """Replace a running statistic by value [B, Hk, longest]."""
        self.part_meta()
        if self.meta.dense and name in self.meta.fields:
            self.meta.padded(name).copy_(value)
        else:
            self.meta.add_field(name, value)

    def keep(self, mask: torch.Tensor, row: int) -> None:
        """Drop every entry whose mask bool [B, Hk, longest] is False, and free its memory."""
        if self.common is not None:
            self._part_for(~mask)
        if self.history is not None:
            valid = self.valid()
            gone = ~mask if valid is None else ~mask & valid
            self.history.dropped(self.positions(), gone, row)
        for side in (self.keys_side, self.values_side):
            start = torch.zeros(self.batch, self.heads, 1, dtype=torch.long, device=self.device)
            for segment in side:
                width = segment.rows.longest
                if width == 0:
                    continue
                index = (start + torch.arange(width, device=self.device)).clamp_max(mask.shape[-1] - 1)
                lens = segment.rows.lens_tensor(self.device).unsqueeze(-1)
                if not isinstance(segment, Stacked):  # common rows all stay
                    segment.keep(mask.gather(2, index), spare=self.slack if segment is side[-1] else 0)
                start = start + lens
        if self.common is not None and self.common.meta is not None:
            first = self.common.meta_view.lens_tensor(self.device).unsqueeze(-1)
            mask = mask.gather(2, (first + torch.arange(self.meta.longest, device=self.device)).clamp_max(mask.shape[-1] - 1))
        self.meta.keep(mask, spare=self.slack)

    def drop_one(self, slot: torch.Tensor, row: int, lanes: list[int] | None = None) -> None:
        """Drop entry slot int64 [B, Hk] of every lane, or of `lanes` only: O(row) when all rows are exact."""
        coded = bool(self.coded_rows("key") or self.coded_rows("value"))
        if coded and self.common is None:
            self._drop_in_order(slot, row, lanes)
            return
        which = torch.ones(self.batch * self.heads, 1, dtype=torch.bool, device=self.device)
        if lanes is not None:
            which = ~which
            which[lanes] = True
        which = which.view(self.batch, self.heads, 1)
        if coded:
            mask = torch.ones(self.batch, self.heads, self.longest, dtype=torch.bool, device=self.device)
            self.keep(mask.scatter_(2, slot.unsqueeze(-1), ~which), row)
            return
        if self.history is not None:
            self.history.dropped(self.positions().gather(2, slot.unsqueeze(-1)), which, row)
        places = (slot, slot) if self.common is None else self._behind_common(slot, which)
        for part, place in zip((self.exact_k.rows, self.exact_v.rows, self.meta), (places[0], *places)):
            part.pop_swap(place, lanes)

    def _drop_in_order(self, slot: torch.Tensor, row: int, lanes: list[int] | None) -> None:
        """As `keep` of all others, after one look at the device: which segment holds an entry follows from the lengths."""
        places = [place if lanes is None or i in lanes else None for i, place in enumerate(slot.flatten().tolist())]
        if self.history is not None:
            gone = torch.tensor([place is not None for place in places]).view(self.batch, self.heads, 1)
            self.history.dropped(self.positions().gather(2, slot.unsqueeze(-1)), gone, row)
        for side in (self.keys_side, self.values_side):
            drop(side, places)
        self.meta.drop(places)

    def trim_window(self) -> None:
        """Drop entries no later query can see in a sliding-window layer, a block at a time."""
        extra = self.longest - self.window + 1
        if self.meta is None and extra > 64 and (self.plain or self.split is not None):
            self.base += extra
            if self.common is not None:
                held = self.common.exact[0].rows.longest
                self.common, extra = self.common.trimmed(extra), max(0, extra - held)
            if extra:
                self.exact_k.rows.take_front(extra)
                self.exact_v.rows.take_front(extra)

    def code(self, side: str, codec: Codec, first: int, count: int | list[int], row: int) -> None:
        """Move `count` exact rows of one side, oldest first after skipping `first`, into that side's coded segment.

        A list gives the count of each lane, where lanes hold different numbers of exact rows.
        """
        self.part_exact(side)
        exact, coded = (self.exact_k, self.coded_k) if side == "key" else (self.exact_v, self.coded_v)
        if not coded:
            coded.append(Coded(codec, self.batch, self.heads))
        before = self._coded_lens(side)
        if isinstance(count, list):
            line = torch.arange(exact.rows.longest, device=self.device)
            flags = (line >= first) & (line < first + torch.tensor(count, device=self.device).view(self.batch, self.heads, 1))
            taken, slots, inside = exact.rows.packed(flags)
            moved = self.positions().gather(2, (before + slots).clamp_max(self.longest - 1))
            coded[0].append(taken["x"], moved, inside)
            exact.keep(~flags, spare=self.slack)
            if self.history is not None and side == "key":
                self.history.coded(moved, codec.bits, row, inside)
            return
        index = before + first + torch.arange(count, device=self.device)
        moved = self.positions().gather(2, index.expand(self.batch, self.heads, -1))
        taken = exact.rows.take_front(count, skip=first)["x"]
        coded[0].append(taken, moved)
        if self.history is not None and side == "key":
            self.history.coded(moved, codec.bits, row)

    def reorder_after_code(self, first: int, count: int | list[int]) -> None:
        """Bring `meta` in line after `code` skipped the `first` exact rows on both sides."""
        if first == 0 or self.meta is None:
            return
        if isinstance(count, list):
            count = torch.tensor(count, device=self.device).view(self.batch, self.heads, 1)
        self.part_meta()
        line = torch.arange(self.meta.longest, device=self.device)
        start = self._coded_lens("key") - count  # [B, Hk, 1]
        back = torch.where(line < start + count + first, line - count, line)
        self.meta.order(torch.where(line < start, line, torch.where(line < start + count, line + first, back)))

    def repeat(self, times: int) -> None:
        """Turn one prompt's cache into `times` samples of it, which hold its entries once."""
        self.settle()
        if times == 1:
            return
        if self.is_initialized and self.batch == 1 and self.common is None:
            self._share(times)
        else:
            for part in self._parts():
                part.repeat(times)
            self.common = None if self.common is None else self.common.seen_by(self.batch)
        if self.history is not None:
            self.history.repeat(times)
        self._each_sequence(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def clone(self) -> "LabLayer":
        """An independent copy: the fork of a stream."""
        twin = LabLayer(self.index, self.reserve, self.track, self.window, self.slack)
        running, history = self.in_place, self.history
        twin.__dict__.update(self.__dict__)
        twin.coded_k, twin.coded_v = [s.clone() for s in self.coded_k], [s.clone() for s in self.coded_v]
        if self.is_initialized:
            twin.exact_k, twin.exact_v = self.exact_k.clone(), self.exact_v.clone()
        twin.meta = self.meta.clone() if self.meta is not None else None
        twin.tap = twin.static = twin.step = None
        twin.history = history.clone() if history is not None else None
        twin.state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.state.items()}
        if running is not None:
            with torch.inference_mode():
                running.settle(twin)
        return twin

    # -- inside ----------------------------------------------------------------------------------------------------
    def _parts(self) -> list:
        if not self.is_initialized:
            return []
        own = [*self.coded_k, self.exact_k, *self.coded_v, self.exact_v]
        return own if self.meta is None else [*own, self.meta]

    def _orderly(self) -> "LabLayer":
        """This layer, or a copy in ordinary order where a running step keeps it in its own."""
        return self.clone() if self.in_place is not None and not self.in_place.orderly else self

    def _coded_lens(self, side: str) -> torch.Tensor:
        """int64 [B, Hk, 1]: coded rows per lane."""
        lens = [sum(lane) for lane in zip(*(s.rows.lens for s in self.coded_rows(side)))]
        return torch.tensor(lens, device=self.device).view(self.batch, self.heads, 1)

    def _each_sequence(self, change) -> None:
        """Apply a change of the batch to what is kept beside the stored rows: [B, ...] tensors."""
        if isinstance(self.budget, torch.Tensor):
            self.budget = change(self.budget)
        if self.queries is not None:
            self.queries = change(self.queries)
        self.state = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in self.state.items()}

    def _gathered(self, side: list[Segment]) -> torch.Tensor:
        if len(side) == 1:
            return side[0].decode()
        parts = [(segment.decode(pos).to(self.dtype), segment.rows) for segment, pos in self.spans(side)]
        if len(parts) == 1:
            return parts[0][0]
        if all(rows.level for _, rows in parts):
            return torch.cat([x for x, _ in parts], 2)
        out = parts[0][0].new_zeros(self.batch, self.heads, self.longest, parts[0][0].shape[-1])
        for lane in range(self.batch * self.heads):
            b, h = divmod(lane, self.heads)
            at = 0
            for x, rows in parts:
                n = rows.lens[lane]
                out[b, h, at : at + n] = x[b, h, :n]
                at += n
        return out
