"""The run record: one plain dict that the command line prints, storage saves and the browser draws."""

from __future__ import annotations

import datetime
import math
import os
import platform
import secrets
from dataclasses import asdict
from functools import cache as memo
from typing import Any

import numpy as np
import torch
import transformers

from lab import __version__
from lab.engine.cache import LabCache
from lab.engine.events import Fidelity, Token
from lab.engine.stack import Stack
from lab.measure.ledger import Ledger
from lab.measure.request import LETTERS, RunRequest
from lab.measure.stream import Stream

CAPTURE_LIMIT = 24 * 2**20  # bytes of queries and keys a saved run may carry; beyond it the map replays the run


def new_run_id() -> str:
    """Time and four random hex digits: "20261124-105236-3fa9"."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def base_record(request: RunRequest, facts: dict[str, Any], ids: list[int], strings: list[str]) -> dict[str, Any]:
    """What is known before the first token."""
    sampling = request.sampling
    return {
        "schema": 1,
        "run_id": new_run_id(),
        "name": request.name,
        "tags": [],
        "created": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "status": "interrupted",
        "model": facts,
        "device": facts["device"],
        "environment": environment(),
        "settings": {
            "max_new_tokens": request.max_new_tokens, "temperature": sampling.temperature, "top_k": sampling.top_k,
            "top_p": sampling.top_p, "seed": sampling.seed, "timing": request.timing, "samples": request.samples,
            "chat": request.chat, "fidelity": request.fidelity,
        },
        "prompt": {"text": request.prompt, "token_ids": ids, "tokens": strings},
        "variants": [
            _blank(LETTERS[i], request.variants[i].strip() or stack.spec, stack) for i, stack in enumerate(request.stacks())
        ],
    }


@memo
def environment() -> dict[str, Any]:
    """The machine and the libraries, once per process."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "triton": triton_version, "cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu, "lab": __version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _blank(letter: str, spec: str, stack: Stack) -> dict[str, Any]:
    empty = ("ttft_ms", "tpot_ms", "kv_bytes", "kv_bytes_dense", "slack_bytes", "kept_fraction", "read_fraction",
             "kl_mean", "top1_agreement", "perplexity", "first_divergence")
    return {
        "letter": letter, "spec": spec, "title": stack.title, "techniques": stack.describe(),
        "text": "", "samples": [], "token_ids": [], "finish": None, "error": None, **dict.fromkeys(empty),
        "reads": None, "simulated": any(t.saves == "simulated" for t in stack.techniques),
        "saves": sorted({t.saves for t in stack.techniques}), "tokens": [], "fidelity": [], "layers": [],
    }


def token_row(event: Token) -> dict[str, Any]:
    row = asdict(event)
    return {k: row[k] for k in ("id", "text", "logprob", "entropy", "step_ms", "kv_bytes", "kept")} | {
        "alternatives": [list(a) for a in event.alternatives]
    }


def fidelity_row(event: Fidelity) -> dict[str, Any]:
    row = asdict(event)
    return {k: row[k] for k in ("kl", "agree", "ref_prob", "var_prob")} | {"top": [list(a) for a in event.top]}


def fill_variant(variant: dict[str, Any], stream: Stream, reference: dict[str, Any]) -> None:
    """Complete a variant's entry from its finished (or stopped) stream."""
    cache = stream.session.cache
    variant["text"], variant["finish"] = stream.text, stream.reason
    variant["token_ids"] = list(stream.token_ids[0])
    variant["samples"] = [stream.sample_text(i) for i in range(stream.samples)] if stream.samples > 1 else []
    variant["ttft_ms"] = stream.ttft_ms
    variant["tpot_ms"] = median_step(variant["tokens"])
    if cache is not None and stream.ttft_ms is not None:  # a prompt half read has no figures
        variant["kv_bytes"], variant["slack_bytes"] = cache.kv_bytes, cache.slack_bytes
        variant["kv_bytes_dense"] = dense_bytes(cache)
        variant["kept_fraction"], variant["read_fraction"] = cache.kept_fraction, cache.read_fraction
        variant["reads"] = reads(cache) if variant["tpot_ms"] is not None else None
        variant["layers"] = [layer_row(layer) for layer in cache.lab_layers]
    variant.update(averages(variant, variant is reference))
    if variant is not reference:
        variant["first_divergence"] = first_divergence(variant["token_ids"], reference["token_ids"])


