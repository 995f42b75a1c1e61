"""What happens during a run, as typed events. Everything downstream consumes these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

Alternative = tuple[int, str, float]


@dataclass(frozen=True)
class Progress:
    """Work without a token to show: variant index or None, fraction 0..1, a short text."""

    variant: int | None
    fraction: float
    text: str


@dataclass(frozen=True)
class Prefilled:
    """The prompt is in the cache. ttft_ms: prompt to first logits; kv_bytes: live cache bytes after compression."""

    variant: int
    ttft_ms: float
    prompt_tokens: int
    kv_bytes: int
    kept_fraction: float


@dataclass(frozen=True)
class Token:
    """One generated token of the free-running stream. logprob and entropy in nats; step_ms is the decode step that
    produced its logits (None for the first token, which the prompt's forward produced)."""

    variant: int
    index: int
    id: int
    text: str
    logprob: float
    entropy: float
    step_ms: float | None
    kv_bytes: int
    kept: float
    alternatives: tuple[Alternative, ...] = ()
    sample: int = 0


@dataclass(frozen=True)
class Fidelity:
    """Teacher-forced comparison at reference token `index`: KL(reference || variant) in nats, whether the most likely
    token agrees, and the probability each gives to the reference's token."""

    variant: int
    index: int
    kl: float
    agree: bool
    ref_prob: float
    var_prob: float
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A stream ended: reason is "length", "stop" or "cancelled"."""

    variant: int
    reason: str
    text: str


@dataclass(frozen=True)
class Failed:
    """A variant, or the whole run (variant None), could not go on; message is for the user."""

    variant: int | None
    message: str


Event = Progress | Prefilled | Token | Fidelity | Finished | Failed
