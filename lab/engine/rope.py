"""Rotary position embedding of a loaded model, so that stored keys can be turned to other positions (rules R1, R2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lab.errors import LabError


@dataclass(frozen=True, eq=False)
class Rope:
    """frequencies float32 [r/2]: angle per position of each channel pair; r <= d channels are rotated.

    interleaved pairs channels (0,1), (2,3), ... (Cohere, GLM); otherwise channel c pairs with c + r/2 (Llama).
    """

    frequencies: torch.Tensor
    interleaved: bool = False
    _table: list[torch.Tensor] = field(default_factory=list, repr=False)
    _last: list = field(default_factory=list, repr=False)

    def rotate(self, x: torch.Tensor, delta: int | torch.Tensor) -> torch.Tensor:
        """Turn vectors x [..., d] by `delta` positions: an int, or a tensor broadcastable to x.shape[:-1]."""
        freq = self.frequencies.to(x.device)
        angle = freq * delta if isinstance(delta, int) else delta.to(x.device).float().unsqueeze(-1) * freq
        return self._mixed(x, angle.cos(), angle.sin())

    def turn_to(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """As `rotate` by int tensors `place`, all of one sign, from a table: for the many vectors of a cache, every step."""
        size = int(place.abs().max()) + 1 if place.numel() else 1
        table = self._table
        if not table or table[0].shape[0] < size or table[0].device != x.device:
            angle = torch.arange(max(2 * size, 1024), device=x.device).float()[:, None] * self.frequencies.to(x.device)
            table[:] = [angle.cos(), angle.sin()]
        index = place.abs().long()
        sin = table[1][index]
        return self._mixed(x, table[0][index], -sin if bool((place < 0).any()) else sin)

    def wave(self, delta: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) float32 [..., width] of turning by delta [..., 1] positions: x turned is x*cos + quarter(x)*sin."""
        angle = delta * self.frequencies.to(delta.device)
        angle = angle.repeat_interleave(2, -1) if self.interleaved else torch.cat([angle, angle], -1)
        still = width - angle.shape[-1]
        angle = torch.nn.functional.pad(angle, (0, still)) if still else angle
        return angle.cos(), angle.sin()

    def gap(self, delta: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`wave` of one number of positions, kept for the layers that ask for the same."""
        if not self._last or self._last[0] != (delta, width):
            self._last[:] = [(delta, width), self.wave(torch.tensor([float(delta)], device=self.frequencies.device), width)]
        return self._last[1]

    def quarter(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d] float32 with every channel pair turned by a right angle; 0 in channels that are not rotated."""
        width = 2 * self.frequencies.numel()
        turned, rest = x[..., :width].float(), x[..., width:]
        if self.interleaved:
            turned = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([-b, a], -1)
        return torch.cat([turned, torch.zeros_like(rest, dtype=torch.float32)], -1) if rest.shape[-1] else turned

    def _mixed(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = 2 * self.frequencies.numel()
        turned, rest = x[..., :width].float(), x[..., width:]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            mixed = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            mixed = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        mixed = mixed.to(x.dtype)
        return torch.cat([mixed, rest], -1) if rest.shape[-1] else mixed


_CHANGING = {"dynamic", "longrope"}
_INTERLEAVED = {"cohere", "cohere2", "glm", "glm4", "ernie4_5", "helium", "gptj", "codegen"}


def rope_of(model: torch.nn.Module, layer: int) -> Rope:
    """The rotary embedding a layer uses.

    Raises LabError where the model has none, or scales angles by length so that no fixed rotation exists.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    names = [f"{kinds[layer]}_inv_freq", "inv_freq"] if kinds else ["inv_freq"]
    for module in model.modules():
        for name in names:
            freq = getattr(module, name, None)
            if isinstance(freq, torch.Tensor):
                kind = getattr(module, "rope_type", None)
                kind = kind.get(kinds[layer]) if isinstance(kind, dict) else kind
                if kind in _CHANGING:
                    raise LabError(
                        f"This {config.model_type} model's rotary embedding ({kind}) changes with the length of the text",
                        "Turning stored keys to other positions needs fixed angles",
                        "Switch renumbering off, or use a model with fixed rotary embeddings such as Llama, Qwen or SmolLM",
                    )
                return Rope(freq.detach().float(), config.model_type in _INTERLEAVED)
    raise LabError(
        f"{config.model_type} models have no rotary position embedding to turn keys with",
        "Renumbering positions needs rotary embeddings",
        "Switch renumbering off, or use a model with rotary embeddings such as Llama, Qwen or SmolLM",
    )


def forget_growth(model: torch.nn.Module) -> bool:
    """Set angles that grow with the text (dynamic NTK) back to those of a short one; True where a model has such angles.

    transformers keeps the angles of the longest text a model has met, and the next text, such as a variant that is compared,
    would be read at those. It also goes back to the first angles at any block of low positions: a prompt must be fed whole.
    """
    found = False
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind != "dynamic" or not hasattr(module, "max_seq_len_cached"):
                continue
            found, prefix = True, f"{layers}_" if layers else ""
            now, first = getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(now.device, copy=True), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    return found
