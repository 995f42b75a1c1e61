"""The one exception a user is meant to read."""

from __future__ import annotations


class LabError(Exception):
    """A failure that is explained to the user: what was wrong, what was expected, what to do.

    ``str()`` is one to three plain sentences without a traceback's vocabulary; the interfaces print it as it is.

    Args:
        what: what was wrong, as a sentence.
        expected: what would have been right, as a sentence, or None.
        fix: what to do about it, as a sentence, or None.
        remedy: the one change of a parameter that settles it, {technique, parameter, value}, for a button; or None.
    """

    def __init__(self, what: str, expected: str | None = None, fix: str | None = None, remedy: dict | None = None) -> None:
        self.what = _sentence(what)
        self.expected = _sentence(expected) if expected else None
        self.fix = _sentence(fix) if fix else None
        self.remedy = remedy
        super().__init__(self.what, self.expected, self.fix)

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.expected, self.fix) if part)


def out_of_memory(error: BaseException) -> bool:
    """True when an error says that memory ran out: Python's, a GPU's, or torch's on a CPU, which is a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(w in str(error).lower() for w in words)


def _sentence(text: str) -> str:
    """``text`` stripped, closed by a full stop unless it already ends a sentence."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."
