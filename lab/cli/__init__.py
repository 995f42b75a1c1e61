"""The command line: the same verbs on the same engine, also the machine-readable face.

    python -m lab techniques [--json]
    python -m lab run --model default --prompt-file F --variant dense --variant "h2o(budget=0.25)" --json OUT.json
    python -m lab runs list|show ID|compare ID ID|export ID --format parquet|csv|json --out F|import F
    python -m lab calibrate TECHNIQUE --model M --out F
    python -m lab predict --model M --variant "h2o(budget=0.25)" --prompt 32000 --sequences 16 --machine H100
    python -m lab serve --port N            (or python app.py --port N)
"""

from __future__ import annotations

import argparse
import sys

from lab.errors import LabError, out_of_memory


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a variant could not run, 2 the request could not be carried out, 130
    stopped by Ctrl-C."""
    from lab.cli import calibrate, predict, run, runs, serve, techniques

    parser = argparse.ArgumentParser(prog="python -m lab", description="Attention Lab on the command line.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for module in (techniques, run, runs, calibrate, predict, serve):
        module.add(verbs)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the verb's own usage says what it takes
        verbs.choices[args.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    return _carry_out(args, uses_model=args.verb != "runs")


def app(argv: list[str] | None = None) -> int:
    """`python app.py`: what `serve` does, with its options and without the verb."""
    from lab.cli import serve

    parser = argparse.ArgumentParser(prog="python app.py", description="Attention Lab in a browser.")
    serve.options(parser)
    return _carry_out(parser.parse_args(argv), uses_model=True)


def _carry_out(args: argparse.Namespace, uses_model: bool) -> int:
    """Do what was parsed; a failure is a sentence on standard error."""
    from lab.models.environment import check_environment

    try:
        if uses_model:  # before anything imports kernels or transformers
            check_environment()
        return args.act(args) or 0
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if out_of_memory(error):
            error = LabError("The machine ran out of memory", fix="Use a shorter prompt, fewer variants or a smaller model")
        elif type(error).__name__ != "StorageError":
            raise
        print(f"error: {error}", file=sys.stderr)
    return 2
