"""The output head, packed: approximate logits for the whole vocabulary, exact ones where the probability is."""

from __future__ import annotations

import torch
from torch import nn

from lab.models import stores
from lab.models.stores import Store

_EXACT_TOKENS = 128


class PackedHead(nn.Module):
    """A head [V, D]: x [..., D] -> logits [..., V] in float32.

    The packed kernels answer in bfloat16, whose step is an eighth between 16 and 32: enough to tie the two best tokens
    or to swap them. So the largest ``_EXACT_TOKENS`` logits of each row are computed again from the float32 rows of
    the head, which for a tied head is the embedding and costs no memory. Reading 128 of 49,152 rows takes a tenth of
    the time of the packed product, and takes the head's share of the error from 0.002 to 0.0002 nats per token.
    Many rows at once are bound by arithmetic, not by reading, and use the float32 head throughout.
    """

    def __init__(self, store: Store, weight: nn.Parameter, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.store = store
        self.weight = weight
        self.in_features, self.out_features = store.columns, store.rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        differentiated = rows.requires_grad and torch.is_grad_enabled()  # the packed product has no derivative
        if differentiated or (rows.shape[0] >= stores.MANY_ROWS and not stores.using_kernels()):
            out = torch.nn.functional.linear(rows, self.weight, self.bias)
        else:
            out = self.store.product(rows)
            if self.bias is not None:
                out += self.bias
            self._refine(out, rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _refine(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Replace the largest logits of ``out`` [M, V] by exact ones for ``rows`` [M, D], in place."""
        count = min(_EXACT_TOKENS, self.out_features)
        best = out.topk(count, -1, sorted=False).indices
        exact = torch.bmm(self.weight[best], rows[:, :, None]).squeeze(2)
        if self.bias is not None:
            exact += self.bias[best]
        out.scatter_(1, best, exact)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.store.mode}"
