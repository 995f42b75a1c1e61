"""Predicted bytes, reads and work of a stack of techniques on any model, without running it.

Bytes follow the cache's own rules (budgets, codes, positions, running statistics), so that for dense, StreamingLLM, H2O,
KIVI and integer codes they equal `LabCache.kv_bytes` to the byte. Eviction inside coded blocks (H2O with KIVI) is
predicted as if the oldest entries left. Work is counted in eFLOPs (Kinetics, arXiv 2506.05333): FLOPs plus bytes times
the FLOPs a machine could have done meanwhile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Iterable

import numpy as np

from lab.engine.policy import Policy
from lab.engine.slots import UNLIMITED
from lab.engine.stack import Stack
from lab.errors import LabError
from lab.measure.hardware import Machine

INTENSITY = 562.5  # FLOP per byte of the accelerator in the Kinetics paper
CHUNK = 512  # prompt rows per forward of a Session, which decides how far a sliding layer is trimmed
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
POSITION_BYTES = 4
MASS_BYTES = 4


@dataclass(frozen=True)
class LayerCost:
    """One layer: entries and bytes stored, summed over KV heads, and what the newest decode step reads of them.

    probe_bytes are read in order to choose, read_bytes for attention itself; flops is the attention of that step.
    """

    layer: int
    entries: int
    kv_bytes: int
    read_entries: float
    probe_bytes: float
    read_bytes: float
    flops: float


@dataclass(frozen=True)
class Prediction:
    """What a stack will hold and read once `total` tokens have been fed, `prompt` of them as the prompt.

    Attributes:
        kv_bytes, kv_bytes_dense: cache bytes under the stack and without it. entries: summed over layers and KV heads.
        kept_fraction, read_fraction: entries kept, and entries read by the newest row, over entries of a dense cache.
        read_bytes_fraction, probe_fraction: bytes read to attend and to choose, over the bytes that a dense cache reads.
        step_flops, step_bytes: one decode step at this point, model weights included.
        flops, eflops: all decode steps from `prompt` to `total`.
    """

    prompt: int
    total: int
    element: int
    kv_bytes: int
    kv_bytes_dense: int
    entries: int
    kept_fraction: float
    read_fraction: float
    read_bytes_fraction: float
    probe_fraction: float
    step_flops: float
    step_bytes: float
    flops: float
    eflops: float
    per_layer: tuple[LayerCost, ...]

    @property
    def saves(self) -> bool:
        """A selector pays when what it reads to choose and what it then reads stay below a dense read (break-even)."""
        return self.read_bytes_fraction + self.probe_fraction < 1

    @property
    def intensity(self) -> float:
        """FLOPs per byte of one decode step: the place on a roofline."""
        return self.step_flops / self.step_bytes if self.step_bytes else 0.0

    def step_time_bound(self, machine: Machine) -> float:
        """Seconds one decode step takes at least on `machine`: max(work / peak, bytes / bandwidth)."""
        return max(self.step_flops / machine.flops, self.step_bytes / machine.bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; intensity and saves included."""
        return {**asdict(self), "per_layer": [asdict(x) for x in self.per_layer], "saves": self.saves,
                "intensity": self.intensity}


def predict(
    facts: Any, stack: Stack | str, prompt: int, total: int, element: int = 4, *, intensity: float = INTENSITY,
    weight_bytes: float | None = None, batch: int = 1, trials: int = 1,
) -> Prediction:
    """Predict one sequence's cache and work.

    Args:
        facts: ModelFacts, or a dict with its fields (layers, heads, kv_heads, head_dim are needed).
        stack: a Stack or its text. prompt, total: tokens of the prompt, and tokens fed in all (total >= prompt).
        element: bytes per cached number of the exact tier (4 for float32, 2 for bfloat16).
        intensity: FLOPs a machine could do per byte moved (eFLOPs). weight_bytes: bytes of all weights read per step;
            by default parameters times `element`; 0 leaves weights out, as the paper does. batch: sequences that
            share one read of the weights. trials: continuations of one prompt; kv_bytes (and those of the dense cache, and per
            layer) are of all of them, which hold the prompt's entries once; dense trials also share the prompt's read.
    Raises LabError for sizes that make no sense.
    """
    f = _facts(facts)
    if prompt < 1 or total < prompt:
        raise LabError(
            f"prompt={prompt}, total={total} cannot be predicted", "The prompt has at least one token and is part of the total"
        )
    stack = Stack.parse(stack) if isinstance(stack, str) else stack
    parameters = f.get("parameters") or 0
    weights = parameters * element if weight_bytes is None else weight_bytes
    plan, dense = _Plan(f, stack, prompt, element), _Plan(f, Stack(), prompt, element)
    layers = tuple(plan.layer(i, total, trials) for i in plan.attending)
    full = [dense.layer(i, total, trials) for i in dense.attending]
    full_entries = sum(x.entries for x in full)
    full_bytes = sum(x.read_bytes for x in full)
    step_flops = 2.0 * parameters + sum(x.flops for x in layers)
    step_bytes = weights / batch + sum(x.read_bytes + x.probe_bytes for x in layers)
    flops, moved = plan.decode_work(total, trials, shared=not stack.techniques)
    flops += 2.0 * parameters * (total - prompt) * trials
    moved += weights / batch * (total - prompt) * trials
    entries = sum(x.entries for x in layers)
    return Prediction(
        prompt, total, element, sum(x.kv_bytes for x in layers), sum(x.kv_bytes for x in full), entries,
        entries / full_entries, sum(x.read_entries for x in layers) / full_entries,
        sum(x.read_bytes for x in layers) / full_bytes, sum(x.probe_bytes for x in layers) / full_bytes,
        step_flops, step_bytes, flops, flops + intensity * moved, layers,
    )


