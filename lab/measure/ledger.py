"""The ledger of a run: per step and layer, what was stored, what was read in order to choose, what was read to attend."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lab.engine.cache import LabCache


@dataclass(frozen=True)
class Row:
    """One layer at one step, summed over sequences and KV heads.

    entries, stored_bytes: held after the step. probe_bytes: read in order to choose; tables and keys for that alone.
    read_entries: read for attention (a lone key or value is half an entry), read_bytes: the same in bytes. flops of
    attention and choosing. dense_entries, dense_bytes: what a dense exact cache would hold, and read.
    """

    step: int
    layer: int
    entries: int
    stored_bytes: int
    probe_bytes: float
    read_entries: float
    read_bytes: float
    flops: float
    dense_entries: int
    dense_bytes: int


@dataclass
class Ledger:
    """Collects rows of a session's cache, one step at a time."""

    rows: list[Row] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)

    def note(self, cache: LabCache, wall_ms: float = 0.0) -> None:
        """Add the step that has just been taken."""
        step = len(self.wall_ms)
        self.wall_ms.append(wall_ms)
        for layer in cache.lab_layers:
            if layer.is_initialized:
                self.rows.append(_row(step, layer))

    def totals(self, step: int | None = None) -> dict[str, float]:
        """Sums over all rows, or those of one step, and what follows from them.

        compression: dense bytes over stored bytes. read_fraction, probe_fraction: bytes read to attend and to choose over
        those a dense exact cache reads. pays: their sum is below 1, so reading less beats the cost of choosing.
        """
        rows = [r for r in self.rows if step is None or r.step == step]
        names = ("entries", "stored_bytes", "probe_bytes", "read_entries", "read_bytes", "flops", "dense_entries", "dense_bytes")
        out: dict[str, float] = {name: sum(getattr(r, name) for r in rows) for name in names}
        dense = out["dense_bytes"] or 1
        out["compression"] = dense / out["stored_bytes"] if out["stored_bytes"] else 1.0
        out["read_fraction"], out["probe_fraction"] = out["read_bytes"] / dense, out["probe_bytes"] / dense
        out["pays"] = out["read_fraction"] + out["probe_fraction"] < 1
        out["wall_ms"] = sum(self.wall_ms) if step is None else self.wall_ms[step]
        return out

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: rows, totals, wall time per step."""
        return {"rows": [asdict(r) for r in self.rows], "totals": self.totals(), "wall_ms": list(self.wall_ms)}


def _row(step: int, layer) -> Row:
    counts = sum(layer.counts)
    segments = [*layer.keys_side, *layer.values_side]
    held = sum(s.live_bytes for s in segments)
    per_entry = held / counts if counts else 0.0
    d = layer.exact_k.rows.fields["x"].shape[-1] if layer.exact_k.rows.fields else 0
    groups = layer.groups
    dense = layer.seen * layer.batch * layer.heads
    element = layer.dtype.itemsize
    chosen = layer.last_probe / (d * element) if d else 0.0
    return Row(
        step, layer.index, counts, layer.live_bytes, layer.last_probe, layer.last_read, layer.last_read * per_entry,
        groups * d * (4 * layer.last_read + 2 * chosen), dense, dense * 2 * d * element,
    )
