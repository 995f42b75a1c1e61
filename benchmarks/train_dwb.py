"""Train the controller of Don't Waste Bits on the default model: a few minutes on two CPU cores.

    python benchmarks/train_dwb.py [--model default] [--target 3] [--pieces 16] [--out assets/dwb_controller.npz]

Text: the part of Python's reference set aside for learning, and generated recall prompts (key-value lists that are asked
again). Labels, as the sheet defines them where the paper is silent: label_t = argmin_c err_t(c) + lambda*c with
err_t(c) = sum over layers and heads of a_t (|v - v_c| + |o|/2 |k - k_c|) / |o|, a_t the attention token t receives from later
rows, and lambda set so that the labels' mean is the target. Loss: alpha CE + beta sum_c pi_c lat_c + gamma (1 - sum_c pi_c
qual_c), Adam 3e-3, 5 epochs, batches of 256 tokens. Prints how the result compares with always guessing the commonest
label and with quartiles of the mean feature.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import codes  # noqa: E402
from lab.engine.cache import LabCache  # noqa: E402
from lab.engine.sample_text import sample_ids  # noqa: E402
from lab.techniques import dwb  # noqa: E402

ALPHA, BETA, GAMMA = 1.0, 0.1, 0.1
LATENCY, QUALITY = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0.6, 0.75, 0.9, 1.0])
EPOCHS, RATE, BATCH, HIDDEN = 5, 3e-3, 256, 128


class Weigher:
    """A tap that measures, per layer, what each token's quantisation would cost: err [4, T] once a text has passed."""

    def __init__(self) -> None:
        self.cost: torch.Tensor | None = None
        self.spread: torch.Tensor | None = None

    def add(self, ctx, handle) -> None:
        k, v, rows = handle.k.float(), handle.v.float(), ctx.q.shape[2]
        grouped = ctx.q.unflatten(1, (ctx.kv_heads, ctx.groups)).flatten(2, 3)
        s = (grouped @ k.mT * ctx.scale).unflatten(2, (ctx.groups, rows))
        later = torch.ones(rows, rows, dtype=torch.bool).tril()
        p = s.masked_fill(~later, -torch.inf).softmax(-1)
        size = (p.flatten(2, 3) @ v).norm(dim=-1).mean()
        mass = p.masked_fill(torch.eye(rows, dtype=torch.bool), 0).sum((2, 3))  # [1,Hk,T], own row apart
        errors = []
        for bits in dwb.WIDTHS[:-1]:
            dk, dv = (codes.decode_tokens(*codes.encode_tokens(x, bits, x.shape[-1]), bits) - x for x in (k, v))
            errors.append((mass * (dv.norm(dim=-1) + size / 2 * dk.norm(dim=-1)) / size).sum((0, 1)))
        self.cost = torch.stack([*errors, torch.zeros(rows)])
        if ctx.layer == ctx.layers - 1:
            self.spread = dwb.row_variance(ctx)


def recall_prompts(tokenizer, count: int, length: int, seed: int) -> torch.Tensor:
    """int64 [count, length]: lists of "the code of X is N", then questions with answers."""
    draw, rows = random.Random(seed), []
    names = [f"{a}-{b}" for a in ("red", "old", "north", "iron", "quiet")
             for b in ("gate", "river", "lamp", "stone", "bird", "mill")]
    while len(rows) < count:
        draw.shuffle(names)
        facts = [(n, draw.randrange(1000, 9999)) for n in names]
        told = [f"The code of the {n} is {c}." for n, c in facts]
        asked = [f"What is the code of the {n}? The code of the {n} is {c}." for n, c in draw.sample(facts, 12)]
        ids = tokenizer(" ".join(told + asked), add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[-length:])
    return torch.tensor(rows)


