"""Records to JSON text and arrays to bytes, both exactly reversible."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import StorageError

__all__ = ["Packed", "dumps", "loads", "normalise", "pack", "same", "unpack"]

_MARKS = {"$float", "$text", "$dict"}
_SAMPLE = 1 << 18
_ARRAY_KINDS = "biufc"
MAX_ARRAY_BYTES = 2 << 30


def normalise(record: Mapping[str, Any], where: str = "record") -> dict[str, Any]:
    """A deep copy in plain Python: tuples become lists and NumPy scalars become Python's.

    Raises StorageError naming the place of anything JSON cannot hold.
    """
    try:
        return _plain(dict(record), where)
    except RecursionError:
        raise StorageError(
            f"{where} is nested too deeply", "Expected a run record", reason="invalid"
        ) from None


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or not _is_utf8(key):
                raise StorageError(
                    f"{where} has the key {key!r}",
                    "Expected keys that are text",
                    "Use text as the key",
                    reason="invalid",
                )
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, str):
        return str(value)
    raise StorageError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}",
        "Expected None, a number, text, a list or a dict",
        "Convert it before saving; arrays go beside the record",
        reason="invalid",
    )


def same(a: Any, b: Any) -> bool:
    """Equality that also tells 1, 1.0 and True apart, and finds NaN equal to itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return a == b


def dumps(value: Any) -> str:
    """Strict JSON text. What JSON lacks is marked: {"$float": "nan"}, {"$text": base64} for lone surrogates,
    {"$dict": …} around a dict that looks like a mark itself."""
    return json.dumps(_mark(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """The value that `dumps` wrote. Raises ValueError for text that is no JSON, or that has a bad mark."""
    return json.loads(text, object_hook=_unmark, parse_constant=_refuse)


def _mark(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, str) and not _is_utf8(value):
        return {"$text": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode("ascii")}
    if isinstance(value, list):
        return [_mark(item) for item in value]
    if isinstance(value, dict):
        marked = {key: _mark(item) for key, item in value.items()}
        # In pairs, because the hook that reads dicts back sees the inner one first and alone.
        return (
            {"$dict": list(map(list, marked.items()))}
            if len(value) == 1 and _MARKS & value.keys()
            else marked
        )
    return value


def _unmark(found: dict[str, Any]) -> Any:
    if len(found) != 1:
        return found
    ((key, item),) = found.items()
    if key == "$float" and item in ("nan", "inf", "-inf"):
        return float(item)
    if key == "$text" and isinstance(item, str):
        return base64.b64decode(item, validate=True).decode("utf-8", "surrogatepass")
    if key == "$dict" and isinstance(item, list):
        return dict(item)
    if key in _MARKS:
        raise ValueError(f"{key!r} is a mark of this format and cannot hold {item!r}")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass(frozen=True)
class Packed:
    """One array as bytes. `dtype` is NumPy's own spelling ("<f2"), `codec` is zlib or raw."""

    name: str
    dtype: str
    shape: list[int]
    codec: str
    data: bytes


def pack(name: str, array: Any) -> Packed:
    """Bytes for an array of numbers of any shape. Bytes that do not shrink (float16 noise) are kept raw."""
    array = np.asarray(array)
    if array.dtype.kind not in _ARRAY_KINDS:
        raise StorageError(
            f"The array {name!r} has dtype {array.dtype}",
            "Expected numbers or booleans",
            "Save only numeric arrays",
            reason="invalid",
        )
    if array.nbytes > MAX_ARRAY_BYTES:
        raise StorageError(
            f"The array {name!r} has {array.nbytes:,} bytes",
            f"Expected at most {MAX_ARRAY_BYTES:,}",
            "Save fewer layers or a shorter stretch",
            reason="invalid",
        )
    raw = array.tobytes()
    head = raw[:_SAMPLE]
    shrinks = bool(head) and len(zlib.compress(head, 1)) < 0.95 * len(head)
    codec, data = ("zlib", zlib.compress(raw, 1)) if shrinks else ("raw", raw)
    return Packed(name, array.dtype.str, list(array.shape), codec, data)


def unpack(packed: Packed) -> np.ndarray:
    """The array, writable and C-ordered. Raises StorageError where the bytes do not fit the description;
    never inflates beyond the size described."""

    def bad(what: str, expected: str) -> StorageError:
        return StorageError(
            f"The array {packed.name!r} {what}",
            expected,
            "The file is damaged: take another copy",
            reason="invalid",
        )

    try:
        dtype = np.dtype(packed.dtype)
    except (TypeError, ValueError, SyntaxError):
        raise bad(f"has the dtype {packed.dtype!r}", "Expected a NumPy dtype such as '<f4'") from None
    if dtype.kind not in _ARRAY_KINDS:
        raise bad(f"has the dtype {packed.dtype!r}", "Expected numbers or booleans")
    if (
        not all(type(n) is int and n >= 0 for n in packed.shape)
        or max(packed.shape, default=0) > MAX_ARRAY_BYTES
        or len(packed.shape) > 32
    ):
        raise bad(f"has the shape {packed.shape!r}", "Expected a list of sizes")
    size = math.prod(packed.shape) * dtype.itemsize
    if size > MAX_ARRAY_BYTES:
        raise bad(f"claims {size:,} bytes", f"Expected at most {MAX_ARRAY_BYTES:,}")
    if packed.codec == "raw":
        data = packed.data
    elif packed.codec == "zlib":
        try:
            inflate = zlib.decompressobj()
            data = inflate.decompress(packed.data, size + 1)
        except zlib.error:
            raise bad("is not valid zlib data", "Expected bytes that zlib wrote") from None
    else:
        raise bad(f"has the codec {packed.codec!r}", "Expected zlib or raw")
    if len(data) != size:
        raise bad(
            "has too few or too many bytes", f"Expected {size:,} for shape {packed.shape} of {packed.dtype}"
        )
    if not size:
        return np.empty(packed.shape, dtype)
    return np.frombuffer(data, dtype).reshape(packed.shape).copy()
