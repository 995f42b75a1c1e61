"""Runs of the real default model on one GPU, on all GPUs and on the CPU of the same machine, as a user starts them.

    python benchmarks/real_gpu.py [--model default] [--prompt 1000] [--tokens 64] [--long 6000]

The same prompt of real prose (`pydoc_data.topics`) through `lab.measure`: what the browser and the command line run. In
float32 the GPU has to write the CPU's text, token for token, and hold the same bytes; in bfloat16, the card's default, the
figures of a run are printed: milliseconds per token on the user's path, KV bytes, KL to the dense variant, agreement.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.machine import write

SHORT = ("dense", "streaming_llm", "h2o", "snapkv"), ("dense", "pyramidkv", "int_codes(bits=4)", "kivi(bits=2)"), \
    ("dense", "zerotuning", "a_shape+delta", "head_pruning(fraction=0.2)"), \
    ("dense", "h2o+kivi(bits=2)", "rotated(bits=4)", "quest")
SHARED = "dense", "snapkv(budget=0.25)", "h2o(budget=0.25)", "int_codes(bits=4)"
LONG = ("dense", "snapkv(budget=0.25)", "int_codes(bits=4)", "h2o(budget=0.25)"),
SHOWN = ("ttft_ms", "tpot_ms", "kv_bytes", "kv_bytes_dense", "kept_fraction", "kl_mean", "top1_agreement", "perplexity")


def run(loaded, text: str, specs: tuple[str, ...], tokens: int, samples: int = 1) -> list[dict]:
    """The variants of one run record."""
    from lab.measure.experiment import Experiment
    from lab.measure.request import RunRequest

    experiment = Experiment(loaded, RunRequest(text, specs, max_new_tokens=tokens, timing="clean", samples=samples))
    for _ in experiment.events():
        pass
    return experiment.record["variants"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=6000)
    args = parser.parse_args()
    from lab.models import load

    prose, rows = " ".join(" ".join(topics[name].split()) for name in sorted(topics)), []
    places = [("cuda:0", "float32"), ("cuda:0", "auto")] + (
        [("all", "float32")] if torch.cuda.device_count() > 1 else []) + [("cpu", "float32")]
    texts: dict[str, dict[str, tuple]] = {}
    for device, dtype in places:
        began = time.perf_counter()
        loaded = load(args.model, device=device, dtype=dtype, **({"weights": "float32"} if device == "cpu" else {}))
        where = sorted({str(p.device) for p in loaded.model.parameters()})
        print(f"== {device} {dtype}: {loaded.facts.dtype}, on {', '.join(where)}, "
              f"loaded in {time.perf_counter() - began:.1f} s", flush=True)
        ids = loaded.tokenizer(prose[: 12 * args.long])["input_ids"]
        for count, groups in ((args.prompt, SHORT), (args.long, LONG if (device, dtype) == ("cuda:0", "auto") else ())):
            text = loaded.tokenizer.decode(ids[:count])
            asked = [(specs, 1) for specs in (groups if device != "cpu" or not groups else SHORT[:2])]
            if count == args.prompt and device in ("cuda:0", "cpu") and dtype == "float32":
                asked.append((SHARED, 4))  # four continuations of one prompt
            for specs, samples in asked:
                for v in run(loaded, text, specs, args.tokens, samples):
                    v["spec"] += f", {samples} samples" if samples > 1 else ""
                    row = {"device": device, "dtype": loaded.facts.dtype, "prompt": count, "spec": v["spec"],
                           "error": v["error"], **{k: v[k] for k in SHOWN}}
                    rows.append(row)
                    texts.setdefault(f"{device} {dtype}", {})[count, v["spec"]] = tuple(v["token_ids"]), v["kv_bytes"]
                    numbers = "  ".join(f"{k} {row[k]:.4g}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in SHOWN)
                    print(f"{count:5d} {v['spec']:30s} {v['error'] or numbers}", flush=True)
        del loaded
    cpu = texts["cpu float32"]
    for name, found in texts.items():
        same = {spec: sum(a == b for a, b in zip(found[n, spec][0], ids))
                for (n, spec), (ids, _) in cpu.items() if (n, spec) in found}
        size = {spec: found[n, spec][1]
                for (n, spec), (_, held) in cpu.items() if (n, spec) in found and found[n, spec][1] != held}
        print(f"{name}: of {args.tokens} tokens as on the CPU: {same}; other KV bytes: {size or 'none'}", flush=True)
        rows.append({"device": name, "tokens_as_on_the_cpu": same})
    print("written to", write("real_gpu", {"prompt": args.prompt, "tokens": args.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
