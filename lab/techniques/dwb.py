"""Don't Waste Bits: a tiny classifier gives each token 2, 4, 8 or 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from lab.engine.context import LayerContext
from lab.engine.segments import Exact
from lab.engine.slots import Forward, Paper, Technique, param
from lab.errors import LabError
from lab.techniques.int_codes import IntCodes

WIDTHS = (2, 4, 8, 16)
ASSET = Path(__file__).resolve().parents[2] / "assets" / "dwb_controller.npz"
ROWS = 128  # rows whose logits over the vocabulary, or attention weights, exist at once


class Controller:
    """The classifier: features [.., 4] -> scores of the four widths [.., 4]; 4 -> 128 -> 128 -> 4 with ReLU.

    parts: w0 [4,128], b0, w1 [128,128], b1, w2 [128,4], b2, and mean, scale [4] that standardise the features.
    """

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self.parts = parts

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        p = {name: value.to(features.device) for name, value in self.parts.items()}
        x = (features.float() - p["mean"]) / p["scale"]
        x = (x @ p["w0"] + p["b0"]).relu()
        x = (x @ p["w1"] + p["b1"]).relu()
        return x @ p["w2"] + p["b2"]

    def choose(self, scores: torch.Tensor, price: float) -> torch.Tensor:
        """uint8 widths: the best score after charging `price` per bit, int [..] of scores [..,4]."""
        widths = torch.tensor(WIDTHS, device=scores.device)
        return widths[(scores - price * widths).argmax(-1)].to(torch.uint8)

    def price(self, scores: torch.Tensor, target: float) -> float:
        """The price per bit at which the mean width of these tokens comes closest to `target` from below."""
        low, high = -100.0, 100.0  # mean width falls as the price rises
        for _ in range(50):
            middle = (low + high) / 2
            if float(self.choose(scores, middle).float().mean()) > target:
                low = middle
            else:
                high = middle
        return high


@cache
def controller() -> Controller:
    """The trained controller that ships with the lab (benchmarks/train_dwb.py makes it)."""
    if not ASSET.is_file():
        raise LabError(
            "The controller of Don't Waste Bits is missing", f"It lies in {ASSET.name} in the assets folder",
            "Run python benchmarks/train_dwb.py to train it",
        )
    with np.load(ASSET, allow_pickle=False) as data:
        return Controller({name: torch.from_numpy(data[name].astype(np.float32)) for name in data.files})


@dataclass(frozen=True)
class Dwb(Technique):
    """Bits per token from entropy, rarity, attention variance and confidence (arXiv 2604.04722)."""

    name: ClassVar[str] = "dwb"
    title: ClassVar[str] = "Don't Waste Bits"
    paper: ClassVar[Paper] = Paper(
        "Don't Waste Bits! Adaptive KV-Cache Quantization for Lightweight On-Device LLMs", "2604.04722", 2026
    )
    slots: ClassVar[tuple[str, ...]] = ("observe", "allocate", "calibrate")
    help: ClassVar[str] = (
        "A small trained network looks at how uncertain the model was at a token, how rare the token is and how its attention "
        "varies, and gives it 2, 4, 8 or 16 bits in every layer. Treat it as an experiment: an independent check did not "
        "reach the published accuracy, found plain 4-bit codes nearly lossless, and saw rarity carry little; here, too, it does "
        "much worse than 4-bit integers at the same bytes, because 2-bit tokens spoil what 8-bit tokens save."
    )
    does_not_save: ClassVar[str] = (
        "Reading the prompt computes the next-token distribution of every token, a quarter more work on a small model."
    )
    whole_cache: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    sets_tiers: ClassVar[bool] = True

    target: float = param(4.0, "Mean bits per token to aim at on the prompt; 0 takes the classifier's first choice.",
                          min=0, max=16, unit="bits")
    interval: int = param(8, "Decode steps between narrowings; until then tokens stay exact.", min=1, max=1024, unit="steps")

    def validate(self) -> None:
        if 0 < self.target < 2:
            raise LabError(f"dwb: target={self.target:g} cannot be reached",
                           "The narrowest tier has 2 bits: target is 0 or from 2 to 16")

    @property
    def label(self) -> str:
        return f"DWB {self.target:g}-bit" if self.target else "DWB"

    def planned_codes(self, entries: int, head_dim: int, element: int, encoder: Technique) -> int:
        """As if every token had the target's mean width (4 bits where there is no target); what really comes depends on the
        text."""
        target = self.target or 4.0
        low = max(b for b in WIDTHS if b <= target)
        high = min((b for b in WIDTHS if b > target), default=low)
        share = (target - low) / (high - low) if high > low else 0.0
        size = lambda b: 2 * head_dim * element if b == 16 else sum(  # noqa: E731
            encoder.at(b).coded_bytes(side, 4096, head_dim, element) for side in ("key", "value")) / 4096
        return round(entries * ((1 - share) * size(low) + share * size(high)))

    def default_scorer(self) -> Technique | None:
        return None

    def default_encoder(self) -> Technique:
        return IntCodes(bits=4)

    def widths(self, encoder: Technique) -> tuple[int, ...]:
        return WIDTHS[:-1]

    def observe(self, ctx: LayerContext) -> None:
        """In the last layer: how much each new row's attention varies over the entries it sees."""
        if ctx.layer == ctx.layers - 1:
            spread = row_variance(ctx)
            had = ctx.state.get("dwb_spread")
            ctx.state["dwb_spread"] = spread if had is None or ctx.phase == "decode" else torch.cat([had, spread], 1)

    def watch(self, step: Forward) -> None:
        first, last = step.contexts[0], step.contexts[-1]
        if step.ids is None:
            raise LabError("Don't Waste Bits counts tokens and needs them", "The model is called with input_ids, not embeddings")
        if any("pad" in ctx.state for ctx in step.contexts):
            raise LabError("Don't Waste Bits cannot count padding tokens", "All prompts of a batch have one length")
        state = first.state
        entropy, top = (x.to(step.ids.device) for x in next_token(step.model, step.hidden))
        ids = step.ids.int() if "dwb_ids" not in state else torch.cat([state["dwb_ids"], step.ids.int()], 1)
        belief = torch.stack([entropy, top], -1)
        if first.phase == "prefill" and "dwb_belief" in state:
            belief = torch.cat([state["dwb_belief"], belief], 1)
        state["dwb_ids"], state["dwb_belief"] = ids, belief
        if first.phase == "prefill" and not step.complete:
            return
        spread = last.state.pop("dwb_spread").to(ids.device)
        state.pop("dwb_belief")
        new = ids[:, -spread.shape[1] :]
        features = torch.stack([belief[..., 0], rarity(ids, new), spread, belief[..., 1]], -1)
        scores = controller().scores(features)
        if step.complete and "dwb_price" not in state:
            state["dwb_price"] = controller().price(scores, self.target) if self.target else 0.0
        chosen = controller().choose(scores, state["dwb_price"])
        for ctx in step.contexts:  # tags wait in each layer until they are applied
            waiting = ctx.state.get("dwb_tags")
            ctx.state["dwb_tags"] = (
                chosen.to(ctx.store.device, copy=True) if waiting is None
                else torch.cat([waiting, chosen.to(waiting.device)], 1)
            )

    def tiers(
        self, ctx: LayerContext, scores: torch.Tensor | None, keep: torch.Tensor | None
    ) -> torch.Tensor | None:
        if ctx.phase == "decode" and ctx.row % self.interval:
            return None
        tags = ctx.state.pop("dwb_tags", None)
        if tags is None:
            return None
        count = tags.shape[1]
        place = ctx.positions() - (ctx.store.seen - count - (ctx.phase == "decode"))  # the newest token has no tag yet
        known = (place >= 0) & (place < count)
        bits = tags.unsqueeze(1).expand(-1, ctx.kv_heads, -1).gather(2, place.clamp(0, count - 1)).long()
        return torch.where(known, bits, Exact.bits)


