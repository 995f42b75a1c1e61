"""Decode attention over the tiered, ragged cache: `attend` and the `TierView` it reads."""

from kernels.decode.api import Decoded, attend
from kernels.decode.tier import TierView

__all__ = ["Decoded", "TierView", "attend"]
