"""What the Memory & speed tab predicts for a chosen machine: dots under its roofline, and where its memory runs out."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.errors import LabError

from . import figures
from .components.tables import badge, folded
from .controller import Lab
from .format import DASH, count, decimal, duration, esc, percent, rate, size, titles

SEQUENCES = (1, 4, 16, 64, 256)
VIEWS = {"step": "whole step", "attention": "attention alone"}
KINDS = {"step": {"decode": "decode step", "prompt": "whole prompt"},
         "attention": {"decode": "decode attention", "prompt": "prompt attention"}}
POINTS = 13  # contexts of a memory line


@dataclass(frozen=True)
class Pick:
    """What a visitor chose: machine by name, sequences decoded at once, and whether weights count ("step") or not."""

    machine: str = ""
    sequences: int = 1
    view: str = "step"

    @classmethod
    def read(cls, value: Any) -> Pick:
        """From the browser; whatever is not offered falls back to the default."""
        given = value if isinstance(value, dict) else {}
        many = str(given.get("sequences"))
        return cls(str(given.get("machine") or ""), int(many) if many.isdigit() and int(many) in SEQUENCES else 1,
                   str(given.get("view")) if given.get("view") in VIEWS else "step")


@dataclass(frozen=True)
class Row:
    """One dot: a variant's decode step or prompt, predicted, with the time measured for it where there is one (seconds)."""

    letter: str
    title: str
    kind: str
    work: Any
    least: float
    compute: bool
    measured: float | None


def machines() -> list[Any]:
    """Machines on offer, this one first (it is measured at the first call)."""
    from lab.measure.hardware import machines as table

    return table()


def machine_of(pick: Pick) -> Any:
    """The chosen machine; this one where none of that name is known."""
    found = machines()
    return next((m for m in found if m.name == pick.machine), found[0])


def made_here(record: dict[str, Any]) -> bool:
    """Whether a run's times were measured on this machine and in this way of using it."""
    from lab.measure.record import environment

    mine, its = environment(), record.get("environment") or {}
    return all(its.get(k) == mine.get(k) for k in ("cpu", "gpu", "threads"))


def rows(lab: Lab, record: dict[str, Any], pick: Pick) -> list[Row]:
    """Dots of every variant that ran, for the newest half of its text: two each, a decode step and the prompt."""
    from lab.measure import roofline

    machine, found = machine_of(pick), []
    prompt = len((record.get("prompt") or {}).get("token_ids") or [])
    samples = int((record.get("settings") or {}).get("samples") or 1)
    timed = pick.view == "step" and machine.source == "measured" and pick.sequences == samples and made_here(record)
    for v in record.get("variants") or []:
        if v.get("error") or not prompt:
            continue
        total = prompt + len(v.get("tokens") or []) // 2  # the median step is about the middle one
        try:
            works = roofline.works(record.get("model") or {}, lab.stack(v), prompt, total, machine, pick.sequences)
        except LabError:
            continue
        for kind, name in KINDS[pick.view].items():
            ms = v.get("tpot_ms" if kind == "decode" else "ttft_ms") if timed else None
            work = works[name]
            found.append(Row(str(v.get("letter")), str(v.get("title") or v.get("spec")), kind, work, work.seconds(machine),
                             work.intensity >= machine.intensity, ms / 1000 if ms else None))
    return found


def draw(lab: Lab, record: dict[str, Any], pick: Pick) -> tuple[Any, str, Any, str]:
    """(roofline, its table, memory against context, its table) of a run for what was picked."""
    machine, found = machine_of(pick), rows(lab, record, pick)
    roof = {"name": machine.name, "flops": machine.flops, "bandwidth": machine.bandwidth,
            "measured": machine.source == "measured"}
    dots = []
    for r in found:
        about = f"{r.letter} · {KINDS[pick.view][r.kind]}<br>{decimal(r.work.intensity, 2)} FLOP/byte"
        dots.append({"letter": r.letter, "kind": r.kind, "intensity": r.work.intensity, "flops": r.work.attainable(machine),
                     "measured": False, "text": f"{about}<br>at least {duration(1000 * r.least)}, predicted"})
        if r.measured:
            dots.append({"letter": r.letter, "kind": r.kind, "intensity": r.work.intensity, "flops": r.work.flops / r.measured,
                         "measured": True, "text": f"{about}<br>{duration(1000 * r.measured)}, measured: "
                         f"{percent(r.least / r.measured)} of the roof"})
    return figures.roofline(roof, dots), _roof_table(machine, found, pick), *_memory(lab, record, pick, machine)


def _roof_table(machine: Any, found: list[Row], pick: Pick) -> str:
    """The roofline's numbers, and where the machine's come from."""
    head = ("", "work, FLOP", "moved", "FLOP per byte", "limited by", "at least, predicted", "measured", "of the roof")
    body = []
    for r in found:
        reached = percent(r.least / r.measured) if r.measured else DASH
        cells = [rate(r.work.flops), size(r.work.bytes), decimal(r.work.intensity, 2), "compute" if r.compute else "bandwidth",
                 duration(1000 * r.least), duration(1000 * r.measured) if r.measured else DASH, reached]
        body.append((f"{badge(r.letter)} {esc(KINDS[pick.view][r.kind])}", cells))
    return folded("Table", "work and time under the roofline", head, body, _about(machine))


def _about(machine: Any) -> str:
    """A machine's peaks and where they are from."""
    source = esc(machine.source)
    if machine.source.startswith("https://"):
        source = f'<a href="{source}" target="_blank" rel="noreferrer">{source.split("/")[2]}</a>'
    elif machine.source == "measured":
        source = "measured once, when the app started"
    memory = f", {machine.memory / 1e9:,.0f} GB" if machine.memory else ""
    return (f'<p class="soft note">{esc(machine.name)}: {rate(machine.flops, "FLOP/s")} in {esc(machine.format)}, '
            f'{rate(machine.bandwidth, "B/s")}{memory} ({source}). Bytes are the least there could be: '
            "each tensor moves once.</p>")


def _memory(lab: Lab, record: dict[str, Any], pick: Pick, machine: Any) -> tuple[Any, str]:
    """Memory against context up to the model's own limit, and its table."""
    from lab.measure import roofline

    facts = record.get("model") or {}
    context, lines, body = int(facts.get("context") or 0), [], []
    contexts = sorted({max(1, context * i // (POINTS - 1)) for i in range(POINTS)}) if context else []
    labels, names = figures.named(record), titles(record.get("variants") or [])
    for v in record.get("variants") or []:
        if v.get("error") or not contexts:
            continue
        try:
            stack = lab.stack(v)
            stored = roofline.memory(facts, stack, contexts, machine, pick.sequences)
            room = roofline.room(facts, stack, machine, pick.sequences)
        except LabError:
            continue
        letter = str(v.get("letter"))
        lines.append({"letter": letter, "label": labels[letter], "contexts": contexts, "bytes": stored,
                      "longest": room and room.longest})
        where = DASH if room is None else f"fits at {count(context)}" if room.longest is None else f"after {count(room.longest)}"
        body.append((f"{badge(letter)} {esc(names[letter])}",
                     [size(stored[-1]), size(room.kv) if room else DASH, where, count(room.most) if room else DASH]))
    figure = figures.memory_context(lines, machine.memory or None, machine.name)
    head = ("", f"{count(pick.sequences)} × {count(context)} tokens and weights", "cache of one", "memory runs out, tokens",
            "sequences of full context that fit")
    return figure, folded("Table", "memory of each variant", head, body, "", opened=True)
