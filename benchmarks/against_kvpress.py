"""Do kvpress and the lab keep the same positions? Same model, same prompt, same number of entries.

    python benchmarks/against_kvpress.py [--tokens 600] [--ratio 0.7] [--keep-env FOLDER] [--json]

kvpress (NVIDIA, Apache-2.0) is no dependency: the script makes a throw-away environment with its own transformers, runs
itself there as `--peer`, and removes the environment afterwards (--keep-env keeps it for the next time). torch is borrowed
from the environment that runs the script. Positions kept by kvpress are found by comparing its cache with an uncompressed
one; for presses that only mask, by the indices it masks. Prints, per technique, the share of (layer, head) sets that are
identical and the mean overlap, with the reason where definitions differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = ("kvpress==0.5.1", "transformers==5.3.0")
# lab stack ({n} entries per head), press, reason for a difference ("" where none is expected)
PAIRS = (
    ("streaming_llm(budget={n},sinks=4)", "StreamingLLMPress({r})", ""),
    ("knorm(budget={n},window=0)", "KnormPress({r})", "norms equal to float rounding at the edge of the budget"),
    ("keydiff(budget={n},window=0)", "KeyDiffPress({r})", ""),
    ("tova(budget={n},newest=true)", "TOVAPress({r})", ""),
    ("expected_attention(budget={n})", "ExpectedAttentionPress({r})", ""),
    ("expected_attention(budget={n},covariance=false)", "ExpectedAttentionPress({r}, use_covariance=False)", ""),
    ("h2o(budget={n},norm=true,recent=0)", "ObservedAttentionPress({r})",
     "the lab always keeps the newest entry (sheet 2), kvpress may drop it"),
    ("snapkv(budget={n},window=64,kernel=1)", "SnapKVPress({r}, window_size=64, kernel_size=1)", ""),
    ("snapkv(budget={n},window=64)", "SnapKVPress({r}, window_size=64)",
     "at the edges kvpress pools over zeros, the lab over the entries that exist"),
    ("adakv+snapkv(budget={n},window=64,kernel=1)", "AdaKVPress(SnapKVPress({r}, window_size=64, kernel_size=1))",
     ""),
    ("pyramidkv(window=64)+snapkv(budget={n},window=64,kernel=1)", "PyramidKVPress({r}, window_size=64, kernel_size=1)",
     "kvpress adds the window to the mean capacity before spreading it and then takes it as part of each layer's number, so "
     "its slope differs from the paper's formula, which the lab follows"),
    ("kvzip(budget={n},sinks=0,scope=layer)", "KVzipPress({r}, layerwise=True)",
     "kvpress ranks the heads of a layer together, which the lab writes as adakv(alpha=0)"),
    ("kvzip(budget={n},sinks=0,scope=layer)+adakv(alpha=0)", "KVzipPress({r}, layerwise=True)", ""),
    ("kvzip(budget={n},sinks=0)", "KVzipPress({r})", ""),
    ("kvzip(budget={n})", "KVzipPress({r})",
     "without a chat template kvpress scores the first tokens like any other; the lab keeps them in every head"),
)


def peer(job: Path) -> None:
    """Inside the throw-away environment: run every press and write the positions each layer and head keeps."""
    import kvpress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    work = json.loads(job.read_text())
    from kvpress.presses import kvzip_press

    class Plain:  # a prompt without a chat template: KVzip would otherwise leave as many first tokens unscored as one has
        @staticmethod
        def from_pretrained(name):
            tokenizer = AutoTokenizer.from_pretrained(name)
            tokenizer.chat_template = None
            return tokenizer

    kvzip_press.AutoTokenizer = Plain
    ids, kept = torch.tensor([work["ids"]]), {}
    models: dict = {}

    def model_of(attention: str):
        if attention not in models:
            models[attention] = AutoModelForCausalLM.from_pretrained(
                work["model"], dtype=torch.float32, attn_implementation=attention).eval()
        return models[attention]

    def filled(model, press=None):
        cache = DynamicCache()
        more = {"output_attentions": True} if model.config._attn_implementation == "eager" else {}
        with torch.no_grad():
            if press is None:
                model.model(input_ids=ids, past_key_values=cache, **more)
            else:
                with press(model):
                    model.model(input_ids=ids, past_key_values=cache, **more)
        return cache

    for text in work["presses"]:
        try:
            model = model_of("eager" if "Observed" in text else "sdpa")
            for layer in model.model.layers:
                layer.self_attn.masked_key_indices = None
            whole, cut = filled(model), filled(model, eval(text, {**vars(kvpress)}))  # noqa: S307: our own table above
            rows = []
            for i, (a, b) in enumerate(zip(whole.layers, cut.layers)):
                masked = getattr(model.model.layers[i].self_attn, "masked_key_indices", None)
                heads, n = a.keys.shape[1], a.keys.shape[2]
                if masked is not None:
                    _, head, place = masked
                    gone = [set() for _ in range(heads)]
                    for h, p in zip(head.tolist(), place.tolist()):
                        gone[h].add(p)
                    rows.append([[p for p in range(n) if p not in gone[h]] for h in range(heads)])
                else:
                    same = (a.keys[0].unsqueeze(1) - b.keys[0].unsqueeze(2)).abs().amax(-1).argmin(-1)
                    rows.append([sorted(x) for x in same.tolist()])
            kept[text] = rows
        except Exception as problem:  # noqa: BLE001: one press that fails must not hide the others
            kept[text] = f"{type(problem).__name__}: {problem}"
    job.with_suffix(".out").write_text(json.dumps({"kept": kept, "transformers": __import__("transformers").__version__}))


def environment(folder: Path) -> Path:
    """Make (or reuse) the environment; returns its python. torch comes from the one that runs this script."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (folder / "ready").touch()
    return python


