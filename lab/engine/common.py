"""The prompt's entries held once for all samples of it: segments of one sequence, seen as those of every sample.

Each tier of a side then has two pieces, the common one and behind it the layer's own: the logical order is the one that
copies would have had, so a layer can give up sharing at any time without its entries changing places.
"""

from __future__ import annotations

import torch

from lab.engine.ragged import Fields, Ragged
from lab.engine.segments import Coded, Exact

Segment = Exact | Coded


class CommonRows(Ragged):
    """Rows of one sequence as those of `batch` sequences: every lane of a head reads the same slots. Not to be written to.

    live_bytes is what copies would take; `Common` counts what there is."""

    def __init__(self, base: Ragged, batch: int) -> None:
        super().__init__(batch, base.heads)
        self.base, self.fields = base, base.fields
        self.lens, self.caps, self.starts = base.lens * batch, base.caps * batch, base.starts * batch

    def padded(self, name: str) -> torch.Tensor:
        table = self.base.padded(name)
        return table.expand(self.batch, *table.shape[1:])

    def whole(self, name: str) -> torch.Tensor:
        table = self.base.whole(name)
        return table.expand(self.batch, *table.shape[1:])


class Stacked:
    """A common segment: one sequence's rows, read (or decoded) once for the query rows of all samples."""

    base: Segment
    rows: CommonRows

    def decode(self, pos: torch.Tensor | None = None) -> torch.Tensor:
        x = self.base.decode(None if pos is None else pos[:1])
        return x.expand(self.rows.batch, *x.shape[1:])

    def logits(self, q: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return unstacked(self.base.logits(stacked(q), None if pos is None else pos[:1]), q.shape[0])

    def mix(self, p: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return unstacked(self.base.mix(stacked(p), None if pos is None else pos[:1]), p.shape[0])


class CommonExact(Stacked, Exact):
    def __init__(self, base: Exact, batch: int) -> None:
        self.base, self.rows = base, CommonRows(base.rows, batch)


class CommonCoded(Stacked, Coded):
    def __init__(self, base: Coded, batch: int) -> None:
        self.base, self.codec, self.bits = base, base.codec, base.bits
        self.rows, self.blocks = CommonRows(base.rows, batch), CommonRows(base.blocks, batch)


class Common:
    """What `batch` samples share: the coded and exact segments of each side, and the positions of their entries.

    keys, values: segments of one sequence that hold rows, narrow to wide. meta: positions and statistics of the same entries,
    as long as no sample has needed its own. Never changed: what a layer no longer shares is left out of a new one.
    """

    def __init__(self, keys: list[Segment], values: list[Segment], meta: Ragged | None, batch: int) -> None:
        self.sides, self.meta, self.batch = {"key": keys, "value": values}, meta, batch
        self.views = {side: [_view(s, batch) for s in held] for side, held in self.sides.items()}
        self.meta_view = None if meta is None else CommonRows(meta, batch)

    @property
    def live_bytes(self) -> int:
        return sum(part.live_bytes for part in self._parts())

    @property
    def allocated_bytes(self) -> int:
        return sum(part.allocated_bytes for part in self._parts())

    def _parts(self) -> list:
        return [*self.sides["key"], *self.sides["value"], *([] if self.meta is None else [self.meta])]

    @property
    def empty(self) -> bool:
        """No key and no value is common any more."""
        return not self.sides["key"] and not self.sides["value"]

    @property
    def pair(self) -> tuple[Segment, Segment] | None:
        """(keys, values) of one sequence where each side is one segment of the same kind and a row's key and value lie alike."""
        if len(self.sides["key"]) != 1 or len(self.sides["value"]) != 1:
            return None
        (key,), (value,) = self.sides["key"], self.sides["value"]
        alike = type(key) is type(value) and key.rows.lens == value.rows.lens and key.rows.starts == value.rows.starts
        return (key, value) if alike else None

    @property
    def exact(self) -> tuple[Exact, Exact] | None:
        """The pair where it is of exact rows, equally many in every lane."""
        pair = self.pair
        return pair if pair is not None and isinstance(pair[0], Exact) and pair[0].rows.level else None

    def seen_by(self, batch: int) -> "Common":
        return Common(self.sides["key"], self.sides["value"], self.meta, batch)

    def without_meta(self) -> "Common":
        return Common(self.sides["key"], self.sides["value"], None, self.batch)

    def without_exact(self, side: str) -> "Common":
        left = {name: [s for s in held if name != side or not isinstance(s, Exact)] for name, held in self.sides.items()}
        return Common(left["key"], left["value"], self.meta, self.batch)

    def trimmed(self, count: int) -> "Common | None":
        """Without the first `count` rows of a layer of exact rows; None when nothing is left."""
        stay = [_behind(s, count) for s in (self.sides["key"][0], self.sides["value"][0])]
        return Common([stay[0]], [stay[1]], self.meta, self.batch) if stay[0].rows.longest else None

    def exact_of(self, side: str) -> Exact | None:
        """One side's common exact rows, as those of every sample; None where there are none."""
        return next((s for s in self.views[side] if isinstance(s, Exact)), None)

    def side(self, side: str, coded: list[Coded], exact: Exact) -> list[Segment]:
        """One side's segments in logical order, the layer's own coded and exact ones among them."""
        mine: dict[int, list[Segment]] = {}
        for segment in (*self.views[side], *coded):
            if not isinstance(segment, Exact):
                mine.setdefault(segment.bits, []).append(segment)
        both = [s for width in sorted(mine) for s in mine[width]]
        shared = self.exact_of(side)
        return [*both, *([] if shared is None else [shared]), exact]

    def positions(self, own: Ragged) -> torch.Tensor:
        """int64 [B, Hk, longest]: the common entries' positions, and behind them those of `own`."""
        first, rest = self.meta.padded("pos").long(), own.padded("pos").long()
        if self.meta.level:
            return torch.cat([first.expand(self.batch, -1, -1), rest], 2)
        lens = self.meta.lens_tensor(first.device).unsqueeze(-1)
        longest = max(a + b for a, b in zip(self.meta_view.lens, own.lens))
        out = torch.nn.functional.pad(first, (0, rest.shape[2])).repeat(self.batch, 1, 1)
        at = (lens + torch.arange(rest.shape[2], device=first.device)).expand(rest.shape)
        return out.scatter(2, at, rest)[..., :longest]  # what lies behind an own lane's end lands behind the whole lane's


def _view(segment: Segment, batch: int) -> Segment:
    return CommonExact(segment, batch) if isinstance(segment, Exact) else CommonCoded(segment, batch)


def _behind(segment: Exact, count: int) -> Exact:
    twin = segment.clone()
    line = torch.arange(twin.rows.longest, device=twin.rows.fields["x"].device)
    twin.keep((line >= count).expand(1, twin.rows.heads, -1))
    return twin


def stacked(x: torch.Tensor) -> torch.Tensor:
    """Rows of all samples [B,Hk,R,c] as rows of one: [1,Hk,B*R,c]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def unstacked(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[1,Hk,B*R,...] back to [B,Hk,R,...]."""
    return x[0].unflatten(1, (batch, -1)).transpose(0, 1)


def aligned(*sides: list[Segment]) -> tuple[list[list[Segment]], list[list[Coded]]]:
    """(what samples share, what each starts with by itself) of the keys' and the values' segments of one sequence.

    Where the two sides have coded different numbers of rows (KIVI), whole blocks coded on both sides are shared, so that a common
    row has its key and its value in common.
    """
    coded = [[s for s in side if isinstance(s, Coded)] for side in sides]
    if [len(c) for c in coded] != [1, 1] or coded[0][0].rows.lens == coded[1][0].rows.lens:
        return list(sides), [[s.empty(1) for s in c] for c in coded]
    block = max(c[0].codec.block for c in coded)
    least = [min(lens) // block * block for lens in zip(*(c[0].rows.lens for c in coded))]
    firsts, rests = [], []
    for side, (segment,) in zip(sides, coded):
        device = next(iter(segment.rows.fields.values())).device
        front = torch.arange(segment.rows.longest, device=device) < torch.tensor(least, device=device).view(1, -1, 1)
        first, rest = segment.clone(), segment.clone()
        first.keep(front)
        rest.keep(~front)
        firsts.append([first, side[-1]])
        rests.append([rest])
    return firsts, rests


def joined(first: Ragged, second: Ragged, spare: int = 0) -> Ragged:
    """New rows that hold, lane by lane, those of `first` and behind them those of `second`."""
    out = Ragged(first.batch, first.heads)
    out.lens = [a + b for a, b in zip(first.lens, second.lens)]
    out.caps = [n + spare for n in out.lens]
    total = 0
    for lane, cap in enumerate(out.caps):
        out.starts[lane], total = total, total + cap
    fields: Fields = {}
    for name, like in first.fields.items():
        flat = like.new_zeros(total, *like.shape[1:])
        for lane, start in enumerate(out.starts):
            n = first.lens[lane]
            flat[start : start + n] = first.lane(name, lane)
            if second.lens[lane]:
                flat[start + n : start + out.lens[lane]] = second.lane(name, lane)
        fields[name] = flat
    out.fields = fields
    return out


def joined_coded(first: Coded, second: Coded) -> Coded:
    """As `joined`, for codes: blocks of `second` are numbered on behind those of `first`."""
    out = Coded(first.codec, first.rows.batch, first.rows.heads)
    out.rows, out.blocks = joined(first.rows, second.rows), joined(first.blocks, second.blocks)
    if first.blocks.fields:
        ids = out.rows.fields["block"]
        for lane, start in enumerate(out.rows.starts):
            n = first.rows.lens[lane]
            ids[start + n : start + out.rows.lens[lane]] += first.blocks.lens[lane]
    return out