@torch.inference_mode()
def examples(model, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(features [M,4], cost [M,4]) of every token of the texts rows [S,T]."""
    features, costs = [], []
    for i, row in enumerate(rows):
        cache = LabCache(model)
        for layer in cache.lab_layers:
            layer.tap = Weigher()
        hidden = model.base_model(input_ids=row[None], past_key_values=cache, use_cache=True)[0]
        entropy, top = dwb.next_token(model, hidden)
        taps = [layer.tap for layer in cache.lab_layers]
        parts = (entropy, dwb.rarity(row[None], row[None]), taps[-1].spread, top)
        features.append(torch.stack(parts, -1)[0])
        costs.append(sum(t.cost for t in taps).mT)
        print(f"\rtext {i + 1}/{len(rows)}", end="", flush=True)
    print()
    return torch.cat(features), torch.cat(costs)


def labels(cost: torch.Tensor, target: float) -> tuple[torch.Tensor, float]:
    """(class int64 [M], lambda): argmin of cost + lambda * bits with the mean width at the target."""
    low, high, widths = 1e-9, 1e9, torch.tensor(dwb.WIDTHS, dtype=torch.float32)
    for _ in range(100):
        middle = (low * high) ** 0.5
        if float(widths[(cost + middle * widths).argmin(-1)].mean()) > target:
            low = middle
        else:
            high = middle
    return (cost + high * widths).argmin(-1), high


def fresh(features: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes, parts = (4, HIDDEN, HIDDEN, 4), {"mean": features.mean(0), "scale": features.std(0).clamp_min(1e-6)}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        parts[f"w{i}"] = torch.randn(a, b, generator=generator) * (2 / a) ** 0.5
        parts[f"b{i}"] = torch.zeros(b)
    return parts


def train(features: torch.Tensor, label: torch.Tensor, seed: int) -> dwb.Controller:
    parts = fresh(features, seed)
    weights = [parts[n].requires_grad_() for n in parts if n[0] in "wb"]
    net, optimiser = dwb.Controller(parts), torch.optim.Adam(weights, lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(features), generator=generator).split(BATCH):
            scores = net.scores(features[batch])
            share = scores.softmax(-1)
            loss = ALPHA * torch.nn.functional.cross_entropy(scores, label[batch])
            loss = loss + BETA * (share @ LATENCY).mean() + GAMMA * (1 - (share @ QUALITY).mean())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return dwb.Controller({name: value.detach() for name, value in parts.items()})


def quartiles(features: torch.Tensor) -> torch.Tensor:
    """The re-implementation's baseline: quartile of the mean of min-max-normalised features."""
    low, high = features.amin(0), features.amax(0)
    level = ((features - low) / (high - low).clamp_min(1e-9)).mean(1)
    return torch.bucketize(level, torch.quantile(level, torch.tensor([0.25, 0.5, 0.75])))


def against_chance(net: dwb.Controller, scores: torch.Tensor, cost: torch.Tensor, target: float) -> str:
    """Mean error at a mean width, beside the same widths dealt out at random and the best widths in hindsight."""
    widths = torch.tensor(dwb.WIDTHS)
    chosen = torch.searchsorted(widths, net.choose(scores, net.price(scores, target)).long())
    shuffles = [torch.randperm(len(chosen), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    error = lambda c: float(cost.gather(1, c[:, None]).mean())  # noqa: E731
    dealt = sum(error(chosen[order]) for order in shuffles) / len(shuffles)
    return (f"{target:g} bits: controller {float(widths[chosen].float().mean()):.2f} bits, mean error {error(chosen):.1f}; "
            f"same widths at random {dealt:.1f}; in hindsight {error(labels(cost, target)[0]):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--target", type=float, default=3.0)
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--out", type=Path, default=dwb.ASSET)
    parser.add_argument("--keep", type=Path, help="also write features and costs here")
    options = parser.parse_args()
    from lab import models

    start = time.time()
    loaded = models.load(options.model)
    texts = torch.cat([
        sample_ids(loaded.model, loaded.tokenizer, options.pieces, options.length).cpu(),
        recall_prompts(loaded.tokenizer, options.pieces // 2, options.length, 0),
    ])
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    held = max(1, len(texts) // 6)
    features, cost = examples(loaded.model, texts)
    if options.keep:
        torch.save({"features": features, "cost": cost}, options.keep)
    label, price = labels(cost, options.target)
    cut = len(label) - held * options.length
    net = train(features[:cut], label[:cut], 0)
    scores, truth, spent = net.scores(features[cut:]), label[cut:], cost[cut:]
    print(f"lambda {price:.3g}; label shares " + ", ".join(
        f"{w}: {float((label == i).float().mean()):.2f}" for i, w in enumerate(dwb.WIDTHS)))
    print(f"held-out texts: {held}, tokens {len(truth)}")
    print(f"accuracy: controller {float((scores.argmax(-1) == truth).float().mean()):.3f}, commonest label "
          f"{float((truth == label[:cut].mode().values).float().mean()):.3f}, quartiles "
          f"{float((quartiles(features)[cut:] == truth).float().mean()):.3f}")
    for target in (3.0, 4.0, 6.0):
        print(against_chance(net, scores, spent, target))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, **{n: v.numpy().astype(np.float16 if n[0] in "wb" else np.float32)
                                        for n, v in net.parts.items()})
    print(f"wrote {options.out} ({options.out.stat().st_size / 1024:.0f} KiB) in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
