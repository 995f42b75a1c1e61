"""What differs between runs, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .codec import same
from .errors import StorageError

__all__ = ["MOST_COMPARED", "compare"]

MOST_COMPARED = 10
# Too long for a table cell, or different by nature.
_LEFT_OUT = {"tokens", "token_ids", "fidelity", "layers", "techniques", "run_id", "schema", "letter"}


def compare(records: Sequence[dict[str, Any]], only_differences: bool = True) -> dict[str, Any]:
    """A table of runs' fields: `{"run_ids": […], "names": […], "rows": [{"field", "values", "differs"}]}`.

    A field is a dotted path (`settings.seed`, `variants.B.kl_mean`); `values` has one entry a run, None where
    the run lacks it. With `only_differences` the rows in which all runs agree are left out.
    """
    if not 2 <= len(records) <= MOST_COMPARED:
        raise StorageError(
            f"{len(records)} run{'' if len(records) == 1 else 's'} cannot be compared",
            f"Expected 2 to {MOST_COMPARED} different runs",
            reason="invalid",
        )
    flat = [_flat(record) for record in records]
    fields = list(dict.fromkeys(field for one in flat for field in one))
    fields.sort(
        key=lambda field: field.startswith("variants.")
    )  # stable: fields of late runs keep their place
    rows = []
    for field in fields:
        values = [one.get(field) for one in flat]
        differs = not all(same(values[0], value) for value in values[1:])
        if differs or not only_differences:
            rows.append({"field": field, "values": values, "differs": differs})
    return {
        "run_ids": [record["run_id"] for record in records],
        "names": [record["name"] for record in records],
        "rows": rows,
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: ", ".join(map(str, value)) if isinstance(value, list) else value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        if key in _LEFT_OUT:
            continue
        if key == "variants" and not path and isinstance(item, list):
            for place, variant in enumerate(item):
                letter = str(variant.get("letter", place)) if isinstance(variant, dict) else str(place)
                out.update(_flat(variant, f"variants.{letter}"))
        else:
            out.update(_flat(item, f"{path}.{key}" if path else key))
    return out
