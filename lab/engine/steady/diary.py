"""What left at which row, noted on the device while steps run and told to the layer's history when somebody asks."""

from __future__ import annotations

import torch


class Diary:
    """log int32 [steps, lanes]: the position that left each lane at each step; step int64 [1], the row of the log to write.

    On a CPU the log is filled again and again, told in between; under a graph it has room for every step.
    """

    def __init__(self, lanes: int, store, clock) -> None:
        self.clock, self.first, self.used = clock, store.seen, 0
        size = 64 if clock is None else clock.room + 1
        self.log = torch.zeros(size, lanes, dtype=torch.int32, device=store.device)
        self.step = torch.zeros(1, dtype=torch.int64) if clock is None else clock.step

    def left(self, pos: torch.Tensor) -> None:
        """Positions [lanes] that leave in this step, where no kernel notes them."""
        self.log[self.used] = pos

    def turned(self, store) -> None:
        """A step is over."""
        self.used += 1
        if self.clock is not None:
            return
        self.step += 1
        if self.used == self.log.shape[0]:
            self.write(store)
            self.first, self.used = self.first + self.used, 0
            self.step.zero_()

    def write(self, target) -> None:
        """Tell the target layer's history. Telling twice changes nothing."""
        history = target._history
        if history is None or not self.used:
            return
        bits, death, demoted = history.upto(self.first + self.used)
        pos = self.log[: self.used].long().cpu().T.reshape(*death.shape[:2], self.used)
        rows = torch.arange(self.first, self.first + self.used, dtype=torch.int32).expand(pos.shape)
        death.scatter_(2, pos, rows + 1)
        bits.scatter_(2, pos, 0)
        newest = pos == rows  # it left as it came, so it was never narrowed
        if bool(newest.any()):
            demoted[newest.nonzero(as_tuple=True)[0], newest.nonzero(as_tuple=True)[1], pos[newest]] = 2**31 - 1
