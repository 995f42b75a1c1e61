"""`serve`: the browser app."""

from __future__ import annotations

import argparse
import errno
import socket
from pathlib import Path

from lab.cli.run import model_options
from lab.errors import LabError


def add(verbs: argparse._SubParsersAction) -> None:
    options(verbs.add_parser("serve", help="open the lab in a browser"))


def options(parser: argparse.ArgumentParser) -> None:
    """What can be said of the app, to `python -m lab serve` and to `python app.py` alike."""
    parser.add_argument("--port", type=int, default=None, help="default: the first free port from 7860")
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--db", type=Path, default=None, help="the database (default: the lab's own)")
    parser.add_argument("--open", action="store_true", help="open the browser")
    model_options(parser)
    parser.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    check_address(args.host, args.port)  # before anything is loaded
    from lab.ui.app import serve

    serve(port=args.port, host=args.host, db=args.db, model=args.model, device=args.device, dtype=args.dtype,
          weights=args.weights, open_browser=args.open)
    return 0


def check_address(host: str | None, port: int | None) -> None:
    """Raises LabError for a port or an address that this machine cannot listen on now. None: any port, this machine only."""
    if port is not None and not 1 <= port <= 65535:
        raise LabError(f"{port} is no port", "A port is a whole number from 1 to 65535")
    try:
        place = socket.getaddrinfo((host or "127.0.0.1").strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(place[0], place[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place[4])
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise LabError(f"Port {port} is in use, perhaps by another Attention Lab",
                           fix="Give another one with --port, or none: then the first free port from 7860 is taken") from None
        if problem.errno in (errno.EACCES, errno.EPERM):
            raise LabError(f"This user may not listen on port {port}", fix="Give one from 1024, such as --port 7860") from None
        raise LabError(f"{host} is no address of this machine",
                       "It listens on one of its own: 127.0.0.1 for itself, 0.0.0.0 for the network") from None
