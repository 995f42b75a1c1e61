"""Every cache policy at the same stored bytes: prose, needles, and fidelity on the default model.

    python benchmarks/catalogue.py [--model default] [--shares 0.25,0.125,0.06] [--seeds 5] [--prompt 768] [--next 48]
                                   [--text FILE] [--only SUBSTRING,...] [--html] [--resume | --jobs N] [--side stored|read]

For each share of a dense 16-bit cache and each policy, the budget is set so that the bytes stored after the prompt (codes,
scales, positions, running sums) are that share; exact numbers count two bytes whatever the model's precision, as they would
on a GPU. Policies that cannot reach a share say so; those with a fixed size are listed at their own. One seed is one stretch
of prose and one set of needle prompts; every policy sees the same. Figures are means with a 95% t interval over seeds:

    KL          KL(dense || policy) of the next token on the text's own continuation, nats
    perplexity  of that continuation
    one, many   share of needles whose digits are all most likely, given the right ones before them: one needle at depths
                10, 50 and 90%; four needles with different names, one asked. The first digit is predicted by the prompt's
                own last row, before anything is compressed; the cache is tested by those after it

The prompt is read once per seed; each policy is then given the same queries, keys and values, layer by layer, which is what
it would see anyway, because every policy here attends to the exact prompt. Prints a table, writes results/catalogue.json,
and with --html an interactive page beside it. --side read: benchmarks/catalogue_read.py.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.catalogue_common import Read, Side, arguments, compressed, interval, quality, rows16  # noqa: E402
from benchmarks.catalogue_jobs import swept  # noqa: E402
from benchmarks.catalogue_page import page  # noqa: E402
from lab.engine.cache import LabCache  # noqa: E402
from lab.errors import LabError  # noqa: E402

# {b} is the budget that is solved for; policies without it have a size of their own
POLICIES = {
    "StreamingLLM": "streaming_llm(budget={b})",
    "Random": "random_score(budget={b},window=16)",
    "H2O": "h2o(budget={b})",
    "H2O, by age": "h2o(budget={b},norm=true)",
    "TOVA": "tova(budget={b})",
    "SnapKV": "snapkv(budget={b},window=16)",
    "VATP": "vatp(budget={b},first=4)",
    "Expected Attention": "expected_attention(budget={b})",
    "KeyDiff": "keydiff(budget={b},window=16)",
    "Key norm": "knorm(budget={b},window=16)",
    "KVzip": "kvzip(budget={b})",
    "KVzip, per layer": "kvzip(budget={b},scope=layer)",
    "ARKV score": "arkv_score(budget={b},window=16)",
    "SnapKV, pyramid": "snapkv(budget={b},window=16)+pyramidkv(window=16)",
    "SnapKV, AdaKV": "snapkv(budget={b},window=16)+adakv",
    "SnapKV, global": "snapkv(budget={b},window=16)+global_top",
    "SnapKV, D2O budgets": "snapkv(budget={b},window=16)+d2o_budget",
    "SnapKV, min. variance": "snapkv(budget={b},window=16)+min_variance",
    "SnapKV, risk parity": "snapkv(budget={b},window=16)+hrp",
    "H2O, CaM": "h2o(budget={b})+cam",
    "H2O, D2O merging": "h2o(budget={b},recent=0.25)+d2o_merge",
    "H2O, D2O counted": "h2o(budget={b},recent=0.25)+d2o_merge(multiplicity=true)",
    "Window, int4": "streaming_llm(budget={b},renumber=false)+int_codes(bits=4)",
    "Random, int4": "random_score(budget={b},window=16)+int_codes(bits=4)",
    "SnapKV, int8": "snapkv(budget={b},window=16)+int_codes(bits=8)",
    "SnapKV, int4": "snapkv(budget={b},window=16)+int_codes(bits=4)",
    "SnapKV, int2": "snapkv(budget={b},window=16)+int_codes(bits=2)",
    "SnapKV, rotated 4/3": "snapkv(budget={b},window=16)+rotated",
    "SnapKV, rotated 2": "snapkv(budget={b},window=16)+rotated(bits=2)",
    "SnapKV, KVQuant 3": "snapkv(budget={b},window=16)+kvquant",
    "SnapKV, KIVI 2": "snapkv(budget={b},window=16)+kivi(bits=2,residual=32)",
    "SnapKV, fp8": "snapkv(budget={b},window=16)+fp8",
    "SnapKV, ThinK": "snapkv(budget={b},window=16)+think(window=16)",
    "SnapKV, DWB 4": "snapkv(budget={b},window=16)+dwb",
    "SnapKV, ARKV": "arkv(window=16)+snapkv(budget={b},window=16)",
    "int8": "int_codes(bits=8)",
    "int4": "int_codes(bits=4)",
    "int2": "int_codes(bits=2)",
    "KIVI 4": "kivi(bits=4,residual=32)",
    "KIVI 2": "kivi(bits=2,residual=32)",
    "Rotated 4/3": "rotated",
    "Rotated inner 4/3": "rotated(mode=inner)",
    "Rotated integers 4": "rotated(mode=quarot)",
    "KVQuant 3": "kvquant",
    "fp8": "fp8",
    "ThinK": "think",
    "DWB 4": "dwb",
    "DWB 3": "dwb(target=3)",
}


def bytes16(cache: LabCache) -> int:
    """Stored bytes with exact numbers counted as 16-bit."""
    held = sum(s.live_bytes for layer in cache.lab_layers for s in (*layer.keys_side, *layer.values_side))
    return cache.kv_bytes - held + sum(rows16(layer) for layer in cache.lab_layers)


def dense16(prompt: Read) -> int:
    """Bytes of a dense 16-bit cache of this prompt."""
    return 4 * sum(k.shape[1] * k.shape[2] * k.shape[3] for _, k, _ in prompt.layers)


def solve(model, prompts: dict, template: str, share: float, seed: int) -> str | None:
    """The spec whose stored bytes after the prompt are `share` of dense, or None where it cannot get that small."""
    prompt = prompts["prose"][0]
    n, dense = prompt.ids.shape[1], dense16(prompt)
    budget = max(8, round(share * n))
    for _ in range(6):
        spec = template.format(b=budget)
        try:
            got = bytes16(compressed(model, prompt, spec, seed)) / dense
        except LabError:
            return None
        better = max(2, min(n - 1, round(budget * share / got)))
        if abs(got / share - 1) < 0.02 or better == budget:
            return spec if abs(got / share - 1) < 0.15 else None
        budget = better
    return spec


def measure(model, prompts: dict, spec: str, dense_rows, seed: int) -> dict:
    """One policy on one seed."""
    prompt = prompts["prose"][0]
    stored = bytes16(compressed(model, prompt, spec, seed)) / dense16(prompt)
    return {"share": stored} | quality(model, prompts, lambda r: (compressed(model, r, spec, seed), r.logits), dense_rows)


STORED = Side("catalogue", POLICIES, solve, measure, ("share", "kl", "perplexity", "agree", "one", "many"), page)


def main() -> None:
    options = arguments(__doc__).parse_args()
    try:
        if options.side == "read":
            from benchmarks import catalogue_read

            catalogue_read.report(options)
        else:
            show(swept(STORED, options))
    except LabError as problem:
        sys.exit(str(problem))


def show(found: dict) -> None:
    """The table, as README prints it."""
    text = lambda pair, digits: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"  # noqa: E731
    print("| policy | target | stored | KL, nats | perplexity | same top token | one needle | of four |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, share), results in sorted(found.items(), key=lambda x: (-(x[0][1] or 2), interval([r["kl"] for r in x[1]])[0])):
        cells = [interval([r[k] for r in results]) for k in ("kl", "perplexity", "agree", "one", "many")]
        stored = statistics.mean(r["share"] for r in results)
        print(f"| {name} | {f'{share:.1%}' if share else '-'} | {stored:.1%} | {text(cells[0], 3)} | {text(cells[1], 1)} | "
              f"{text(cells[2], 2)} | {text(cells[3], 2)} | {text(cells[4], 2)} |")


if __name__ == "__main__":
    main()
