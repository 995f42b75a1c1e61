"""`run`: generate side by side, measure, save."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.errors import LabError

EXITS = ("exit status: 0 every variant ran, 1 a variant could not run (the others are saved, as a partial run), 2 nothing "
         "ran or its result could not be written, 130 stopped by Ctrl-C (what was written so far is saved)")
ENDS = {
    "partial": "partial: a variant could not run, the others did",
    "failed": "failed: no variant could run",
    "cancelled": "cancelled: stopped by hand, and what was written until then is kept",
    "interrupted": "interrupted: the lab ended before this run did, and what was kept last is here, with the figures until then",
}
EXIT_OF = {"complete": 0, "partial": 1, "failed": 1, "cancelled": 130}


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("run", help="run variants on a prompt and compare them", epilog=EXITS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the prompt")
    source.add_argument("--prompt-file", type=Path, help="a UTF-8 text file with the prompt; - reads standard input")
    parser.add_argument("--variant", action="append", default=[], metavar="SPEC",
                        help='"dense" or techniques such as "h2o(budget=0.25)+kivi(bits=2)"; the first is the reference')
    model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1,
                        help="continuations per variant; they share the prompt's entries in memory until a technique changes "
                             "them")
    parser.add_argument("--timing", choices=("interleaved", "clean"), default="interleaved")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--truncate", action="store_true", help="cut a prompt that does not fit, from the front")
    parser.add_argument("--no-fidelity", action="store_true", help="skip the teacher-forced comparison")
    parser.add_argument("--name", default="", help="a name for the saved run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the run record here; - prints it")
    parser.add_argument("--db", type=Path, help="the database to save into (default: the lab's own)")
    parser.add_argument("--no-save", action="store_true", help="do not save the run")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(act=act)


def model_options(parser: argparse.ArgumentParser) -> None:
    """The options every verb that loads a model shares."""
    parser.add_argument("--model", default="default", help="default, a hub id, a folder, or a .gguf file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..., or all: spread over every GPU")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--weights", default="auto", choices=("auto", "float32", "bfloat16", "int8", "int4"),
                        help="how linear weights are held on a CPU")


def act(args: argparse.Namespace) -> int:
    from storage import StorageError

    from lab.engine.sampling import Sampling
    from lab.measure.experiment import Experiment
    from lab.measure.request import RunRequest

    request = RunRequest(
        prompt=read_prompt(args), variants=tuple(args.variant or ["dense"]), max_new_tokens=args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed), timing=args.timing,
        samples=args.samples, fidelity=not args.no_fidelity, chat=args.chat, truncate=args.truncate, name=args.name,
    )
    say = Say(quiet=args.quiet)
    loaded = load_model(args, say)
    experiment = Experiment(loaded, request)
    store = None if args.no_save else open_store(args.db)
    unsaved: StorageError | None = None
    try:
        if store is not None:
            store.begin(experiment.record)
        run(experiment, say, None if store is None else store.checkpoint)
        if store is not None:
            try:
                store.save(experiment.record, experiment.arrays)
            except StorageError as problem:  # what was generated is still written and printed
                unsaved = problem
    finally:
        if store is not None:
            store.close()
    if args.json is not None:
        write_json(experiment.record, args.json)
    if not args.quiet:
        table(experiment.record, sys.stderr if args.json == Path("-") else sys.stdout)
    if unsaved is not None:
        raise unsaved
    return EXIT_OF[experiment.record["status"]]


def open_store(path: Path | None) -> Any:
    """The store at `path`, which is used or refused. The lab's own file, where it cannot be used, does not cost the run: that is
    told, and the answer is None."""
    from storage import StorageError, Store

    try:
        return Store.open(path)
    except StorageError as problem:
        if path is not None:
            raise
        print(f"{problem} This run is not saved; --json FILE keeps it.", file=sys.stderr)  # quiet is about progress
        return None


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text. Raises LabError for a file that cannot be read as text."""
    if args.prompt is not None:
        return args.prompt
    typed = str(args.prompt_file) == "-"
    try:
        data = sys.stdin.buffer.read() if typed else args.prompt_file.read_bytes()
    except OSError as error:
        raise LabError(f"The prompt file {args.prompt_file} cannot be read ({error.strerror})", "Give a text file") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # line ends as Python reads any text file
    except UnicodeDecodeError:
        what = "Standard input" if typed else f"The prompt file {args.prompt_file}"
        raise LabError(f"{what} is not UTF-8 text", "Give text in UTF-8") from None


