"""Keeping transformers' own bars and notices off the terminal while the lab reports progress itself."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

_BAR = re.compile(r"(\d+)%\|")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints errors only and draws no bars; the earlier settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def bars_to(heard: Callable[[float], None]) -> Iterator[None]:
    """Inside, bars drawn on stderr call ``heard`` with their fraction instead; other text is printed as ever."""
    with redirect_stderr(_Listener(sys.stderr, heard)):
        yield


class _Listener(io.TextIOBase):
    """A stderr that turns tqdm's bars into numbers."""

    def __init__(self, behind: TextIO, heard: Callable[[float], None]) -> None:
        self._behind, self._heard = behind, heard

    def write(self, text: str) -> int:
        bar = _BAR.search(text)
        if bar:
            self._heard(int(bar[1]) / 100)
        elif text.strip("\r\n \x1b[A"):  # a bar's leftovers: line ends and cursor moves
            self._behind.write(text)
        return len(text)

    def flush(self) -> None:
        self._behind.flush()
