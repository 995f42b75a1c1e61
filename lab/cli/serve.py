"""`serve`: the browser app."""

from __future__ import annotations

import argparse
from pathlib import Path

from lab.cli.run import model_options


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("serve", help="open the lab in a browser")
    parser.add_argument("--port", type=int, default=None, help="default: the first free port from 7860")
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--db", type=Path, default=None, help="the database (default: the lab's own)")
    parser.add_argument("--open", action="store_true", help="open the browser")
    model_options(parser)
    parser.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    from lab.ui.app import serve

    serve(port=args.port, host=args.host, db=args.db, model=args.model, device=args.device, dtype=args.dtype,
          weights=args.weights, open_browser=args.open)
    return 0
