"""What a technique is told when one of its slots is called."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kernels.cpu_attention import softmax
from kernels.merge import sink_logit
from lab.engine.layer import LabLayer
from lab.engine.projection import output_weight
from lab.engine.rope import Rope
from lab.engine.slots import Technique


@dataclass
class LayerContext:
    """One layer at one step. Shapes: B sequences, Hq query heads, Hk KV heads, T new rows, N stored entries.

    q is [B, Hq, T, d] after RoPE; pos_q int64 [B, T] (-1 marks padding); first is the position of row 0 of this call.
    phase is "prefill" for prompt rows and "decode" after; prompt is the prompt's length once known.
    """

    store: LabLayer
    layer: int
    layers: int
    phase: str
    q: torch.Tensor
    pos_q: torch.Tensor | None
    first: int
    scale: float
    softcap: float | None
    window: int | None
    prompt: int
    sink: torch.Tensor | None = None  # [Hq] learned logit that joins every row's softmax (gpt-oss)
    seed: int = 0
    rope: Rope | None = None
    last_p: torch.Tensor | None = None  # [B, Hq, N] weights of the newest row, where a technique needs them
    now: torch.Tensor | None = None  # [B, Hk, N] weights of the newest decode row, summed over each group, where one needs them
    out: torch.Tensor | None = None  # [B, Hq, T, d] outputs of these rows, before routing
    scorer: Technique | None = None  # the technique that ranks entries, and the one that codes them, under this stack
    encoder: Technique | None = None
    model: torch.nn.Module | None = None
    calibrated: dict[str, torch.Tensor] = field(default_factory=dict)  # what `calibrate` froze for this layer
    shared: dict = field(default_factory=dict)  # survives from layer to layer within one cache

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.store.heads

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def state(self) -> dict:
        """Mutable per layer and cache. Tensors in it are [B, ...]: they are copied when a stream forks and follow the
        sequences when samples are repeated or beams reordered."""
        return self.store.state

    @property
    def row(self) -> int:
        """Position of the newest row, padding counted."""
        return self.first + self.q.shape[2] - 1

    @property
    def newest(self) -> int | torch.Tensor:
        """Position of the newest row, comparable with `positions()`: an int, or int64 [B,1,1] where there is padding."""
        return self.row if self.pos_q is None else self.pos_q[:, -1].view(-1, 1, 1)

    def positions(self) -> torch.Tensor:
        return self.store.positions()

    def learnt(self, technique: Technique) -> dict[str, torch.Tensor]:
        """What the technique learnt about this model beforehand, by name."""
        return self.shared[f"learnt/{technique.name}"]

    def mass(self) -> torch.Tensor:
        """Attention each entry has received, summed over rows and the heads of its group: [B, Hk, N]."""
        return self.store.attribute("mass")

    def output_weight(self) -> torch.Tensor:
        """float32 [Hq*d, D]: this layer's output projection, applied from the right."""
        key = ("output_weight", self.layer)
        if key not in self.shared:
            self.shared[key] = output_weight(self.model, self.layer)
        return self.shared[key]

    def window_weights(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """win(rows) of the sheets: softmax weights float32 [B, Hq, w, N] of the last w <= rows prompt queries over all
        stored entries, and the positions int64 [w] of those queries ([B, w] with padding, whose rows see nothing)."""
        q = self.store.queries[:, :, -rows:]
        w = q.shape[2]
        back = torch.arange(1 - w, 1, device=q.device)
        pos_q = back + (self.row if self.pos_q is None else self.pos_q[:, -1:])
        keys = self.store.all_keys()
        grouped = q.unflatten(1, (self.kv_heads, self.groups)).flatten(2, 3)
        s = (grouped @ keys.mT).float().unflatten(2, (self.groups, w)) * self.scale
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        pos, i = self.positions()[:, :, None, None, :], pos_q.view(-1, 1, 1, w, 1)
        hidden = pos > i
        if self.window:
            hidden = hidden | (i - pos >= self.window)
        valid = self.store.valid()
        if valid is not None:
            hidden = hidden | ~valid[:, :, None, None, :]
        p, lse = softmax(s.masked_fill(hidden, -torch.inf))
        p, lse = p.flatten(1, 2), lse.flatten(1, 2)
        return p if self.sink is None else sink_logit(p, lse, self.sink)[0], pos_q

    def per_kv_head(self, x: torch.Tensor) -> torch.Tensor:
        """Reduce [B, Hq, ...] to [B, Hk, ...] by the mean over each group (rule R3)."""
        return x.unflatten(1, (self.kv_heads, self.groups)).mean(2)
