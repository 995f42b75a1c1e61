"""One attention layer without a model: random queries, keys and values through the pipeline, step by step."""

from __future__ import annotations

import torch

from lab.engine.layer import LabLayer
from lab.engine.pipeline import Call, run
from lab.engine.policy import Policy
from lab.engine.stack import Stack


class Drive:
    """q [B,Hq,T,d], k, v [B,Hk,T,d] are drawn for all tokens at once; `prompt` and `step` feed them in order."""

    def __init__(
        self, spec: str, tokens: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, batch: int = 1, seed: int = 0,
        prompt: int = 0, model=None, layers: int = 1, index: int = 0, record: bool = False, **call,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(batch, heads, tokens, dim, generator=g) * 2
        self.k, self.v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) for _ in range(2))
        self.policy = Policy(Stack.parse(spec), layers, model, prompt=prompt, record=record)
        self.layer = LabLayer(index, 0, self.policy.tracks, call.get("window"), self.policy.slack)
        self.scale, self.call, self.at = 0.25, call, 0

    def feed(self, count: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The next `count` tokens in one call: outputs [B,Hq,count,d]. mask bool [B, tokens so far] marks real ones."""
        part = slice(self.at, self.at + count)
        handle = self.layer.update(self.k[:, :, part], self.v[:, :, part])[0]
        self.at += count
        call = Call(self.scale, self.call.get("softcap"), self.call.get("window"), self.call.get("sink"), mask)
        return run(self.policy, handle, self.q[:, :, part], call).transpose(1, 2)

    def stored(self, head: int, sequence: int = 0) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """(positions, keys [n,d], values [n,d]) of one KV head, as the cache holds them now."""
        n = self.layer.counts[sequence * self.layer.heads + head]
        pos = self.layer.positions()[sequence, head, :n].tolist()
        return pos, self.layer.all_keys()[sequence, head, :n].clone(), self.layer.all_values()[sequence, head, :n].clone()
