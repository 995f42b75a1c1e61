"""`runs`: find, show, compare, export and import saved runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

from lab.cli.run import table, write_json
from lab.errors import LabError


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("runs", help="list, show, compare, export and import saved runs")
    parser.add_argument("--db", type=Path, help="the database (default: the lab's own)")
    acts = parser.add_subparsers(dest="what", required=True, metavar="list|show|compare|export|import|rename|tag|delete|undelete")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--db", type=Path, default=argparse.SUPPRESS, help="the database (default: the lab's own)")

    def verb(name: str, act: Callable, help: str, reads: bool = False) -> argparse.ArgumentParser:
        sub = acts.add_parser(name, help=help, parents=[shared])
        sub.set_defaults(act=lambda args: _with_store(args, act, reads))
        return sub

    sub = verb("list", _list, "list runs, newest first", reads=True)
    sub.add_argument("--search", help="words that must occur")
    sub.add_argument("--limit", type=int, default=50)
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = verb("show", _show, "show one run", reads=True)
    sub.add_argument("id")
    sub.add_argument("--json", nargs="?", const=Path("-"), type=Path, metavar="OUT", help="the whole record as JSON")
    sub = verb("compare", _compare, "compare up to ten runs", reads=True)
    sub.add_argument("id", nargs="+")
    sub.add_argument("--all", action="store_true", help="also fields that agree")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = verb("export", _export, "write runs to a file", reads=True)
    sub.add_argument("id", nargs="+")
    sub.add_argument("--format", choices=("parquet", "csv", "json"))
    sub.add_argument("--out", type=Path, required=True)
    sub = verb("import", _import, "add the runs of an exported file")
    sub.add_argument("file", type=Path)
    sub = verb("rename", lambda store, args: store.rename(args.id, args.name), "give a run a name")
    sub.add_argument("id")
    sub.add_argument("name")
    sub = verb("tag", lambda store, args: print(" ".join(store.tag(args.id, args.tags))), "set a run's tags")
    sub.add_argument("id")
    sub.add_argument("tags", nargs="*")
    sub = verb("delete", lambda store, args: print(f"deleted {store.delete(args.id)}"), "delete runs (undelete brings them back)")
    sub.add_argument("id", nargs="+")
    sub = verb("undelete", lambda store, args: print(f"restored {store.undelete(args.id)}"), "bring deleted runs back")
    sub.add_argument("id", nargs="+")


def _with_store(args: argparse.Namespace, act: Callable, reads: bool) -> int:
    """Run `act` on the store; verbs that only read look at a copy of a file that is held by the app or may not be written."""
    from storage import Store, StorageError

    if reads and args.db is not None and not args.db.exists():
        raise LabError(f"There is no file {args.db}", "Expected a database that runs were saved into", "Check the name")
    try:
        store = Store.open(args.db)
    except StorageError as error:
        if not reads or error.reason not in ("locked", "denied"):
            raise
        store = Store.open_snapshot(args.db)
        print(store.notice, file=sys.stderr)
    with store:
        act(store, args)
    return 0


def _list(store: Any, args: argparse.Namespace) -> None:
    rows = store.list(search=args.search, limit=args.limit)
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1, default=str))
        return
    if not rows:
        print('No runs yet. Make one: python -m lab run --prompt "..." --variant dense --variant h2o')
    for row in rows:
        about = " ".join((row["name"] or row["prompt"] or "").split())  # a line each
        print(f"{row['run_id']}  {row['status']:<11} {about:<32.32}  {'  |  '.join(row['specs'])}")


def _show(store: Any, args: argparse.Namespace) -> None:
    record, _ = store.get(args.id)
    if args.json is not None:
        write_json(record, args.json)
        return
    table(record, None)
    for v in record["variants"]:
        print(f"\n[{v['letter']}] {v['spec']}\n{v.get('text') or ''}")


def _compare(store: Any, args: argparse.Namespace) -> None:
    found = store.compare(args.id, only_differences=not args.all)
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1, default=str))
        return
    print(f"{'':<34} " + " ".join(f"{i:<22.22}" for i in args.id))
    for row in found["rows"]:
        values = " ".join(f"{_short(v):<22.22}" for v in row["values"])
        print(f"{row['field']:<34.34} {values}")
    if not found["rows"]:
        print("These runs do not differ in anything that is compared.")


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _export(store: Any, args: argparse.Namespace) -> None:
    print(store.export(args.id, args.out, args.format))


def _import(store: Any, args: argparse.Namespace) -> None:
    ids = store.import_(args.file)
    print(f"imported {len(ids)}: {' '.join(ids)}")
