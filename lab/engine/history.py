"""What happened to each position of a layer: when it was narrowed, when it was dropped."""

from __future__ import annotations

import torch

NEVER = 2**31 - 1


class History:
    """Per layer: death and demoted int32 [B, Hk, seen], bits uint8 [B, Hk, seen]; NEVER where nothing happened.

    Row i still saw position j iff i < death[j]. into int32 [B, Hk, seen], or None while nothing was merged: the position
    that a dropped entry joined, -1 if none. Where it was shared out, into is the first of them, and among int32 counts them:
    the entries from into on, in order, that outlived it.
    """

    def __init__(self, batch: int, heads: int, room: int) -> None:
        shape = (batch, heads, max(room, 1))
        self.death = torch.full(shape, NEVER, dtype=torch.int32)
        self.demoted = torch.full(shape, NEVER, dtype=torch.int32)
        self.bits = torch.full(shape, 16, dtype=torch.uint8)
        self.into: torch.Tensor | None = None
        self.among: torch.Tensor | None = None

    def joined(
        self, pos: torch.Tensor, into: torch.Tensor, flags: torch.Tensor, among: torch.Tensor | None = None
    ) -> None:
        """Entries at pos int [B,Hk,m] that are about to be dropped were merged into positions into [B,Hk,m], where flagged.

        among int [B,Hk,m]: how many entries share each, from into on; None: one.
        """
        b, h, slot = flags.cpu().nonzero(as_tuple=True)
        if not b.numel():
            return
        where, target = pos.cpu()[b, h, slot], into.cpu()[b, h, slot]
        self._room(int(where.max()) + 1)
        if self.into is None:
            self.into = torch.full_like(self.death, -1)
        self.into[b, h, where] = target.to(torch.int32)
        if among is not None:
            if self.among is None:
                self.among = torch.zeros_like(self.into)
            self.among[b, h, where] = among.cpu()[b, h, slot].to(torch.int32)

    def dropped(self, pos: torch.Tensor, gone: torch.Tensor, row: int) -> None:
        """Entries at pos int [B,Hk,N] flagged by gone bool [B,Hk,N] were dropped after row `row` had attended."""
        b, h, slot = gone.cpu().nonzero(as_tuple=True)
        where = pos.cpu()[b, h, slot]
        self._room(int(where.max()) + 1 if where.numel() else 0)
        self.death[b, h, where] = row + 1
        self.bits[b, h, where] = 0

    def skipped(self, entered: torch.Tensor, first: int, count: int) -> None:
        """Of the `count` positions from `first` on only first + entered (int64 [T']) reached this layer; no row saw the rest."""
        self._room(first + count)
        gone = torch.ones(count, dtype=torch.bool)
        gone[entered.cpu()] = False
        where = first + gone.nonzero().flatten()
        self.death[:, :, where] = where.to(torch.int32)
        self.bits[:, :, where] = 0

    def coded(self, pos: torch.Tensor, bits: int, row: int, flags: torch.Tensor | None = None) -> None:
        """Entries at pos int [B,Hk,N] went down to `bits` after row `row` had attended; flags bool picks some of them."""
        where = pos.cpu()
        if flags is not None:
            b, h, slot = flags.cpu().nonzero(as_tuple=True)
            where = where[b, h, slot]
            self._room(int(where.max()) + 1 if where.numel() else 0)
            self.demoted[b, h, where], self.bits[b, h, where] = row + 1, bits
            return
        self._room(int(where.max()) + 1 if where.numel() else 0)
        self.demoted.scatter_(2, where, row + 1)
        self.bits.scatter_(2, where, bits)

    def upto(self, seen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(bits, death, demoted) of the first `seen` positions."""
        self._room(seen)
        return self.bits[..., :seen], self.death[..., :seen], self.demoted[..., :seen]

    def targets(self, seen: int) -> torch.Tensor | None:
        """`into` of the first `seen` positions, or None while nothing was merged."""
        self._room(seen)
        return None if self.into is None else self.into[..., :seen]

    def sharing(self, seen: int) -> torch.Tensor | None:
        """`among` of the first `seen` positions, or None while nothing was shared out."""
        self._room(seen)
        return None if self.among is None else self.among[..., :seen]

    def repeat(self, times: int) -> None:
        self.death, self.demoted, self.bits = (t.repeat(times, 1, 1) for t in (self.death, self.demoted, self.bits))
        self.into, self.among = (None if t is None else t.repeat(times, 1, 1) for t in (self.into, self.among))

    def select(self, index: list[int]) -> None:
        self.death, self.demoted, self.bits = (t[index] for t in (self.death, self.demoted, self.bits))
        self.into, self.among = (None if t is None else t[index] for t in (self.into, self.among))

    def clone(self) -> "History":
        twin = History.__new__(History)
        twin.death, twin.demoted, twin.bits = self.death.clone(), self.demoted.clone(), self.bits.clone()
        twin.into, twin.among = (None if t is None else t.clone() for t in (self.into, self.among))
        return twin

    def _room(self, needed: int) -> None:
        have = self.death.shape[-1]
        if needed > have:
            extra = needed - have + 64
            pad = torch.nn.functional.pad
            self.death = pad(self.death, (0, extra), value=NEVER)
            self.demoted = pad(self.demoted, (0, extra), value=NEVER)
            self.bits = pad(self.bits, (0, extra), value=16)
            self.into = None if self.into is None else pad(self.into, (0, extra), value=-1)
            self.among = None if self.among is None else pad(self.among, (0, extra))