def ours(loaded, spec: str, ids: list[int], seed: int = 0) -> list[list[list[int]]]:
    """Positions the lab keeps, per layer and head."""
    from lab.engine.session import Session

    session = Session(loaded.model, spec, chunk=None, seed=seed)
    session.prefill(ids)
    return [
        [sorted(layer.positions()[0, h, :n].tolist()) for h, n in enumerate(layer.counts)] for layer in session.cache.lab_layers
    ]


def compare(a: list, b: list) -> tuple[float, float]:
    """(share of identical sets, mean overlap |A and B| / max(|A|, |B|)) over layers and heads."""
    pairs = [(set(x), set(y)) for la, lb in zip(a, b) for x, y in zip(la, lb)]
    return sum(x == y for x, y in pairs) / len(pairs), sum(len(x & y) / max(len(x), len(y), 1) for x, y in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--ratio", type=float, default=0.7, help="kvpress's compression_ratio: share of entries removed")
    parser.add_argument("--keep-env", type=Path)
    parser.add_argument("--only", default="", help="compare techniques whose stack contains this text")
    parser.add_argument("--json", action="store_true", help="write results/against_kvpress.json")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.peer)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.machine import write
    from lab import models
    from lab.engine.sample_text import prose
    from lab.techniques import kvzip

    pairs = [p for p in PAIRS if options.only in p[0]]
    loaded = models.load("default", weights="float32")
    folder = Path(loaded.model.config._name_or_path or loaded.facts.source)
    ids = loaded.tokenizer(prose("measure")[: 20 * options.tokens], add_special_tokens=False)["input_ids"][: options.tokens]
    entries = int(len(ids) * (1 - options.ratio))
    with tempfile.TemporaryDirectory(prefix="kvpress-") as scratch:
        python = environment(options.keep_env or Path(scratch) / "env")
        job = Path(scratch) / "job.json"
        named = {press.format(r=options.ratio): spec.format(n=entries) for spec, press, _ in pairs}
        job.write_text(json.dumps({"model": str(folder), "ids": ids, "presses": list(named)}))
        subprocess.run([python, Path(__file__).resolve(), "--peer", job], check=True, cwd=scratch)
        answer = json.loads(job.with_suffix(".out").read_text())
    kvzip.FIRST, kvzip.LATER = kvzip.FIRST + "\n", kvzip.LATER + "\n"  # kvpress puts a line break after the instruction
    print(f"{len(ids)} tokens, {entries} kept per head in the mean, "
          f"kvpress {REQUIREMENTS[0]} on transformers {answer['transformers']}")
    print("| lab | kvpress | identical sets | overlap | why |\n|---|---|---|---|---|")
    rows = []
    for spec, press, why in pairs:
        spec, press = spec.format(n=entries), press.format(r=options.ratio)
        theirs = answer["kept"][press]
        if isinstance(theirs, str):
            print(f"| {spec} | {press} | - | - | kvpress failed: {theirs} |")
            continue
        same, overlap = compare(ours(loaded, spec, ids), theirs)
        rows.append({"lab": spec, "kvpress": press, "identical": same, "overlap": overlap, "why": why})
        print(f"| {spec} | {press} | {same:.1%} | {overlap:.3%} | {why} |", flush=True)
    if options.json:
        print(write("against_kvpress", {"tokens": len(ids), "ratio": options.ratio, "transformers": answer["transformers"],
                                        "rows": rows}))


if __name__ == "__main__":
    main()