def next_token(model: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy in nats, largest probability) of the next-token distribution of every row, float32 [B,T]."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    cap, factor = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None) or 1.0
    entropies, tops = [], []
    for r0 in range(0, hidden.shape[1], ROWS):
        logits = head(hidden[:, r0 : r0 + ROWS]).float() * factor
        if cap:
            logits = cap * torch.tanh(logits / cap)
        logp = logits.log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
        tops.append(logp.amax(-1).exp())
    return torch.cat(entropies, 1), torch.cat(tops, 1)


def rarity(ids: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """1 - share of a token among all tokens so far, float32 [B,T] of the last T tokens `new` of `ids` [B,N]."""
    rows = []
    for all_ids, last in zip(ids, new):
        values, counts = all_ids.unique(return_counts=True)
        rows.append(1 - counts[torch.searchsorted(values, last)].float() / all_ids.numel())
    return torch.stack(rows)


def row_variance(ctx: LayerContext) -> torch.Tensor:
    """Mean over heads of the variance of each new row's attention over the entries it sees, in units of its mean
    squared, float32 [B,T] (so that it does not shrink with length); logarithm of 1 + that."""
    keys, pos, valid = ctx.store.all_keys(), ctx.positions(), ctx.store.valid()
    place = torch.arange(ctx.first, ctx.row + 1, device=ctx.q.device)[None]
    out = []
    for r0 in range(0, ctx.q.shape[2], ROWS):
        block = ctx.q[:, :, r0 : r0 + ROWS]
        rows = block.shape[2]
        s = (block.unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3) @ keys.mT).float() * ctx.scale
        s = s.unflatten(2, (ctx.groups, rows))
        if ctx.softcap:
            s = ctx.softcap * torch.tanh(s / ctx.softcap)
        away = place[:, None, None, r0 : r0 + ROWS, None] - pos[:, :, None, None, :]
        hidden = (away < 0) | (away >= ctx.window) if ctx.window else away < 0
        if valid is not None:
            hidden = hidden | ~valid[:, :, None, None, :]
        p = s.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).masked_fill(hidden, 0)
        seen = (~hidden).sum(-1).clamp_min(1)
        out.append((p.square().sum(-1) * seen - 1).clamp_min(0).log1p().mean((1, 2)))
    return torch.cat(out, 1)
