"""What a variant's reads amount to, in words: for the command line and the browser alike."""

from __future__ import annotations

from typing import Any


def stores_all(variant: dict[str, Any]) -> bool:
    """Whether a variant reads less and yet frees no memory: every entry stays, and nothing in its stack saves memory."""
    saves = variant.get("saves") or []
    reads_less = any("reads less" in s for s in saves) and not any(s.startswith("memory") for s in saves)
    return reads_less and variant.get("kept_fraction") == 1


def verdict(variant: dict[str, Any]) -> str | None:
    """"pays" or "does not pay", for a variant that reads something in order to choose (break-even: both below a dense read)."""
    reads = variant.get("reads") or {}
    return ("pays" if reads.get("pays") else "does not pay") if reads.get("choose") else None


def sentences(variant: dict[str, Any]) -> list[str]:
    """What has to be said beside a variant's figures."""
    said = ["stores everything: it reads less and frees no memory"] if stores_all(variant) else []
    judged = verdict(variant)
    if judged is not None:
        reads = variant["reads"]
        said.append(f"its newest step read {reads['attend']:.1%} of a dense step's bytes to attend "
                    f"and {reads['choose']:.1%} to choose, which {judged}")
    return said
