"""A synthetic run and a lab without an engine, for tests of the browser room only. No figure here is a measurement."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lab.engine.slots import Paper, Technique, param
from lab.errors import LabError
from lab.ui.controller import Job, Lab, Outcome
from lab.ui.library import StoreLibrary
from lab.ui.opened import OpenRun

NEVER = 2**31 - 1
LAYERS, HEADS, KV, DIM = 8, 6, 2, 16
STORY = ("The keeper wrote one line each evening: the wind, the height of the sea, and which of the nine boxes had been "
         "opened. Box 7 holds the amber key. Box 8 holds the white stone. On the third night the lamp went out and the "
         "log says only that the door was left open. In spring the boxes were carried down the stair, one by one, and "
         "nobody counted them. The archive has the log, the letters and a drawing of the lamp. <b>Nothing</b> else was "
         "kept, because nothing else was thought to matter. Which box holds the amber key, and why does it matter?")
ANSWERS = ["The amber key is in box 7. It matters because the key opens the archive, and the archive holds the letters "
           "that the keeper left behind.",
           "The amber key is in box 7. It matters because the key is the only thing that can open the door to the lamp "
           "<script>alert(1)</script>.",
           "The amber key is in box 8. The boxes were carried down the stair, one by one, and nobody counted them at all."]


@dataclass(frozen=True)
class HeavyHitters(Technique):
    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    paper: ClassVar[Paper] = Paper("H2O: Heavy-Hitter Oracle", "2306.14048", 2023)
    slots: ClassVar[tuple[str, ...]] = ("observe", "score")
    help: ClassVar[str] = "Keeps the entries that received the most attention so far, together with the most recent ones."
    budget: float = param(0.25, "share of the prompt to keep", min=0.01, max=1.0, unit="fraction")
    recent: int = param(32, "newest entries that always stay", min=1, max=4096, unit="entries")


@dataclass(frozen=True)
class Window(Technique):
    name: ClassVar[str] = "streaming"
    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[Paper] = Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453", 2023)
    slots: ClassVar[tuple[str, ...]] = ("score", "reduce")
    help: ClassVar[str] = "Keeps the first few tokens, which act as attention sinks, and a sliding window."
    sinks: int = param(4, "first tokens that always stay", min=0, max=64)
    window: int = param(64, "newest entries kept", min=1, max=8192)
    renumber: bool = param(False, "count positions inside the cache")


@dataclass(frozen=True)
class Codes(Technique):
    name: ClassVar[str] = "kivi"
    title: ClassVar[str] = "KIVI"
    paper: ClassVar[Paper] = Paper("KIVI: tuning-free asymmetric 2-bit quantization", "2402.02750", 2024)
    slots: ClassVar[tuple[str, ...]] = ("encode",)
    help: ClassVar[str] = "Keys in groups per channel, values per token, the newest entries exact."
    bits: int = param(2, "bits per number", choices=(2, 4, 8))


@dataclass(frozen=True)
class Tune(Technique):
    name: ClassVar[str] = "zerotuning"
    title: ClassVar[str] = "ZeroTuning"
    paper: ClassVar[Paper] = Paper("ZeroTuning", "2505.11739", 2025)
    slots: ClassVar[tuple[str, ...]] = ("edit",)
    saves: ClassVar[str] = "nothing"
    help: ClassVar[str] = "Scales the attention on the first token, head by head."
    gamma: float = param(1.5, "factor on the first token's attention", min=0.1, max=4.0)


TECHNIQUES = {t.name: t for t in (Window, HeavyHitters, Codes, Tune)}


@dataclass(frozen=True)
class Progress:
    variant: int | None
    fraction: float
    text: str


@dataclass(frozen=True)
class Prefilled:
    variant: int
    ttft_ms: float
    prompt_tokens: int
    kv_bytes: int
    kept_fraction: float


@dataclass(frozen=True)
class Token:
    variant: int
    index: int
    id: int
    text: str
    logprob: float
    entropy: float
    step_ms: float
    kv_bytes: int
    kept: int
    alternatives: tuple


@dataclass(frozen=True)
class Finished:
    variant: int
    reason: str
    text: str


def split(text: str) -> list[str]:
    """Words with the space before them, as tokenisers do."""
    words = text.split(" ")
    return [words[0]] + [" " + w for w in words[1:]]


FACTS = {"id": "tests/Synthetic-1M", "source": "fixture", "revision": "0", "architecture": "LlamaForCausalLM",
         "parameters": 1_000_000, "layers": LAYERS, "heads": HEADS, "kv_heads": KV, "head_dim": DIM, "context": 2048,
         "vocab": 1000, "dtype": "float32", "weights": "float32", "device": "cpu", "sliding_window": None,
         "layer_types": ["full_attention"] * LAYERS, "kv_bytes_per_token": LAYERS * KV * DIM * 2 * 4, "weights_kl": None}


def cache_arrays(kind: str, n: int, prompt: int) -> dict[str, np.ndarray]:
    """bits, death and demoted of one invented policy, and what was merged."""
    rng = np.random.default_rng(len(kind))
    bits = np.full((LAYERS, KV, n), 16, np.uint8)
    death = np.full((LAYERS, KV, n), NEVER, np.int64)
    demoted = np.full((LAYERS, KV, n), NEVER, np.int64)
    merged = np.full((LAYERS, KV, n), -1, np.int32)
    if kind == "b":
        for layer in range(LAYERS):
            keep = rng.random((KV, prompt)) < 0.5 - 0.05 * layer
            keep[:, :2] = keep[:, -8:] = True
            bits[layer, :, :prompt] = np.where(keep, 2, 0)
            death[layer, :, :prompt] = np.where(keep, NEVER, prompt)
            demoted[layer, :, :prompt] = np.where(keep, prompt, NEVER)
            merged[layer, :, 2:40] = np.where(keep[:, 2:40], -1, 1)  # some of what leaves joins token 1
    if kind == "c":
        for j in range(4, n - 64):
            bits[:, :, j], death[:, :, j] = 0, max(j + 64, prompt)
    found = {"bits": bits, "death": death.astype(np.int32), "demoted": demoted.astype(np.int32)}
    return found | ({"merged": merged} if kind == "b" else {})


def record_and_arrays(run_id: str = "20260101-000000-test", made: list[str] | None = None) -> tuple[dict, dict]:
    """A whole run in the contract's shape: A dense, B h2o+kivi, C streaming."""
    prompt = split(STORY)
    rng = np.random.default_rng(0)
    variants, arrays = [], {}
    specs = [("A", "dense", "Dense", []),
             ("B", "h2o+kivi", "H2O · KIVI", [HeavyHitters(), Codes()]),
             ("C", "streaming", "StreamingLLM", [Window()])]
    reference = split(ANSWERS[0])
    for i, (letter, spec, title, stack) in enumerate(specs):
        words = split(ANSWERS[i])
        fork = next((k for k, (a, b) in enumerate(zip(reference, words)) if a != b), None) if i else None
        n = len(prompt) + len(words) - 1
        kept = cache_arrays("abc"[i], n, len(prompt))
        arrays |= {f"cache/{letter}/{name}": a for name, a in kept.items()}
        for layer in (0, 3, 7):
            base = rng.standard_normal((KV, n, DIM))
            base[:, 0] += 2.5
            arrays[f"qk/{letter}/{layer}/k"] = base.astype(np.float16)
            q = np.repeat(base, HEADS // KV, 0) * 0.9 + 0.8 * rng.standard_normal((HEADS, n, DIM)) + 0.6
            arrays[f"qk/{letter}/{layer}/q"] = q.astype(np.float16)
            arrays[f"qk/{letter}/{layer}/meta"] = np.array([DIM**-0.5, 0, 0])
        share = [1.0, 0.36, 0.45][i]
        total = FACTS["kv_bytes_per_token"]
        size = [int(total * (len(prompt) + k) * [1.0, 0.09, 0.45][i]) for k in range(len(words))]
        fidelity = [] if not i else [
            {"kl": float(abs(rng.normal(0, 0.15)) * (k > 3)), "agree": bool(rng.random() > 0.15), "ref_prob": 0.61,
             "var_prob": 0.48, "top": [[1, reference[k], 0.48], [2, " stone", 0.2]]} for k in range(len(reference))]
        tokens = [{"id": 10 + k if w == (reference + [None] * 99)[k] else 900 + k, "text": w, "logprob": -0.4 - 0.02 * k,
                   "entropy": 0.9, "step_ms": float(20 + 4 * rng.random() - 4 * bool(i)), "kv_bytes": size[k],
                   "kept": int(share * (len(prompt) + k)),
                   "alternatives": [[1, w, 0.6], [2, " <i>door</i>", 0.2], [3, "\n", 0.1]]}
                  for k, w in enumerate(words)]
        layers = [{"layer": j, "kv_bytes": size[-1] // LAYERS,
                   "bits": {str(b): int((kept["bits"][j] == b).sum()) for b in (16, 8, 4, 2, 0)}} for j in range(LAYERS)]
        variants.append({
            "letter": letter, "spec": spec, "title": title,
            "techniques": [{"name": t.name, "params": {p.name: getattr(t, p.name) for p in t.parameters()}} for t in stack],
            "text": ANSWERS[i], "token_ids": [t["id"] for t in tokens], "finish": "length", "error": None,
            "ttft_ms": 1920.0 + 40 * i, "tpot_ms": 21.4 - 2 * i, "kv_bytes": size[-1], "kv_bytes_dense": total * n,
            "slack_bytes": 4096, "kept_fraction": share, "read_fraction": share, "simulated": False,
            "kl_mean": float(np.mean([f["kl"] for f in fidelity])) if i else None,
            "top1_agreement": float(np.mean([f["agree"] for f in fidelity])) if i else None, "perplexity": 3.1 + i,
            "first_divergence": fork, "tokens": tokens, "fidelity": fidelity, "layers": layers})
    record = {"schema": 1, "run_id": run_id, "name": "", "tags": [], "created": "2026-01-01T00:00:00Z", "status": "complete",
              "model": FACTS, "device": "cpu",
              "environment": {"python": "3", "torch": "2", "transformers": "5", "triton": None, "cpu": "test", "threads": 2,
                              "gpu": None, "lab": "0"},
              "settings": {"max_new_tokens": 40, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0,
                           "timing": "interleaved", "samples": 1},
              "prompt": {"text": STORY, "token_ids": list(range(len(prompt))), "tokens": prompt}, "variants": variants}
    return record, arrays


class FakeLab(Lab):
    """The controller with invented answers where the engine would be."""

    def __init__(self, step_s: float = 0.01, example: bool = True) -> None:
        super().__init__(StoreLibrary.memory())
        self.step_s, self.runs_made = step_s, 0
        self._go, self._hold = threading.Event(), None
        self.shelf._runs.pop("recorded", None)
        self.has_example = example
        if example:
            self.shelf.put(OpenRun(*record_and_arrays(), recorded=True), "recorded")
        record, arrays = record_and_arrays("20251231-230000-aaaa")
        record.update(name="older run", tags=["kivi"])
        self.library.save(record, arrays)

    def registry(self) -> dict[str, Any]:
        return TECHNIQUES

    def facts(self) -> dict[str, Any]:
        return FACTS

    @property
    def loaded(self) -> bool:
        return True

    def ensure_model(self, report=None):
        raise LabError("There is no model in this test")

    def replays_by_itself(self, run) -> bool:
        return False

    def count_tokens(self, text: str, chat: bool = False) -> int:
        return (len(split(text)) + 9 * chat) if text else 0

    def predict(self, stack, facts, prompt, total, samples=1):
        if any(isinstance(t, HeavyHitters) and t.budget < 0.05 for t in stack.techniques):
            raise LabError("H2O must protect more", "A twentieth is the least", "Raise it",
                           {"technique": HeavyHitters.name, "parameter": "budget", "value": 0.05})
        dense = facts["kv_bytes_per_token"] * (prompt + samples * (total - prompt))
        return dense * (0.25 if "h2o" in stack.spec else 1) * (0.2 if "kivi" in stack.spec else 1), dense

    @contextmanager
    def held(self, after: int) -> Iterator[None]:
        """Inside, a run writes `after` tokens of each variant and then waits, so that a test sees it under way however slow the
        machine is. The run goes on when the block ends; one that is stopped ends at once."""
        self._hold = after
        self._go.clear()
        try:
            yield
        finally:
            self._hold = None
            self._go.set()

    def run(self, prompt: str, variants: list[dict], settings: dict, job: Job, owner: str = "") -> Iterator[Any]:
        self.runs_made += 1
        job.run_id = f"20260102-00000{self.runs_made}-fake"
        record, arrays = record_and_arrays(f"20260102-00000{self.runs_made}-fake")
        record["variants"] = record["variants"][:len(variants)]
        record["prompt"]["text"] = prompt
        for i, variant in enumerate(record["variants"]):
            stack = self.stack(variants[i])
            variant.update(spec=stack.spec, title=stack.title, techniques=stack.describe())
        begun = [{**v, "tokens": [], "token_ids": [], "fidelity": [], "finish": None} for v in record["variants"]]
        self.library.begin({**record, "variants": begun}, owner if self.public else "")
        for i, variant in enumerate(record["variants"]):
            yield Progress(i, 0.5, "reading the prompt")
            time.sleep(self.step_s)
            yield Prefilled(i, variant["ttft_ms"], len(record["prompt"]["tokens"]), variant["kv_bytes"], variant["kept_fraction"])
        longest = min(int(settings["max_new_tokens"]), max(len(v["tokens"]) for v in record["variants"]))
        reason = "length"
        for k in range(longest):
            while k == self._hold and not job.stopped and not self._go.wait(0.02):
                yield Progress(None, k / longest, "held")
            if job.stopped:
                reason = "cancelled"
                break
            for i, variant in enumerate(record["variants"]):
                if k < len(variant["tokens"]):
                    t = variant["tokens"][k]
                    time.sleep(self.step_s)
                    yield Token(i, k, t["id"], t["text"], t["logprob"], t["entropy"], t["step_ms"], t["kv_bytes"], t["kept"],
                                tuple(map(tuple, t["alternatives"])))
        for i, variant in enumerate(record["variants"]):
            variant["finish"] = reason
            if reason == "cancelled":
                variant["tokens"], variant["fidelity"] = variant["tokens"][:k], variant["fidelity"][:k]
            yield Finished(i, reason, variant["text"])
        record["status"] = "complete" if reason == "length" else "cancelled"
        yield Outcome(record, arrays)
