"""Runs' comparison in words, and what an import says, without a browser."""
from __future__ import annotations

import copy

from lab.ui.components import columns, comparison
from storage.compare import compare

from . import fixture


def two() -> tuple[dict, dict]:
    """Two records: the second twice as slow in B, with another seed and a field that nobody gave words to."""
    first, _ = fixture.record_and_arrays("one")
    second = copy.deepcopy(first)
    second.update(run_id="two", created="2026-01-02T03:04:05Z")
    second["settings"].update(seed=1234, new_thing=7)
    second["variants"][1].update(tpot_ms=2 * first["variants"][1]["tpot_ms"], top1_agreement=None)
    return first, second


def lines(table: dict) -> dict[tuple[str, str], list]:
    return {(group["title"], row["name"]): row["cells"] for group in table["groups"] for row in group["rows"]}


def test_fields_have_words_units_and_the_multiple_of_the_first_run():
    told = lines(comparison.readable(compare(two(), False), True))
    assert told["Variant B · H2O · KIVI", "per token"] == [["19.4 ms", ""], ["38.8 ms", "2.00×"]]
    assert told["Variant B · H2O · KIVI", "agreement with the reference"] == [["0.92", ""], ["–", ""]]
    assert told["Settings", "seed"] == [["0", ""], ["1234", ""]]
    assert told["Settings", "new thing"] == [["–", ""], ["7", ""]], "a field without words is shown all the same"
    assert told["Run", "made"][1][0] == "2026-01-02 03:04 UTC"
    assert len(told) == 5, "differences alone"


def test_the_first_divergence_is_counted_as_the_columns_count_it():
    records = two()
    for place, record in enumerate(records):
        record["variants"][1]["first_divergence"] = 4 + place
    told = lines(comparison.readable(compare(records, False), True))["Variant B · H2O · KIVI", "texts part at new token"]
    assert [cell[0] for cell in told] == ["5", "6"]
    assert "first differs at token 5" in columns.note({**records[0]["variants"][1], "finish": "stop"})


def test_all_fields_stand_in_their_groups_without_a_raw_name():
    table = comparison.readable(compare(two(), False), False)
    titles = [group["title"] for group in table["groups"]]
    assert titles[:3] == ["Prompt", "Settings", "Model"], "what was asked stands before what it gave"
    assert titles[3:6] == ["Variant A · Dense", "Variant B · H2O · KIVI", "Variant C · StreamingLLM"]
    assert titles[6:] == ["Run", "Machine and versions"]
    told = lines(table)
    assert told["Variant A · Dense", "KV cache"][1] == ["260.0 KiB", "1.00×"]
    assert told["Variant B · H2O · KIVI", "memory simulated, not freed"][0][0] == "no"
    assert not [name for _, name in told if "_" in name or "." in name]


def test_an_odd_value_of_an_imported_record_is_shown_as_it_is():
    first, second = two()
    second["variants"][1]["kv_bytes"] = "many"
    told = lines(comparison.readable(compare((first, second), False), True))
    assert told["Variant B · H2O · KIVI", "KV cache"][1] == ["many", ""]


def test_importing_a_run_again_says_that_it_is_there(tmp_path):
    lab = fixture.FakeLab()
    name, _, data = lab.library.export("20251231-230000-aaaa", "json")
    assert lab.library.take(name, data) == {"run_id": "20251231-230000-aaaa", "added": 0, "there": 1}
    lab.library.delete("20251231-230000-aaaa")
    assert lab.library.take("../" + name, data)["added"] == 1
