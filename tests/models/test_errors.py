"""The exception that users read."""

from __future__ import annotations

from lab.errors import LabError


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