def averages(variant: dict[str, Any], reference: bool) -> dict[str, float | None]:
    """Mean KL, agreement and perplexity of what a variant has written; None where there is nothing to average."""
    rows = [] if reference else variant["fidelity"]
    logps = [t["logprob"] for t in variant["tokens"]] if reference else [math.log(max(r["var_prob"], 1e-45)) for r in rows]
    return {
        "kl_mean": float(np.mean([r["kl"] for r in rows])) if rows else None,
        "top1_agreement": float(np.mean([r["agree"] for r in rows])) if rows else None,
        "perplexity": math.exp(-float(np.mean(logps))) if logps else None,
    }


def median_step(tokens: list[dict[str, Any]]) -> float | None:
    """Milliseconds per token over the decode steps that were timed."""
    steps = [t["step_ms"] for t in tokens if t["step_ms"] is not None]
    return float(np.median(steps)) if steps else None


def so_far(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a variant that goes on, from the rows of what it has written: the cache itself is not touched in mid-run."""
    newest = tokens[-1] if tokens else {"kv_bytes": None, "kept": None}
    return {"tpot_ms": median_step(tokens), "kv_bytes": newest["kv_bytes"], "kept_fraction": newest["kept"]}


def reads(cache: LabCache) -> dict[str, Any]:
    """What the newest step read, as shares of the bytes a dense exact cache reads: attend, choose, and whether that pays."""
    ledger = Ledger()
    ledger.note(cache)
    total = ledger.totals()
    return {"attend": total["read_fraction"], "choose": total["probe_fraction"], "pays": bool(total["pays"])}


def first_divergence(tokens: list[int], reference: list[int]) -> int | None:
    """Index of the first token that differs, None where one text is the other's beginning."""
    return next((i for i, (a, b) in enumerate(zip(tokens, reference)) if a != b), None)


def dense_bytes(cache: LabCache) -> int:
    """Bytes the same tokens take without any technique, in the same dtype: windowed layers hold their window, and samples of
    one prompt hold it once."""
    total = 0
    for layer in cache.lab_layers:
        if layer.is_initialized:
            rows = min(layer.seen, layer.window) if layer.window else layer.seen
            own = min(rows, layer.seen - layer.shared_rows)
            size = torch.empty(0, dtype=layer.dtype).element_size()
            total += layer.heads * (rows - own + layer.batch * own) * layer.widths * size
    return total


def layer_row(layer) -> dict[str, Any]:
    """Bytes and entry counts of one layer, summed over KV heads (and samples)."""
    counts = layer.bits_count()
    gone = layer.seen * layer.batch * layer.heads - sum(layer.counts)
    widths = sorted({16, 8, 4, 2} | (counts.keys() - {0}), reverse=True)
    return {
        "layer": layer.index, "kv_bytes": layer.live_bytes,
        "bits": {str(b): counts.get(b, 0) for b in widths} | {"0": gone},
    }


def cache_arrays(letter: str, cache: LabCache) -> dict[str, np.ndarray]:
    """The life of every position: bits, death and demoted, [L, Hk, seen], for the first sequence.

    Where entries were merged there is `merged` too: int32, the position that each joined, -1 for none; and where one was
    shared out, `among`: int32, how many share it, from that position on, of those that outlived it.
    """
    layers = [layer for layer in cache.lab_layers if layer.history is not None]
    parts = [layer.history.upto(layer.seen) for layer in layers]
    if not parts or len({p[0].shape[1] for p in parts}) > 1:
        return {}
    names = ("bits", "death", "demoted")
    out = {f"cache/{letter}/{name}": torch.stack([p[i][0] for p in parts]).numpy() for i, name in enumerate(names)}
    into = [layer.history.targets(layer.seen) for layer in layers]
    if any(t is not None for t in into):
        none = torch.full_like(parts[0][1][0], -1)
        out[f"cache/{letter}/merged"] = torch.stack([none if t is None else t[0] for t in into]).numpy()
    shared = [layer.history.sharing(layer.seen) for layer in layers]
    if any(t is not None for t in shared):
        none = torch.zeros_like(parts[0][1][0])
        out[f"cache/{letter}/among"] = torch.stack([none if t is None else t[0] for t in shared]).numpy()
    return out


def capture_arrays(letter: str, cache: LabCache) -> dict[str, np.ndarray]:
    """Queries, keys and scales of every tapped layer."""
    out = {}
    for layer in cache.lab_layers:
        if layer.tap is not None:
            out[f"qk/{letter}/{layer.index}/q"] = layer.tap.q.numpy()
            out[f"qk/{letter}/{layer.index}/k"] = layer.tap.k.numpy()
            out[f"qk/{letter}/{layer.index}/meta"] = np.array(layer.tap.meta)
    return out