def load_model(args: argparse.Namespace, say: "Say") -> Any:
    from lab.models import load

    loaded = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights,
                  progress=lambda fraction, text: say.progress(fraction, text))
    say.clear()
    return loaded


def run(experiment: Any, say: "Say", checkpoint: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Drive an experiment to its end; Ctrl-C stops it within a step and keeps what there is, and what a killed run had
    so far is what `checkpoint` was given last."""
    from lab.engine.events import Failed, Progress, Token
    from lab.measure.keeping import kept

    total = experiment.request.max_new_tokens
    walk = experiment.events() if checkpoint is None else kept(experiment, checkpoint)
    with _first_interrupt(experiment.cancel):
        for event in walk:
            if isinstance(event, Progress):
                say.progress(event.fraction, event.text)
            elif isinstance(event, Token):
                say.progress((event.index + 1) / total, f"token {event.index + 1} of {total}")
            elif isinstance(event, Failed):
                say.clear()
                print(event.message, file=sys.stderr)  # quiet is about progress
    say.clear()


@contextmanager
def _first_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `cancel`, which lets the step finish; a second one interrupts as always."""
    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may say what signals do
        yield
        return
    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write the record as JSON; a file appears whole or not at all, a device or a pipe is written to."""
    text = json.dumps(record, ensure_ascii=False, indent=1)
    if str(path) == "-":
        print(text)
        return
    from storage.whole import appears_whole

    try:
        with appears_whole(path, ".json") as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LabError(f"{path} cannot be written ({error.strerror})", "Give a path in a folder you may write to") from None


def table(record: dict[str, Any], out) -> None:
    """The figures of a run as text; an imported record may lack any of them."""
    from lab.measure.told import sentences

    model = record.get("model") or {}
    weights = f"{model['weights']} weights" if model.get("weights") else None
    print(" · ".join(filter(None, [f"run {record['run_id']}", model.get("id"), weights, record.get("device")])), file=out)
    if record["status"] in ENDS:
        print(ENDS[record["status"]], file=out)
    head = f"{'':2} {'variant':<36} {'TTFT':>9} {'per token':>10} {'KV':>10} {'ratio':>6} {'kept':>6} {'read':>6} "
    head += f"{'agree':>6} {'KL':>7} {'fork':>5}"
    print(head, file=out)
    for v in record["variants"]:
        if v.get("error"):
            print(f"{v['letter']:2} {v['spec']:<36.36} {v['error']}", file=out)
            continue
        size, dense = v.get("kv_bytes"), v.get("kv_bytes_dense")
        ratio = size / dense if size is not None and dense else None
        reads = v.get("reads")
        read = reads["attend"] + reads["choose"] if reads else None
        cells = [
            _number(v.get("ttft_ms"), "{:.0f} ms"), _number(v.get("tpot_ms"), "{:.1f} ms"),
            _number(size and size / 2**20, "{:.2f} MiB"), _number(ratio, "{:.2f}x"),
            _number(v.get("kept_fraction"), "{:.0%}"), _number(read, "{:.0%}"),
            _number(v.get("top1_agreement"), "{:.2f}"), _number(v.get("kl_mean"), "{:.3f}"),
            _number(v.get("first_divergence"), "{}"),
        ]
        widths = (9, 10, 10, 6, 6, 6, 6, 7, 5)
        print(f"{v['letter']:2} {v['spec']:<36.36} " + " ".join(f"{c:>{w}}" for c, w in zip(cells, widths)), file=out)
    for v in record["variants"]:
        for sentence in [] if v.get("error") else sentences(v):
            print(f"{v['letter']:2} {sentence}", file=out)


def _number(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


class Say:
    """Progress on standard error: one line that is rewritten on a terminal, nothing when quiet or not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.live = not quiet and sys.stderr.isatty()

    def progress(self, fraction: float, text: str) -> None:
        if self.live:
            print(f"\r\x1b[K{fraction:4.0%} {text[:100]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
