"""Blocks of one drawing shared out among threads: one torch thread each, so that a block stays in its core's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from lab.inspect.scores import Cancel, Cancelled, Progress

_lock = threading.Lock()
_idle: dict[int, list[ThreadPoolExecutor]] = {}


@contextmanager
def _pool(size: int) -> Iterator[ThreadPoolExecutor]:
    """``size`` threads of one torch thread each, for one drawing: two drawings at a time share the cores, not a queue."""
    with _lock:
        free = _idle.setdefault(size, [])
        pool = free.pop() if free else _begin(size)
    try:
        yield pool
    finally:
        with _lock:
            free.append(pool)


def _begin(size: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(size)

    def begin() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(size, "lab-inspect", initializer=begin)
    list(pool.map(lambda _: None, range(size)))
    torch.set_num_threads(size)  # torch keeps the number per thread, but new threads start with the last one set
    return pool


def each(
    blocks: Sequence[Any],
    work: Callable[[Any], None],
    device: torch.device,
    cost: Callable[[Any], float],
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """``work`` on every block, on as many threads as torch has here; a GPU, or one thread, takes them one after another.

    ``progress`` is told the share of ``cost`` that is done, ``cancel`` asked before each block.

    Raises:
        Cancelled: when ``cancel`` said so; and whatever ``work`` raises first.
    """
    total = max(sum(map(cost, blocks)), 1e-9)
    done, stop, told = [0.0], threading.Event(), threading.Lock()

    def one(block: Any) -> None:
        if stop.is_set():
            return
        try:
            if cancel and cancel():
                raise Cancelled()
            work(block)
            with told:
                done[0] += cost(block)
                if progress:
                    progress(min(1.0, done[0] / total))
        except BaseException:
            stop.set()
            raise

    size = 1 if device.type != "cpu" else torch.get_num_threads()
    if size == 1 or len(blocks) == 1:
        for block in blocks:
            one(block)
        return
    with _pool(size) as pool:
        waiting = [pool.submit(one, block) for block in blocks]
        problems = [problem for problem in (w.exception() for w in waiting) if problem is not None]
    if problems:
        raise problems[0]
