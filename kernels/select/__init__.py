"""Choosing what a sparse decode step reads: page bounds, centroids, scores and the top pages of every lane."""

from kernels.select.api import (
    attend_best,
    best_pages,
    grow_bounds,
    grow_means,
    page_scores,
    page_summaries,
    read_pages,
    top_pages,
)
from kernels.select.sets import smallest_sets

__all__ = [
    "attend_best", "best_pages", "grow_bounds", "grow_means", "page_scores", "page_summaries", "read_pages", "smallest_sets",
    "top_pages",
]
