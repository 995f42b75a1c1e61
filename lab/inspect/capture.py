"""What the engine remembers of one layer of one variant: enough to recompute any attention weight exactly."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lab.errors import LabError
from lab.inspect import store

NEVER = 2**31 - 1
"""Row number that no run reaches: the entry was never evicted (or never narrowed)."""

_serials = itertools.count()


@dataclass(eq=False)
class Capture:
    """Queries and keys of one layer, with what the cache did to each entry.

    Attributes:
        q: [Hq, T, d] queries after RoPE, any float dtype, tensor or array.
        k: [Hk, T, d] keys after RoPE; query head h reads KV head ``h // (Hq // Hk)``.
        scale: factor on q.k; None means d ** -0.5.
        death: int32 [Hk, T], row at which an entry became invisible (``NEVER`` = kept), or None.
            Row i sees entry j iff ``j <= i < death[j]`` and, with a window, ``i - j < window``.
        bits: uint8 [Hk, T] final bits of each entry (16 = exact, 0 = evicted), or None.
        demoted: int32 [Hk, T], row from which the entry is stored in ``bits`` bits, or None.
        softcap: logits become ``softcap * tanh(logit / softcap)``, or None.
        window: how many newest positions a row sees, itself included, or None.
        key_bias: [Hq, T] added to the logits of each key; -inf hides a key, or None.
        layer, letter: where it came from, for titles and messages.

    Raises:
        LabError: when shapes disagree.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float | None = None
    death: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    demoted: torch.Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    key_bias: torch.Tensor | None = None
    layer: int | None = None
    letter: str | None = None
    serial: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.q, self.k = torch.as_tensor(self.q), torch.as_tensor(self.k)
        if self.q.ndim != 3 or self.k.ndim != 3:
            raise LabError(
                f"Captured queries and keys have shapes {_shape(self.q)} and {_shape(self.k)}",
                "Both need three axes: heads, tokens, channels",
                "Take a capture per layer, without the batch axis",
            )
        hq, t, d = self.q.shape
        hk = self.k.shape[0]
        if self.k.shape[1:] != (t, d) or t == 0 or hk == 0 or hq % hk:
            raise LabError(
                f"Captured queries {_shape(self.q)} and keys {_shape(self.k)} do not belong together",
                "They need the same tokens and channels, and query heads a multiple of KV heads",
                "Capture the run again",
            )
        self.scale = float(self.scale) if self.scale else d**-0.5
        self.softcap = float(self.softcap) if self.softcap else None
        self.window = int(self.window) if self.window else None
        device = self.q.device
        self.k = self.k.to(device)
        for name, heads, dtype in (
            ("death", hk, torch.int32),
            ("bits", hk, torch.uint8),
            ("demoted", hk, torch.int32),
            ("key_bias", hq, torch.float32),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value).to(device=device, dtype=dtype)
            if value.shape != (heads, t):
                raise LabError(
                    f"The capture's {name} has shape {_shape(value)}",
                    f"It needs {heads} heads by {t} tokens",
                    "Capture the run again",
                )
            setattr(self, name, value)
        self.serial = next(_serials)
        weakref.finalize(self, store.drop, self.serial)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.k.shape[0]

    @property
    def tokens(self) -> int:
        """Rows and entries, T: prompt and generated tokens fed."""
        return self.q.shape[1]

    @property
    def title(self) -> str:
        """ "layer 3 of A", as far as it is known."""
        where = "this capture" if self.layer is None else f"layer {self.layer}"
        return where if self.letter is None else f"{where} of {self.letter}"

    def kv_head(self, head: int) -> int:
        """The KV head that query head ``head`` reads."""
        return self.check_head(head) // (self.heads // self.kv_heads)

    def check_head(self, head: int) -> int:
        """``head`` itself, or a LabError when it is out of range."""
        if isinstance(head, bool) or not isinstance(head, (int, np.integer)) or not 0 <= head < self.heads:
            raise LabError(
                f"Head {head} does not exist in {self.title}",
                f'Heads are numbered 0 to {self.heads - 1}; "mean" and "max" combine them',
                "Choose another head",
            )
        return int(head)

    def check_row(self, i: int) -> int:
        """``i`` itself, or a LabError when no token has this position."""
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < self.tokens:
            raise LabError(
                f"Position {i} is not in this run",
                f"Positions are 0 to {self.tokens - 1}",
                "Choose another token",
            )
        return int(i)

    def queries(self, head: int) -> torch.Tensor:
        """float32 [T, d] queries of one head, already multiplied by the scale."""
        return self._float(("q", head), lambda: self.q[head].float() * self.scale)

    def keys(self, kv_head: int) -> torch.Tensor:
        """float32 [T, d] keys of one KV head."""
        return self._float(("k", kv_head), lambda: self.k[kv_head].float())

    def _float(self, name: tuple, make) -> torch.Tensor:
        key = ((self.serial,), *name)
        value = store.get(key)
        if value is None:
            value = make()
            if not torch.isfinite(value).all():
                raise LabError(
                    f"The captured vectors of {self.title} contain infinities or NaN",
                    "Attention can only be drawn from finite numbers",
                    "Run again in bfloat16 or float32",
                )
            store.put(key, value, value.nbytes)
        return value

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], letter: str, layer: int, device: str = "cpu", **extra
    ) -> Capture:
        """The capture of ``layer`` of variant ``letter`` from a run's arrays, named as in the contract.

        Args:
            arrays: ``qk/{letter}/{layer}/q|k|meta`` and, where the cache changed,
                ``cache/{letter}/bits|death|demoted``.
            device: where views are computed.
            extra: further fields, such as ``key_bias``.

        Raises:
            LabError: when the run holds no captured state of this layer.
        """
        prefix = f"qk/{letter}/{layer}/"
        if f"{prefix}q" not in arrays or f"{prefix}k" not in arrays:
            have = captured_layers(arrays, letter)
            raise LabError(
                f"This run holds no captured attention for layer {layer} of variant {letter}",
                f"Captured layers are {', '.join(map(str, have))}" if have else None,
                "Choose one of them" if have else "Load the run's model and replay it to capture attention",
            )
        meta = np.asarray(arrays.get(f"{prefix}meta", (0.0, 0.0, 0.0)), dtype=np.float64).ravel()
        if meta.size < 3:
            raise LabError(
                f"The capture of layer {layer} is damaged",
                "Its meta holds scale, softcap and window",
                "Replay the run",
            )
        per_layer = {}
        t = arrays[f"{prefix}k"].shape[1]
        for name in ("death", "bits", "demoted"):
            stack = arrays.get(f"cache/{letter}/{name}")
            if stack is None:
                continue
            if not 0 <= layer < stack.shape[0]:
                raise LabError(
                    f"Layer {layer} does not exist in this run",
                    f"Layers are numbered 0 to {stack.shape[0] - 1}",
                    "Choose another layer",
                )
            per_layer[name] = np.asarray(stack[layer])[:, :t]
        return cls(
            q=torch.as_tensor(np.asarray(arrays[f"{prefix}q"])).to(device),
            k=torch.as_tensor(np.asarray(arrays[f"{prefix}k"])),
            scale=meta[0],
            softcap=meta[1],
            window=int(meta[2]),
            layer=layer,
            letter=letter,
            **per_layer,
            **extra,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """``qk/{letter}/{layer}/...`` arrays of the contract (float16); the cache arrays belong to the whole run."""
        prefix = f"qk/{self.letter or 'A'}/{self.layer or 0}/"
        return {
            f"{prefix}q": self.q.to("cpu", torch.float16).numpy(),
            f"{prefix}k": self.k.to("cpu", torch.float16).numpy(),
            f"{prefix}meta": np.array([self.scale, self.softcap or 0, self.window or 0], dtype=np.float64),
        }


def captured_layers(arrays: Mapping[str, np.ndarray], letter: str) -> list[int]:
    """Layers of variant ``letter`` whose queries and keys the arrays hold, ascending."""
    parts = [name.split("/") for name in arrays]
    return sorted(int(p[2]) for p in parts if len(p) == 4 and p[0] == "qk" and p[1] == letter and p[3] == "q")


def _shape(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape))
