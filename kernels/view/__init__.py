"""Attention as a map: one head's weights pooled to cells, without the matrix."""

from kernels.view.api import pooled

__all__ = ["pooled"]