def stored(facts: Any, stack: Stack | str, prompt: int, total: int, element: int = 4, trials: int = 1) -> int:
    """`predict`'s kv_bytes alone, for curves of many points."""
    plan = _Plan(_facts(facts), Stack.parse(stack) if isinstance(stack, str) else stack, prompt, element)
    return sum(plan.stored(layer, total, trials) for layer in plan.attending)


def check(stack: Stack, prompt: int) -> None:
    """Raises the LabError that a run of this prompt would end in: a budget smaller than the entries it must protect."""
    Policy(stack, 1).check(prompt)


def prompt_work(facts: Any, stack: Stack | str, prompt: int, element: int = 4) -> tuple[float, float]:
    """(attention FLOPs, bytes moved) of reading a prompt of `prompt` tokens, all layers.

    Work is that of the pairs a causal prompt reads: sliding layers, techniques that know beforehand (`planned_band`) and
    trimmed prompts read fewer; what a technique decides while reading is counted as if it read everything. Bytes are the least
    there could be: queries, keys, values and outputs move once.
    """
    stack = Stack.parse(stack) if isinstance(stack, str) else stack
    plan = _Plan(_facts(facts), stack, prompt, element)
    heads, d, kv = plan.f["heads"], plan.f["head_dim"], plan.f["kv_heads"]
    flops = moved = 0.0
    for layer in plan.attending:
        rows, window = plan._prompt_rows(layer), plan.window(layer)
        pairs = band_pairs(rows, 0, window or rows)
        for technique in stack.filling("select"):
            band = technique.planned_band() if hasattr(technique, "planned_band") else None
            if band is not None:
                pairs = min(pairs, band_pairs(rows, band.sinks, min(band.window, window or rows)))
        flops += 4.0 * heads * d * pairs
        moved += 2.0 * (heads + kv) * d * rows * element
    return flops, moved


def band_pairs(rows: int, sinks: int, window: int) -> int:
    """(row, key) pairs of a causal prompt whose rows read the first `sinks` keys and the latest `window` ones."""
    w, s = min(window, rows), sinks
    recent = w * (w + 1) // 2 + (rows - w) * w
    far = rows - w  # rows with keys behind their window, 1 to far of them
    kept = min(s, far)
    return recent + kept * (kept + 1) // 2 + (far - kept) * s if far else recent


def curve(facts: Any, stack: Stack | str, prompt: int, totals: Iterable[int], element: int = 4) -> list[Prediction]:
    """`predict` at each of `totals`: memory against context. Totals below the prompt are taken as shorter prompts."""
    return [predict(facts, stack, min(prompt, total), total, element) for total in totals]


