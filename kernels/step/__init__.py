"""One token through a decoder layer in few launches: each product with the norm before it and what follows it."""

from kernels.step.api import Heads, add_product, embed, gated, logits, project

__all__ = ["Heads", "add_product", "embed", "gated", "logits", "project"]
