"""`predict`: bytes, work and least times of stacks on any model and machine, without running anything."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lab.errors import LabError


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("predict", help="predict bytes, work and times for a model, stacks and a machine")
    parser.add_argument("--model", default="default", help="default, a hub id, a folder or a config.json; weights are not read")
    parser.add_argument("--variant", action="append",
                        help='a stack such as "h2o(budget=0.25)+kivi"; may be repeated (default: dense)')
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default 2048)")
    parser.add_argument("--new", type=int, default=256, help="tokens generated after it (default 256)")
    parser.add_argument("--sequences", type=int, default=1, help="sequences decoded at once (default 1)")
    parser.add_argument("--machine", default="",
                        help='a name from the table, or part of one; "list" shows it (default: this machine)')
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    from lab.measure.hardware import machines
    from lab.models.plan import facts_of

    table = machines()
    if args.machine == "list":
        for m in table:
            print(f"{m.name:<24} {m.flops / 1e12:>8.3g} TFLOP/s {m.format:<9} {m.bandwidth / 1e9:>7.4g} GB/s "
                  f"{m.memory / 1e9:>5.3g} GB  {m.source}")
        return 0
    found = [m for m in table if args.machine.lower() in m.name.lower()]
    if not found:
        raise LabError(f'There is no machine "{args.machine}" in the table', fix="python -m lab predict --machine list shows it")
    if min(args.prompt, args.new + 1, args.sequences) < 1:
        raise LabError("--prompt and --sequences are at least 1, and --new is not negative")
    machine = found[0] if args.machine else table[0]
    facts = facts_of(args.model, "float32" if machine.format == "float32" else "bfloat16").to_dict()
    rows = [predicted(facts, spec, args, machine) for spec in args.variant or ["dense"]]
    if args.json:
        print(json.dumps({"model": facts, "machine": machine.to_dict(), "prompt": args.prompt, "new": args.new,
                          "sequences": args.sequences, "variants": rows}, indent=1))
        return 0
    show(facts, machine, args, rows)
    return 0


def predicted(facts: dict[str, Any], spec: str, args: argparse.Namespace, machine: Any) -> dict[str, Any]:
    """One stack's figures as plain values: bytes, FLOPs, seconds."""
    from lab.engine.stack import Stack
    from lab.measure import cost, roofline

    stack = Stack.parse(spec)
    cost.check(stack, args.prompt)
    total, element = args.prompt + args.new, roofline.element_of(facts, machine)
    said = cost.predict(facts, stack, args.prompt, total, element, intensity=machine.intensity, batch=args.sequences,
                        weight_bytes=roofline.weight_bytes(facts, machine))
    works = roofline.works(facts, stack, args.prompt, total, machine, args.sequences)
    room = roofline.room(facts, stack, machine, args.sequences)
    return {
        "spec": stack.spec, "kv_bytes": said.kv_bytes, "kv_bytes_dense": said.kv_bytes_dense,
        "read_bytes_fraction": said.read_bytes_fraction,
        "probe_fraction": said.probe_fraction, "pays": said.saves, "flops": said.flops, "eflops": said.eflops,
        "works": {name: {"flops": w.flops, "bytes": w.bytes, "intensity": w.intensity, "least_seconds": w.seconds(machine)}
                  for name, w in works.items()},
        "weights": roofline.weight_bytes(facts, machine), "runs_out_after": None if room is None else room.longest,
        "sequences_that_fit": None if room is None else room.most,
    }


def show(facts: dict[str, Any], machine: Any, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The figures as text."""
    print(f"predicted, nothing was run · {facts['id']} · {facts['parameters'] / 1e6:,.0f} M parameters · {machine.name} · "
          f"{args.prompt:,} + {args.new:,} tokens × {args.sequences}")
    print(f"{'variant':<44} {'KV of one':>11} {'ratio':>6} {'read':>6} {'step':>9} {'prompt':>9} "
          f"{'eFLOPs':>9} {'memory runs out':>16}")
    for r in rows:
        if r["sequences_that_fit"] is None:
            where = "–"
        else:
            where = "fits" if r["runs_out_after"] is None else f"after {r['runs_out_after']:,}"
        least = [f"{1e3 * r['works'][k]['least_seconds']:.3g} ms" for k in ("decode step", "whole prompt")]
        read = r["read_bytes_fraction"] + r["probe_fraction"]
        print(f"{r['spec']:<44.44} {r['kv_bytes'] / 2**20:>7,.1f} MiB {r['kv_bytes'] / r['kv_bytes_dense']:>5.2f}x {read:>6.0%} "
              f"{least[0]:>9} {least[1]:>9} {r['eflops']:>9.3g} {where:>16}")
