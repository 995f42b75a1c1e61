"""`calibrate`: learn what a technique needs to know about a model, and keep it in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from lab.cli.run import Say, load_model, model_options
from lab.errors import LabError


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("calibrate", help="learn a technique's values from a model")
    parser.add_argument("technique", help='a name or a spec whose parameters to learn under, such as "moa(density=0.5)"')
    model_options(parser)
    parser.add_argument("--out", type=Path, help="the file to write (default: the name that calibration=auto looks for, here)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="options",
                        help='how to measure, such as steps=500; "zerotuning --set by=labelled" goes by right answers only. '
                             "A wrong name lists the known ones")
    parser.add_argument("--any-revision", action="store_true", help="let the file serve every revision of the model")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    from lab.measure.calibrate import calibrate, default_name

    say, options = Say(args.quiet), pairs(args.options)
    loaded = load_model(args, say)
    found = calibrate(
        args.technique, loaded, say.progress, revision="*" if args.any_revision else None, options=options
    )
    say.clear()
    print(found.save(args.out or Path(default_name(args.technique, loaded))))
    return 0


def pairs(items: list[str]) -> dict[str, str]:
    """{"steps": "500"} of ["steps=500"]. Raises LabError for an item without "="."""
    found = [item.partition("=") for item in items]
    for name, equals, value in found:
        if not (name.strip() and equals and value.strip()):
            raise LabError(f'"{name}" has no value', "Write NAME=VALUE, such as steps=500")
    return {name.strip(): value.strip() for name, _, value in found}
