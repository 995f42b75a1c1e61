"""Captures: the contract's array names, validation and head mapping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lab.errors import LabError
from lab.inspect.capture import NEVER, Capture, captured_layers
from lab.inspect.view import view


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "qk/A/2/q": rng.standard_normal((4, 6, 8)).astype(np.float16),
        "qk/A/2/k": rng.standard_normal((2, 6, 8)).astype(np.float16),
        "qk/A/2/meta": np.array([0.25, 50.0, 3.0]),
        "cache/A/death": np.full((3, 2, 6), NEVER, dtype=np.int32),
        "cache/A/bits": np.full((3, 2, 6), 16, dtype=np.uint8),
    }


def test_reads_the_contract_names():
    c = Capture.from_arrays(arrays(), "A", 2)
    assert (c.heads, c.kv_heads, c.tokens, c.scale, c.softcap, c.window) == (4, 2, 6, 0.25, 50.0, 3)
    assert c.death.dtype == torch.int32 and c.bits.shape == (2, 6) and c.demoted is None
    assert c.q.dtype == torch.float16 and c.queries(0).dtype == torch.float32
    assert captured_layers(arrays(), "A") == [2] and captured_layers(arrays(), "B") == []


def test_round_trip():
    c = Capture.from_arrays(arrays(), "A", 2)
    again = Capture.from_arrays(c.to_arrays(), "A", 2)
    np.testing.assert_array_equal(view(c, 0).values, view(again, 0).values)


def test_zero_meta_means_absent():
    a = arrays() | {"qk/A/2/meta": np.zeros(3)}
    c = Capture.from_arrays(a, "A", 2)
    assert c.scale == pytest.approx(8**-0.5) and c.softcap is None and c.window is None


@pytest.mark.parametrize("letter, layer, words", [("A", 1, "Captured layers are 2"), ("B", 2, "replay it")])
def test_missing_state_is_explained(letter, layer, words):
    with pytest.raises(LabError, match=words):
        Capture.from_arrays(arrays(), letter, layer)


def test_wrong_shapes_are_refused():
    q, k = torch.zeros(4, 6, 8), torch.zeros(2, 6, 8)
    for bad in ((q[0], k), (q, k[:, :5]), (q[:3], k), (q[:, :0], k[:, :0])):
        with pytest.raises(LabError):
            Capture(*bad)
    with pytest.raises(LabError, match="death has shape 1x6"):
        Capture(q, k, death=torch.zeros(1, 6))
    with pytest.raises(LabError, match="key_bias"):
        Capture(q, k, key_bias=torch.zeros(2, 6))


def test_infinite_vectors_are_refused():
    q = torch.zeros(1, 3, 4)
    q[0, 1, 0] = torch.inf
    with pytest.raises(LabError, match="infinities"):
        view(Capture(q, torch.zeros(1, 3, 4)), 0)
