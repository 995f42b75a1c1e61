"""Long drawing work: its progress, its cancel, and its manners while a generation needs the processor."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .controller import Lab, sentence


class Told:
    """How far a piece of work is, and whether it should still go on."""

    def __init__(self) -> None:
        self.fraction, self._dropped = 0.0, threading.Event()

    def progress(self, fraction: float) -> None:
        """Note the fraction done."""
        self.fraction = float(fraction)

    def cancel(self) -> None:
        """Ask the work to stop at its next check."""
        self._dropped.set()

    def cancelled(self) -> bool:
        """True once nobody wants the result."""
        return self._dropped.is_set()


class Task(Told):
    """Work in a thread of its own. `result` is there when it is done, `problem` when it failed."""

    def __init__(self, lab: Lab, work: Callable[[Told], Any]) -> None:
        super().__init__()
        self.result: Any = None
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._run, args=(lab, work), daemon=True)
        self._thread.start()

    def _run(self, lab: Lab, work: Callable[[Told], Any]) -> None:
        try:
            with gently(lab):
                self.result = work(self)
        except Exception as problem:
            self.problem = "Cancelled." if self.cancelled() else sentence(problem)

    @property
    def running(self) -> bool:
        """True until there is a result or a problem."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait a moment."""
        self._thread.join(seconds)


@contextmanager
def gently(lab: Lab) -> Iterator[None]:
    """One torch thread for drawing while somebody's generation runs on a CPU, all of them otherwise."""
    if not lab.busy():
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
