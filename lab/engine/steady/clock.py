"""What moves on by itself in a captured step: counters on the device, shared by all layers, advanced at the end of each step."""

from __future__ import annotations

from typing import Callable

import torch


class Clock:
    """position int64 [1,1] of the newest row; step int64 [1] since the start; counters that grow by one per step.

    `ring(size, lanes)` gives (place, oldest) int64 [lanes]: flat rows of a ring of `size` rows per lane, the one that the new row
    goes to and the one that leaves after it.
    """

    def __init__(self, position: int, room: int, device: torch.device) -> None:
        self.room, self.device = room, device
        self.trial = False  # steps attend and change nothing
        # what steps change is not read again before the next step, so it runs beside the rest of the model
        self.side: torch.cuda.Stream | None = None
        self._held: list[object] = []
        self.position = torch.full((1, 1), position, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._counters: list[tuple[object, str]] = []
        self._flats: list[torch.Tensor] = [self.position, self.step]
        self._rings: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def count(self, owner: object, name: str) -> None:
        """The integer tensor `owner.name` grows by one per step."""
        self._counters.append((owner, name))

    def ring(self, size: int, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = (size, lanes)
        if key not in self._rings:
            base = torch.arange(lanes, device=self.device) * size
            turn = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._rings[key] = (turn, base, base.clone(), base + 1 % size)
        return self._rings[key][2:]

    def aside(self, work: Callable[[], None], *uses: object) -> None:
        """Do `work` beside what follows, until `join`; it may use what has been computed so far. `uses` are kept until then, so
        that their memory is not given to others."""
        if self.side is None:
            work()
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            work()
        self._held.append(uses)

    def join(self) -> None:
        """The end of a step: everything done aside is done."""
        if self._held:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            self._held.clear()

    def drop_side(self) -> None:
        """Do everything in one line from here on."""
        self.side = None
        self._held.clear()

    def pool(self) -> None:
        """Lay the counters side by side, so that one addition advances them all. Each starts on a 16-byte boundary."""
        for dtype in (torch.int64, torch.int32):
            mine = [(o, n) for o, n in self._counters if getattr(o, n).dtype == dtype]
            if not mine:
                continue
            sizes = [-(-getattr(o, n).numel() // 4) * 4 for o, n in mine]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self.device)
            at = 0
            for (owner, name), size in zip(mine, sizes):
                old = getattr(owner, name)
                view = flat[at : at + old.numel()].view(old.shape)
                view.copy_(old)
                setattr(owner, name, view)
                at += size
            self._flats.append(flat)

    def advance(self) -> None:
        for flat in self._flats:
            flat.add_(1)
        for (size, _), (turn, base, place, oldest) in self._rings.items():
            turn.add_(1).remainder_(size)
            torch.add(base, turn, out=place)
            torch.add(base, (turn + 1).remainder_(size), out=oldest)
