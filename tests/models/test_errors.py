"""The exception that users read."""

from __future__ import annotations

import pytest

from lab.errors import LabError, out_of_memory


def test_the_text_is_sentences() -> None:
    error = LabError("The prompt is empty", "A prompt has at least one token", "Type a prompt")
    assert str(error) == "The prompt is empty. A prompt has at least one token. Type a prompt."


def test_parts_may_be_missing_and_punctuation_is_kept() -> None:
    assert str(LabError("No model was named.", fix="Did you mean default?")) == "No model was named. Did you mean default?"
    assert LabError("x").expected is None


def test_it_survives_a_trip_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(LabError("a", "b", "c")))
    assert str(error) == "a. b. c." and error.fix == "c."


class OutOfMemoryError(RuntimeError):
    """torch's on a GPU has this name."""


@pytest.mark.parametrize("error, full", [
    (MemoryError(), True), (OutOfMemoryError("full"), True), (OSError(12, "Cannot allocate memory"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
    (RuntimeError("shapes differ"), False), (ValueError("out of memory"), False),
])
def test_memory_that_ran_out_is_known(error: Exception, full: bool) -> None:
    assert out_of_memory(error) is full
