"""Prefill attention under structural masks, with row statistics and column mass: `attend`, `column_mass`; and what is composed
from it: `a_shape`, `delta`, `block_sparse`, `rectified`."""

from kernels.prefill.api import Prefilled, attend, column_mass
from kernels.prefill.blocks import block_sparse
from kernels.prefill.compose import a_shape, delta
from kernels.prefill.rectify import rectified

__all__ = ["Prefilled", "a_shape", "attend", "block_sparse", "column_mass", "delta", "rectified"]
