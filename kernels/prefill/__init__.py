"""Prefill attention under structural masks, with row statistics and column mass: `attend`, `delta`, `column_mass`."""

from kernels.prefill.api import Prefilled, attend, column_mass
from kernels.prefill.compose import a_shape, delta

__all__ = ["Prefilled", "a_shape", "attend", "column_mass", "delta"]