class _Plan:
    """The sizes a stack's policy will choose, layer by layer."""

    def __init__(self, facts: dict, stack: Stack, prompt: int, element: int) -> None:
        heads = facts["kv_heads"]
        for technique in stack.techniques:
            heads = technique.planned_heads(heads)
        facts = {**facts, "kv_heads": heads}
        self.f, self.stack, self.prompt, self.element = facts, stack, prompt, element
        kinds = facts.get("layer_types") or ["full_attention"] * facts["layers"]
        self.kinds = list(kinds)
        self.attending = [i for i, kind in enumerate(self.kinds) if kind.endswith("attention") and kind != "linear_attention"]
        self.policy = Policy(stack, facts["layers"])
        self.budget = self.policy.total(prompt)
        self.reads = [t for t in stack.filling("select") + stack.filling("route") + stack.filling("weigh")]
        self.reads = list(dict.fromkeys(self.reads))

    def window(self, layer: int) -> int | None:
        return self.f.get("sliding_window") if self.kinds[layer] == "sliding_attention" else None

    def lanes(self, layer: int) -> list[int]:
        """Budget per KV head after the prompt; UNLIMITED where nothing is evicted."""
        heads, layers = self.f["kv_heads"], self.f["layers"]
        if self.budget is None:
            return [UNLIMITED] * heads
        who = self.policy.allocator or self.policy.scorer
        return [max(1, n) for n in who.planned_lanes(self.budget, self.prompt, layer, layers, heads)]

    def entries(self, layer: int, total: np.ndarray) -> list[np.ndarray]:
        """Entries per KV head once total tokens (an array) were fed."""
        window = self.window(layer)
        if window and not self.policy.tracks:
            held = np.array([_trimmed(self.prompt, int(t), window) for t in total])
            return [held] * self.f["kv_heads"]
        out = []
        seen_prompt = self._prompt_rows(layer)
        for budget in self.lanes(layer):
            seen = total - self.prompt + seen_prompt
            if self.policy.scorer is not None and self.policy.scorer.evicts_in_decode:
                out.append(np.minimum(budget, seen))
            else:
                out.append(min(budget, seen_prompt) + (total - self.prompt))
        return out

    def attended(self, layer: int, total: np.ndarray) -> list[np.ndarray]:
        """Entries per KV head that the newest row finds: its own is there already, what it displaces is not yet gone."""
        generated = (total > self.prompt).astype(int)
        return [before + generated for before in self.entries(layer, total - generated)]

    def _prompt_rows(self, layer: int) -> int:
        trim = self.stack.one("trim")
        return self.prompt if trim is None else trim.planned_rows(self.prompt, layer, self.f["layers"])

    def stored(self, layer: int, total: int, trials: int = 1) -> int:
        """Bytes of one layer, all KV heads and trials; what trials of one prompt share is counted once."""
        alone = sum(self._bytes(int(n[0]), layer) for n in self.entries(layer, np.array([total])))
        return alone if trials == 1 else trials * alone - (trials - 1) * self.shared(layer, total)

    def shared(self, layer: int, total: int) -> int:
        """Bytes of one layer that trials of the prompt hold once: its entries as the prompt left them, where no trial has had
        to change one by now (an eviction parts them; codes of the prompt stay common, exact rows that are still to be coded
        do not)."""
        before, now = (self.entries(layer, np.array([n])) for n in (self.prompt, total))
        new = total - self.prompt
        if self.window(layer) and not self.policy.tracks:
            pairs = [(max(0, int(n[0]) - new),) * 2 for n in now]
        else:
            pairs = [(int(a[0]), int(b[0])) for a, b in zip(before, now)]
            if any(held < first + new for first, held in pairs):
                return 0
        tags = 0
        if self.policy.tracks or self._prompt_rows(layer) < self.prompt:
            moves = self.policy.tiered or self.policy.encoder is not None and not self.policy.encoder.keeps_order
            tags = 0 if new and (self.policy.want_mass or moves) else POSITION_BYTES
        if self.policy.want_mass and not new:
            tags += MASS_BYTES
        return int(sum(first * tags + self._shared_codes(first, held) for first, held in pairs))

    def _shared_codes(self, first: int, held: int) -> int:
        """Bytes of keys and values that a head's `first` entries after the prompt still have in common at `held` entries."""
        d, encoder = self.f["head_dim"], self.policy.encoder
        if encoder is None or self.policy.tiered or not first:
            return self._codes(first)
        coded = {side: (encoder.due(side, first)[1], encoder.due(side, held)[1]) for side in ("key", "value")}
        moved = any(now > then for then, now in coded.values())
        then = [n for n, _ in coded.values()]
        size = 0
        for side, (count, _) in coded.items():
            exact = (first - count) * d * self.element
            codes = encoder.coded_bytes(side, first, d, self.element) - exact
            if min(then) and min(then) < max(then):  # only whole blocks that both sides have coded
                codes = codes * (min(then) // encoder.code_block * encoder.code_block) // count
            size += codes + (0 if moved and encoder.due(side, UNLIMITED)[1] else exact)
        return size

    def layer(self, layer: int, total: int, trials: int = 1) -> LayerCost:
        f, d = self.f, self.f["head_dim"]
        held = [int(n[0]) for n in self.entries(layer, np.array([total]))]
        probes, reads = zip(*(self._read(layer, n) for n in self.attended(layer, np.array([total]))))
        read = float(sum(r[0] for r in reads))
        per_entry = self._row_bytes(max(held))
        groups = f["heads"] / f["kv_heads"]
        probe = float(sum(p[0] for p in probes)) * d * self.element
        flops = 4 * groups * d * read + 2 * groups * d * float(sum(p[0] for p in probes))
        return LayerCost(layer, sum(held), self.stored(layer, total, trials), read, probe, read * per_entry, flops)

    def decode_work(self, total: int, trials: int, shared: bool) -> tuple[float, float]:
        """(attention FLOPs, KV bytes) of all decode steps from prompt to total, as exact sums."""
        f, d = self.f, self.f["head_dim"]
        steps = np.arange(self.prompt + 1, total + 1)
        groups, flops, moved = f["heads"] / f["kv_heads"], 0.0, 0.0
        known: dict = {}
        for layer in self.attending:
            key = (self.window(layer), tuple(self.lanes(layer)), self._prompt_rows(layer), self._read_key(layer))
            if key not in known:
                work, size = 0.0, 0.0
                for held in self.attended(layer, steps):
                    probe, read = self._read(layer, held)
                    per_entry = self._row_bytes(int(held[-1]) if held.size else 1)
                    work += float((4 * groups * d * read + 2 * groups * d * probe).sum())
                    if shared and self.window(layer) is None:
                        size += float((self.prompt + trials * (held - self.prompt)).sum()) * per_entry
                    else:
                        size += trials * float((read * per_entry + probe * d * self.element).sum())
                known[key] = (work * trials, size)
            flops, moved = flops + known[key][0], moved + known[key][1]
        return flops, moved

    def _read_key(self, layer: int) -> tuple:
        probe = np.array([97.0, 4096.0])
        return tuple(float(x) for t in self.reads for part in t.planned_read(probe, layer, self.f["layers"]) for x in part)

    def _read(self, layer: int, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probe, read = 0 * held, held
        window = self.window(layer)
        if window:
            read = np.minimum(read, window)
        for technique in self.reads:
            p, r = technique.planned_read(held, layer, self.f["layers"])
            probe, read = probe + p, np.minimum(read, r)
        return probe, read

    def _row_bytes(self, entries: int) -> float:
        """Mean bytes of one entry's key and value as they lie in the cache."""
        return self._codes(max(entries, 1)) / max(entries, 1)

    def _codes(self, entries: int) -> int:
        d, encoder = self.f["head_dim"], self.policy.encoder
        if encoder is None:
            return 2 * entries * d * self.element
        if self.policy.tiered:
            return self.policy.allocator.planned_codes(entries, d, self.element, encoder)
        return sum(encoder.coded_bytes(side, entries, d, self.element) for side in ("key", "value"))

    def _bytes(self, entries: int, layer: int) -> int:
        f, size = self.f, self._codes(entries)
        if self.policy.tracks or self._prompt_rows(layer) < self.prompt:
            size += entries * POSITION_BYTES
        if self.policy.want_mass:
            size += entries * MASS_BYTES
        groups = f["heads"] // f["kv_heads"]
        tables = sum(
            t.table_bytes(entries, f["head_dim"], self.element, layer, f["layers"], groups) for t in self.stack.techniques
        )
        return int(size + tables)


def _trimmed(prompt: int, total: int, window: int) -> int:
    """Entries a sliding layer holds: it is cut back to window - 1 whenever it is 64 beyond that."""
    held = 0
    for at in range(0, prompt, CHUNK):
        held += min(CHUNK, prompt - at)
        if held - window + 1 > 64:
            held = window - 1
    room, steps = 64 + window - 1 - held, total - prompt
    if steps <= room:
        return held + steps
    return window - 1 + (steps - room - 1) % 65


def _facts(facts: Any) -> dict:
    f = dict(facts) if isinstance(facts, dict) else facts.to_dict()
    missing = [n for n in ("layers", "heads", "kv_heads", "head_dim") if not f.get(n)]
    if missing:
        raise LabError(f"The model's facts lack {', '.join(missing)}", "layers, heads, kv_heads and head_dim are needed")
    return f
