"""The catalogue by several processes on a machine with many cores: each takes some of the policies, on every seed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

from benchmarks.catalogue_common import RESULTS, Key, Side, save, sweep
from lab.errors import LabError


def swept(side: Side, options: argparse.Namespace) -> dict[Key, list[dict]]:
    """As `sweep`, by `options.jobs` processes; after `options.limit` seconds with the seeds that are done. Each starts this very
    command with `--part` added. Raises LabError where not one seed was done."""
    if options.part is not None and options.side_of != side.name:
        return {}
    if options.part is not None:
        mine = dict(list(side.policies.items())[options.part :: options.jobs])
        return sweep(replace(side, name=f"{side.name}.part{options.part}", policies=mine, page=lambda *_: None), options)
    if options.jobs == 1:
        return sweep(side, options)
    if options.resume:
        raise LabError("A catalogue by several processes cannot go on after an earlier one", fix="Leave out --resume, or --jobs")
    began, files = time.time(), [RESULTS / f"{side.name}.part{n}.json" for n in range(options.jobs)]
    for file in files:
        file.unlink(missing_ok=True)
    threads = str(max(1, len(os.sched_getaffinity(0)) // options.jobs))
    running = [
        subprocess.Popen([sys.executable, *sys.argv, "--side-of", side.name, "--part", str(n)],
                         env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
        for n in range(options.jobs)
    ]
    for one in running:
        try:
            one.wait(max(0.0, began + options.limit - time.time()) if options.limit else None)
        except subprocess.TimeoutExpired:
            one.terminate()
            one.wait()
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    if not parts:
        raise LabError("No process finished a seed", fix="Raise --limit, or read what the processes printed above")
    found: dict[Key, list[dict]] = {}
    specs: dict[Key, str | None] = {}
    for part in parts:
        specs |= {(name, share): None for name, share in part["unreached"]}
        specs |= {(r["policy"], r["target"]): r["spec"] for r in part["rows"]}
        found |= {key: values for r in part["rows"]
                  if len(values := r["values"]) > len(found.get(key := (r["policy"], r["target"]), []))}
    order = {name: place for place, name in enumerate(["Dense", *side.policies])}
    found = dict(sorted(found.items(), key=lambda x: order[x[0][0]]))
    save(side, options, parts[0]["model"], found, specs, time.time() - began)
    for file in files:
        file.unlink(missing_ok=True)
    return found
