"""The cache's history, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

from lab.errors import LabError
from lab.inspect.cachemap import NOT_YET, CacheMap
from lab.inspect.capture import NEVER


def history() -> CacheMap:
    """One layer, two KV heads, six tokens: head 0 narrows token 1 at row 3 and evicts token 2 at row 4."""
    bits = np.full((1, 2, 6), 16, dtype=np.uint8)
    death = np.full((1, 2, 6), NEVER, dtype=np.int32)
    demoted = death.copy()
    bits[0, 0, 1], demoted[0, 0, 1] = 4, 3
    bits[0, 0, 2], death[0, 0, 2] = 0, 4
    return CacheMap.from_arrays(
        {"cache/B/bits": bits, "cache/B/death": death, "cache/B/demoted": demoted}, "B"
    )


def test_state_through_time():
    m = history()
    n = NOT_YET
    assert m.state(2, 0).tolist() == [[16, 16, 16, n, n, n]]
    assert m.state(3, 0).tolist() == [[16, 4, 16, 16, n, n]]
    assert m.state(5, 0).tolist() == [[16, 4, 0, 16, 16, 16]]
    assert m.state(5, 1).tolist() == [[16] * 6]
    assert m.state(5, "mean").tolist() == [[16, 10, 8, 16, 16, 16]]
    assert m.state(5, "min")[0, 2] == 0 and m.state(5, "max")[0, 2] == 16
    assert m.change_rows().tolist() == [3, 4]


def test_counts_and_kept():
    m = history()
    assert {k: v.tolist() for k, v in m.counts(5).items()} == {16: [10], 8: [0], 4: [1], 3: [0], 2: [0], 0: [1]}
    np.testing.assert_allclose(m.kept(), [[1, 1, 1, 1, 0.9, 11 / 12]], rtol=1e-6)


def test_life_of_a_token():
    m = history()
    assert [(e.row, e.kv_head, e.what, e.bits) for e in m.life(1)] == [
        (1, 0, "written", 16),
        (1, 1, "written", 16),
        (3, 0, "narrowed", 4),
    ]
    assert [(e.row, e.what) for e in m.life(2, layer=0)] == [(2, "written"), (2, "written"), (4, "evicted")]
    merged = np.full((1, 2, 6), -1, dtype=np.int32)
    merged[0, 0, 2] = 3
    last = CacheMap(m.bits, m.death, m.demoted, merged).life(2)[-1]
    assert (last.what, last.into, last.shared) == ("merged", 3, (3,))


def test_a_shared_value_names_every_heir_that_outlived_it():
    death = np.full((1, 1, 10), NEVER, np.int32)
    death[0, 0, [1, 3, 4]] = [7, 7, 9]
    bits, merged, among = (np.full((1, 1, 10), x, t) for x, t in ((16, np.uint8), (-1, np.int32), (0, np.int32)))
    merged[0, 0, 1], among[0, 0, 1] = 2, 3
    found = {"bits": bits, "death": death, "merged": merged, "among": among}
    m = CacheMap.from_arrays({f"cache/A/{name}": x for name, x in found.items()}, "A")
    assert m.heirs(0, 0, 1) == (2, 4, 5), "3 left at the same row, 4 only later"
    assert m.life(1)[-1].into == 2 and m.heirs(0, 0, 3) == ()
    among[0, 0, 1] = 9
    assert m.heirs(0, 0, 1) == (2, 4, 5, 6), "what was written after row 6 had no part in it"


def test_missing_rows_default_to_whole_life():
    bits = np.array([[[16, 4, 16]]], dtype=np.uint8)
    m = CacheMap.from_arrays({"cache/A/bits": bits}, "A")
    assert m.state(2).tolist() == [[16, 4, 16]] and m.kept().tolist() == [[1, 1, 1]]


def test_bad_requests():
    m = history()
    for call in (
        lambda: m.state(6),
        lambda: m.state(0, 2),
        lambda: m.state(0, "sum"),
        lambda: m.life(9),
        lambda: m.life(0, layer=1),
        lambda: CacheMap.from_arrays({}, "A"),
    ):
        with pytest.raises(LabError):
            call()
    with pytest.raises(LabError, match="damaged"):
        CacheMap.from_arrays({"cache/A/bits": m.bits, "cache/A/death": m.death[0]}, "A")
