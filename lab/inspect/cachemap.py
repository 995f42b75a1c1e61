"""What the cache did to every token, through time: bits per entry, and the life of one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lab.errors import LabError
from lab.inspect.capture import NEVER

NOT_YET = 255
"""State of a token that the run has not reached at this row."""
LEVELS = (16, 8, 4, 3, 2, 0)


@dataclass(frozen=True)
class Happening:
    """One thing that befell a token: ``what`` is "written", "narrowed", "evicted" or "merged"; ``bits``
    afterwards.

    ``into`` is the position it was merged into, where the cache recorded it, the first of ``shared`` where it was shared out.
    """

    row: int
    layer: int
    kv_head: int
    what: str
    bits: int
    into: int | None = None
    shared: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheMap:
    """The cache's history of one variant.

    Attributes:
        bits: uint8 [L, Hk, N] final bits (16 = exact, 0 = evicted).
        death: int32 [L, Hk, N] row from which the entry is invisible, ``NEVER`` if kept.
        demoted: int32 [L, Hk, N] row from which it is narrow, ``NEVER`` if never.
        merged: int32 [L, Hk, N] position it was merged into, -1 if none; or None when not recorded.
        among: int32 [L, Hk, N] entries that share it: the first of those from ``merged`` on that outlived it; or None.
    """

    bits: np.ndarray
    death: np.ndarray
    demoted: np.ndarray
    merged: np.ndarray | None = None
    among: np.ndarray | None = None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], letter: str) -> CacheMap:
        """From a run's arrays ``cache/{letter}/bits|death|demoted`` and, if present, ``merged`` and ``among``.

        Raises:
            LabError: when the run recorded no cache map for this variant, or the arrays disagree.
        """
        prefix = f"cache/{letter}/"
        if f"{prefix}bits" not in arrays:
            raise LabError(
                f"This run holds no cache map for variant {letter}",
                None,
                "Run it again with the map recorded, or choose another variant",
            )
        bits = np.asarray(arrays[f"{prefix}bits"])
        never = np.full(bits.shape, NEVER, dtype=np.int32)
        death = np.asarray(arrays.get(f"{prefix}death", never))
        demoted = np.asarray(
            arrays.get(f"{prefix}demoted", np.where(bits < 16, np.arange(bits.shape[-1]), never))
        )
        more = [None if (x := arrays.get(f"{prefix}{name}")) is None else np.asarray(x) for name in ("merged", "among")]
        shapes = {x.shape for x in (bits, death, demoted, *more) if x is not None}
        if bits.ndim != 3 or len(shapes) > 1:
            raise LabError(
                f"The cache map of variant {letter} is damaged",
                "Its arrays have the same three axes: layers, KV heads, tokens",
                "Replay the run",
            )
        return cls(bits, death, demoted, *more)

    @property
    def tokens(self) -> int:
        """N."""
        return self.bits.shape[-1]

    def entries(self, row: int) -> np.ndarray:
        """uint8 [L, Hk, N] bits of every entry as row ``row`` sees it; 0 = evicted, ``NOT_YET`` = not
        written yet."""
        self._check(row)
        # An entry that ended at 0 bits was exact until then, unless it is known to have been narrowed.
        narrow = np.where(self.bits == 0, 16, self.bits)
        state = np.where(row >= self.demoted, narrow, 16)
        state = np.where(row >= self.death, 0, state)
        state[..., np.arange(self.tokens) > row] = NOT_YET
        return state.astype(np.uint8)

    def state(self, row: int, kv_head: int | str = "mean") -> np.ndarray:
        """uint8 [L, N] bits at row ``row`` of one KV head, or the "mean", "min" or "max" over KV heads (mean
        rounded)."""
        entries = self.entries(row)
        if isinstance(kv_head, str):
            if kv_head not in ("mean", "min", "max"):
                raise LabError(f'There is no KV head "{kv_head}"', 'Give a number, "mean", "min" or "max"')
            return np.rint(getattr(entries, kv_head)(axis=1)).astype(np.uint8)
        if not 0 <= kv_head < entries.shape[1]:
            raise LabError(
                f"KV head {kv_head} does not exist", f"They are numbered 0 to {entries.shape[1] - 1}"
            )
        return entries[:, kv_head]

    def counts(self, row: int) -> dict[int, np.ndarray]:
        """{bits: int64 [L]} entries of each width at row ``row``, summed over KV heads; 0 counts the
        evicted."""
        entries = self.entries(row)
        return {level: (entries == level).sum(axis=(1, 2)) for level in LEVELS}

    def kept(self) -> np.ndarray:
        """float32 [L, N] share of the entries written so far that each row still sees."""
        layers, heads, n = self.bits.shape
        deaths = np.maximum(self.death, np.arange(n)).reshape(layers, -1)
        lost = np.stack([np.bincount(d[d < n], minlength=n) for d in deaths]).cumsum(axis=1)
        written = heads * np.arange(1, n + 1)
        return (1 - lost / written).astype(np.float32)

    def life(self, token: int, layer: int | None = None) -> list[Happening]:
        """Everything that befell one token, in the order of rows; of all layers or one."""
        if not 0 <= token < self.tokens:
            raise LabError(f"Position {token} is not in this run", f"Positions are 0 to {self.tokens - 1}")
        layers, heads, _ = self.bits.shape
        if layer is not None and not 0 <= layer < layers:
            raise LabError(
                f"Layer {layer} does not exist in this run", f"Layers are numbered 0 to {layers - 1}"
            )
        out = []
        for n in range(layers) if layer is None else (layer,):
            for h in range(heads):
                bits, death, demoted = (int(x[n, h, token]) for x in (self.bits, self.death, self.demoted))
                out.append(Happening(token, n, h, "written", 16))
                if demoted < min(death, NEVER) and 0 < bits < 16:
                    out.append(Happening(max(demoted, token), n, h, "narrowed", bits))
                if death < NEVER:
                    shared = self.heirs(n, h, token)
                    what = "merged" if shared else "evicted"
                    out.append(Happening(death, n, h, what, 0, shared[0] if shared else None, shared))
        return sorted(out, key=lambda e: (e.row, e.layer, e.kv_head))

    def heirs(self, layer: int, kv_head: int, token: int) -> tuple[int, ...]:
        """Positions that an entry was merged into, none where it was not; several where its value was shared out."""
        first = -1 if self.merged is None else int(self.merged[layer, kv_head, token])
        if first < 0:
            return ()
        count = 1 if self.among is None else max(1, int(self.among[layer, kv_head, token]))
        if count == 1:
            return (first,)
        death = self.death[layer, kv_head]
        there = np.flatnonzero(death[first : int(death[token])] > death[token])[:count]
        return tuple(int(first + j) for j in there)

    def change_rows(self) -> np.ndarray:
        """int32 rows at which anything changed, ascending: the stops of a time slider."""
        rows = np.concatenate([self.death.ravel(), self.demoted.ravel()])
        return np.unique(rows[(rows < self.tokens) & (rows >= 0)]).astype(np.int32)

    def _check(self, row: int) -> None:
        if not 0 <= row < self.tokens:
            raise LabError(f"Row {row} is not in this run", f"Rows are 0 to {self.tokens - 1}")
