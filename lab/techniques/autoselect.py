"""AutoSelect for text: a small scorer learns which prompt tokens deeper layers need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lab.engine.slots import Paper, Technique, param
from lab.techniques.claa import chosen


@dataclass(frozen=True)
class AutoSelect(Technique):
    """A scorer on the hidden states at the cut keeps the best tokens (after arXiv 2603.07135, text form)."""

    name: ClassVar[str] = "autoselect"
    title: ClassVar[str] = "AutoSelect (text)"
    paper: ClassVar[Paper] = Paper(
        "The Model Knows Which Tokens Matter: Automatic Token Selection via Noise Gating", "2603.07135", 2026
    )
    slots: ClassVar[tuple[str, ...]] = ("trim", "calibrate")
    help: ClassVar[str] = (
        "A two-layer scorer reads each token's hidden state at the cut and says how much it matters. It was trained by "
        "adding noise to tokens with low scores: to keep the text predictable, it had to spare the important ones. Made for "
        "image patches; text tokens are less redundant, so expect more loss. The shipped scorer learnt on hidden passkeys: it "
        "keeps those (8 of 8 unseen ones answered from half the prompt), and knows no other kind of question."
    )
    saves: ClassVar[str] = "memory and reads"
    does_not_save: ClassVar[str] = "Layers before the cut see and store the whole prompt."

    rate: float = param(0.5, "Share of the prompt that goes on.", min=0.01, max=1)
    window: int = param(16, "Last prompt tokens that always go on.", min=1, max=1024, unit="tokens")
    calibration: str = param("auto", "Calibration file; auto uses the one shipped for this model.")

    @property
    def learns(self) -> bool:
        return self.rate < 1

    def depth(self, layers: int) -> int:
        return max(1, layers // 2)

    def trim(self, policy: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        rows = hidden.shape[1]
        if self.rate == 1 or policy.stores[0].seen != rows:
            return None
        scores = scorer(hidden[:1].float(), {n: t.to(hidden.device) for n, t in policy.shared[f"learnt/{self.name}"].items()})
        return chosen(scores[0], self.kept(rows), self.window)

    def kept(self, prompt: int) -> int:
        return min(prompt, max(self.window + 1, round(self.rate * prompt)))

    def planned_rows(self, prompt: int, layer: int, layers: int) -> int:
        return self.kept(prompt) if layer >= self.depth(layers) and self.rate < 1 else prompt


def scorer(hidden: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token scores [B, T] from hidden states [B, T, D]: RMS norm, D -> 64 -> 1."""
    x = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    inner = torch.nn.functional.silu(x @ w["in_weight"].mT + w["in_bias"])
    return (inner @ w["out_weight"].mT).squeeze(-1) + w["out_bias"]


def retain(z: torch.Tensor, total: float, temperature: float) -> torch.Tensor:
    """Retain rates sigmoid((z - c)/temperature) in (0, 1) whose sum over the last dimension is `total` (bisection)."""
    low, high = z.detach().amin(-1, keepdim=True) - 40 * temperature, z.detach().amax(-1, keepdim=True) + 40 * temperature
    for _ in range(60):
        c = (low + high) / 2
        over = torch.sigmoid((z.detach() - c) / temperature).sum(-1, keepdim=True) > total
        low, high = torch.where(over, c, low), torch.where(over, high, c)
    return torch.sigmoid((z - (low + high) / 2) / temperature)


def noised(x: torch.Tensor, r: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """sqrt(r)*x + sqrt(1-r)*rms(x)*noise: what a token becomes at retain rate r; its mean square stays. x [..., D], r [...]."""
    size = x.pow(2).mean(-1, keepdim=True).sqrt()
    return r.sqrt().unsqueeze(-1) * x + (1 - r).clamp_min(0).sqrt().unsqueeze(-1) * size * noise
