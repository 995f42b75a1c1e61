"""A bounded store of derived arrays: row sums of exponentials and pooled maps of captures that were looked
at.

Kept apart from the captures so that looking through thirty layers costs a fixed amount of memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

LIMIT_BYTES = 512 * 1024 * 1024

_lock = threading.RLock()
_items: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()
_bytes = 0


def get(key: tuple) -> Any | None:
    """The stored value of ``key`` (now the most recently used), or None."""
    with _lock:
        if key not in _items:
            return None
        _items.move_to_end(key)
        return _items[key][0]


def put(key: tuple, value: Any, nbytes: int) -> None:
    """Store ``value``; the least recently used others leave when ``LIMIT_BYTES`` is exceeded."""
    global _bytes
    with _lock:
        if key in _items:
            _bytes -= _items.pop(key)[1]
        _items[key] = (value, nbytes)
        _bytes += nbytes
        while _bytes > LIMIT_BYTES and len(_items) > 1:
            _, (_, freed) = _items.popitem(last=False)
            _bytes -= freed


def drop(serial: int) -> None:
    """Forget everything derived from the capture with this serial number.

    The first part of every key is the tuple of the serial numbers it was derived from.
    """
    global _bytes
    with _lock:
        for key in [k for k in _items if serial in k[0]]:
            _bytes -= _items.pop(key)[1]


def stored_bytes() -> int:
    """Bytes held now."""
    return _bytes
