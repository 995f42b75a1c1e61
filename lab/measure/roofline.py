"""Where the work of a stack lies under a machine's roofline, and when its memory runs out. Everything here is predicted.

A roofline (Williams et al. 2009): work that does I FLOPs for each byte it moves cannot run faster than min(peak, I * bandwidth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable

from lab.engine.stack import Stack
from lab.measure import cost
from lab.measure.hardware import Machine

KINDS = ("decode attention", "decode step", "prompt attention", "whole prompt")
PACKED = {"int4": 5 / 8, "int8": 1.0}  # bytes per weight of the lab's CPU layers: codes, and a scale and centre per 32 of int4


@dataclass(frozen=True)
class Work:
    """Something to do: flops, and bytes to move for it."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def attainable(self, machine: Machine) -> float:
        """FLOP/s it can reach at most: the height of the roof above it."""
        return min(machine.flops, self.intensity * machine.bandwidth)

    def seconds(self, machine: Machine) -> float:
        """The least time it takes."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@dataclass(frozen=True)
class Room:
    """What fits a machine's memory beside the weights.

    weights, kv: bytes of the weights, and of one sequence's cache at the model's full context. longest: the longest context that
    fits for `sequences` at once, None when the full context does, 0 when nothing fits. most: sequences of full context that fit.
    """

    weights: float
    kv: float
    longest: int | None
    most: int


def element_of(facts: dict[str, Any], machine: Machine) -> int:
    """Bytes of one cached number: the model's own on this machine, the accelerator's format elsewhere."""
    return cost.ELEMENT.get(str(facts.get("dtype")), 4) if machine.source == "measured" else cost.ELEMENT[machine.format]


def weight_bytes(facts: dict[str, Any], machine: Machine) -> float:
    """Bytes of all weights as they would lie in `machine`: packed here, in the accelerator's format elsewhere."""
    own = machine.source == "measured"
    per = PACKED.get(str(facts.get("weights"))) if own else None
    return float(facts.get("parameters") or 0) * (per or element_of(facts, machine))


def works(
    facts: dict[str, Any], stack: Stack | str, prompt: int, total: int, machine: Machine, sequences: int = 1
) -> dict[str, Work]:
    """Work of each of KINDS: the decode step at `total` tokens for `sequences` at once, and the reading of one prompt.

    The weights are read once per decode step for all sequences, and once per 512 prompt rows.
    """
    element, weights = element_of(facts, machine), weight_bytes(facts, machine)
    found = cost.predict(facts, stack, prompt, total, element, weight_bytes=weights)
    moved = sum(x.read_bytes + x.probe_bytes for x in found.per_layer)
    attend = Work(sequences * sum(x.flops for x in found.per_layer), sequences * moved)
    parameters = 2.0 * (facts.get("parameters") or 0)
    flops, moved = cost.prompt_work(facts, stack, prompt, element)
    return {
        "decode attention": attend,
        "decode step": Work(attend.flops + sequences * parameters, attend.bytes + weights),
        "prompt attention": Work(flops, moved),
        "whole prompt": Work(flops + parameters * prompt, moved + weights * -(-prompt // cost.CHUNK)),
    }


def memory(
    facts: dict[str, Any], stack: Stack | str, contexts: Iterable[int], machine: Machine, sequences: int = 1
) -> list[float]:
    """Bytes of weights and caches once `sequences` prompts of each length in `contexts` were read."""
    element, weights = element_of(facts, machine), weight_bytes(facts, machine)
    return [weights + sequences * cost.stored(facts, stack, n, n, element) for n in contexts]


def room(facts: dict[str, Any], stack: Stack | str, machine: Machine, sequences: int = 1) -> Room | None:
    """What fits; None where the machine does not say how much memory it has, or the model how long a context."""
    context = int(facts.get("context") or 0)
    if not machine.memory or context < 1:
        return None
    stack = Stack.parse(stack) if isinstance(stack, str) else stack
    weights = weight_bytes(facts, machine)
    full = memory(facts, stack, [context], machine)[0] - weights
    most = int(max(0.0, machine.memory - weights) // full) if full else 0
    if weights + sequences * full <= machine.memory:
        return Room(weights, full, None, most)
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(facts, stack, [middle], machine, sequences)[0] <= machine.memory
        low, high = (middle, high) if fits else (low, middle)
    return Room(weights, full, low, most)
