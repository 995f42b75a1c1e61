"""Stacks: which techniques a variant uses, their text form, and which of them exclude each other."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Iterable, Mapping

from lab.engine.slots import EXCLUSIVE, PIPELINE, Technique
from lab.errors import LabError

_ITEM = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\((.*)\))?\s*$", re.S)


@dataclass(frozen=True)
class Stack:
    """A frozen, hashable tuple of techniques in pipeline order. Empty means dense attention."""

    techniques: tuple[Technique, ...] = ()

    @classmethod
    def of(cls, techniques: Iterable[Technique]) -> "Stack":
        """Order the techniques along the pipeline and refuse combinations that exclude each other.

        Raises LabError naming the techniques and the slot they share.
        """
        chosen = sorted(techniques, key=lambda t: (min(PIPELINE.index(s) for s in t.slots), t.name))
        problems = conflicts(chosen)
        if problems:
            raise LabError(problems[0], fix="Switch one of them off, or put them in two variants")
        return cls(tuple(chosen))

    @classmethod
    def parse(cls, text: str, registry: Mapping[str, type[Technique]] | None = None) -> "Stack":
        """Read "h2o(budget=0.25)+kivi(bits=2)"; "dense" is the dense model.

        Raises LabError for an unknown technique or parameter (with the near names), a value out of range, techniques that
        exclude each other, and a missing name: empty text (often a shell variable without a value), or nothing beside a "+".
        """
        if registry is None:
            from lab.techniques import registry as load  # techniques know the engine, so the engine asks late

            registry = load()
        parts = _split(text, "+")
        if not text.strip():
            raise LabError("The variant is empty", 'Write name or name(parameter=value,...), joined by "+"',
                           "dense is the model as it is")
        if not all(p.strip() for p in parts):
            raise LabError(f'In "{text.strip()}" a technique is missing beside a "+"',
                           'A "+" joins two techniques, as in h2o+kivi', 'Write the missing name, or take the "+" away')
        return cls.of(_parse_one(p, registry) for p in parts if p.strip().lower() != "dense")

    @property
    def spec(self) -> str:
        return "+".join(t.spec for t in self.techniques) or "dense"

    @property
    def title(self) -> str:
        return " · ".join(t.title for t in self.techniques) or "Dense"

    def fills(self) -> dict[str, list[Technique]]:
        """The slots in use, in pipeline order, with the techniques that fill them."""
        table = {slot: [t for t in self.techniques if slot in t.slots] for slot in PIPELINE}
        return {slot: users for slot, users in table.items() if users}

    def filling(self, slot: str) -> list[Technique]:
        return [t for t in self.techniques if slot in t.slots]

    def one(self, slot: str) -> Technique | None:
        """The technique of an exclusive slot, or None."""
        users = self.filling(slot)
        return users[0] if users else None

    @property
    def prompt_block(self) -> int:
        """Rows per forward that a technique asks prompts to be fed in; 0 leaves it to the session."""
        return max((t.prompt_block for t in self.techniques), default=0)

    def describe(self) -> list[dict]:
        """JSON form: [{"name", "params"}]."""
        return [{"name": t.name, "params": {p.name: getattr(t, p.name) for p in t.parameters()}} for t in self.techniques]


def conflicts(techniques: Iterable[Technique | type[Technique]]) -> list[str]:
    """One sentence per pair that cannot work together; empty when all combine."""
    chosen = list(techniques)
    out = []
    for i, a in enumerate(chosen):
        for b in chosen[i + 1 :]:
            if a.name == b.name:
                out.append(f"{a.title} is listed twice")
                continue
            shared = [s for s in a.slots if s in b.slots and s in EXCLUSIVE]
            if shared:
                out.append(f"{a.title} and {b.title} both fill the {shared[0]} slot, which holds one technique")
    for t in chosen:
        out += _untierable(t, chosen)
    names = {slot for t in chosen for slot in t.slots}
    for t in chosen:
        if "combine" in t.slots and "select" not in names:
            out.append(f"{t.title} corrects a sparse prefill and needs a technique that fills the select slot")
        if "reduce" in t.slots and "score" not in names and "allocate" not in names:
            out.append(f"{t.title} decides what happens to evicted entries and needs a technique that scores them")
    return out


def _untierable(allocator: Technique | type[Technique], chosen: list) -> list[str]:
    """Why the code of a stack cannot hold single entries at the widths its budget technique sets; [] when it can."""
    if isinstance(allocator, type) or not allocator.sets_tiers:
        return []
    for encoder in chosen:
        if "encode" in encoder.slots and not isinstance(encoder, type):
            try:
                for width in allocator.widths(encoder):
                    encoder.at(width)
            except LabError as problem:
                return [f"{allocator.title} narrows single entries, but {problem.what.rstrip('.')}"]
    return []


def _parse_one(text: str, registry: Mapping[str, type[Technique]]) -> Technique:
    match = _ITEM.match(text)
    if not match:
        raise LabError(f'"{text.strip()}" is not a technique', 'Write name or name(parameter=value,...), joined by "+"')
    name, inside = match.group(1), match.group(2)
    cls = registry.get(name) or registry.get(name.lower().replace("-", "_"))
    if cls is None:
        raise LabError(f'There is no technique called "{name}"', near(name, registry), "python -m lab techniques lists them")
    known = {p.name: p for p in cls.parameters()}
    values = {}
    for piece in _split(inside or "", ","):
        if not piece.strip():
            continue
        key, eq, value = (x.strip() for x in piece.partition("="))
        if not eq:
            raise LabError(f'{cls.name}: "{piece.strip()}" has no value', f"Write it as {next(iter(known), 'name')}=value")
        if key not in known:
            raise LabError(f'{cls.name} has no parameter "{key}"', near(key, known))
        if key in values:
            raise LabError(f'{cls.name}: parameter "{key}" is given twice')
        values[key] = known[key].check(cls.name, value)
    return cls(**values)


def near(word: str, names: Iterable[str]) -> str:
    """"Did you mean ...?" with the closest names, or all of them when none is close."""
    names = sorted(names)
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known names: {', '.join(names)}" if names else "It takes no parameters"


def _split(text: str, sep: str) -> list[str]:
    """Split at separators outside parentheses."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == sep and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    if depth != 0:
        raise LabError(f'The parentheses in "{text}" do not match', "Write it as name(parameter=value)")
    return parts + [current]
