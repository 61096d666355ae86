"""``kvbelt workers``: who serves behind a running proxy; workers join, are drained, and leave.

``remove`` and ``drain`` return once nobody needs the worker any more, so that it may be stopped then.
"""

import argparse
import json
from typing import Any

from kvbelt.errors import SettingsError
from kvbelt.ops import proxy_client
from kvbelt.ops.admin_client import AdminClient
from kvbelt.ops.arguments import positive_number


def add_arguments(parser: argparse.ArgumentParser, make_parser: type[argparse.ArgumentParser]) -> None:
    """Everything that ``kvbelt workers`` takes."""
    proxy_client.add_arguments(parser, "--proxy")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=make_parser)

    def verb(name: str, what: str, run: Any) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=what)
        made.set_defaults(run=run, parser=made)
        return made

    shown = verb("list", "all workers, and pairs that cannot exchange KV", _list)
    shown.add_argument("--json", action="store_true", help="as the proxy says it")
    joins = verb("add", "a worker joins; it must be running", _add)
    joins.add_argument("role", choices=["prefill", "decode"])
    joins.add_argument("worker", metavar="HOST:PORT")
    for name, what, run in (
        ("remove", "a worker leaves, once nobody needs it", _remove),
        ("drain", "a worker gets nothing new, and finishes what it has", _drain),
        ("undrain", "a drained worker is used again", _undrain),
    ):
        changed = verb(name, what, run)
        changed.add_argument("worker", metavar="HOST:PORT")
        changed.add_argument("--role", choices=["prefill", "decode"], help="where one address is both")
        if name != "undrain":
            changed.add_argument("--wait", type=positive_number, default=600.0, metavar="SECONDS",
                                 help="for requests that need it (default: 600)")  # fmt: skip
            changed.add_argument("--no-wait", action="store_true", help="return at once")


def _client(args: argparse.Namespace) -> AdminClient:
    proxy = proxy_client.client_of(args)
    return AdminClient(proxy.url, proxy.key)


def _list(args: argparse.Namespace) -> int:
    found = AdminClient(args.url).workers()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("WORKER", "ROLE", "STATE", "REQUESTS", "MODEL", "")]
    rows += [
        (w["worker"], w["role"], _state(w), str(w["in_flight"]), w["model"] or "-", w["detail"])
        for w in found["workers"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
    for pair in found["pairs"]:
        if pair["reason"]:
            print(f"{pair['prefill']} cannot send to {pair['decode']}: {pair['reason']}: {pair['detail']}".rstrip(": "))
    return 0


def _state(worker: dict[str, Any]) -> str:
    if worker["standing"] != "active":
        return str(worker["standing"])
    return "warming" if worker["warming"] else str(worker["state"])


def _add(args: argparse.Namespace) -> int:
    host, _, port = args.worker.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"{args.worker} is not a worker's address; say HOST:PORT")
    added = _client(args).add(args.role, host.strip("[]"), int(port))
    print(f"{added['worker']} has joined as a {added['role']} worker; it is {added['state']}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    client = _client(args)
    client.remove(args.worker, args.role)
    return _until_idle(client, args, "is gone", "is leaving")


def _drain(args: argparse.Namespace) -> int:
    client = _client(args)
    client.drain(args.worker, args.role)
    return _until_idle(client, args, "is drained", "is draining")


def _until_idle(client: AdminClient, args: argparse.Namespace, done: str, under_way: str) -> int:
    if args.no_wait:
        print(f"{args.worker} {under_way}")
        return 0
    client.wait_until_idle(args.worker, args.role, args.wait)
    print(f"{args.worker} {done}")
    return 0


def _undrain(args: argparse.Namespace) -> int:
    _client(args).undrain(args.worker, args.role)
    print(f"{args.worker} takes requests again")
    return 0
