"""``kvbelt workers``: list, add, drain and remove the workers of a running proxy.

``remove`` and ``drain`` return when no request needs the worker, so that it can be stopped.
"""

import argparse
from typing import Any

from kvbelt.errors import SettingsError
from kvbelt.ops import proxy_client
from kvbelt.ops.arguments import positive_number
from kvbelt.ops.parser import add_examples
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.tables import aligned
from kvbelt.wire.workers import NewWorker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    proxy_client.add_arguments(parser)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, what: str, run: Any) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=what)
        proxy_client.add_arguments(made, again=True)
        made.set_defaults(run=run, parser=made)
        return made

    shown = verb("list", "list all workers, and pairs that cannot exchange KV", _list)
    shown.add_argument("--json", action="store_true", help="print the proxy's JSON")
    joins = verb("add", "add a running worker", _add)
    joins.add_argument("role", choices=["prefill", "decode"], help="what it does here")
    joins.add_argument("worker", metavar="HOST:PORT", help="where it listens")
    add_examples(shown, ("kvbelt workers list", "the workers of the proxy on this host"))
    add_examples(joins, ("kvbelt workers --admin-key-file admin.key add decode 10.0.0.7:7200", "use one more"))
    for name, what, run in (
        ("remove", "remove a worker once no request needs it", _remove),
        ("drain", "give a worker no new requests and let it finish", _drain),
        ("undrain", "use a drained worker again", _undrain),
    ):
        changed = verb(name, what, run)
        changed.add_argument("worker", metavar="HOST:PORT", help="its name in kvbelt workers list")
        changed.add_argument(
            "--role",
            choices=["prefill", "decode"],
            help="needed only if the address is in both (default: the one it is in)",
        )
        if name != "undrain":
            changed.add_argument("--wait", type=positive_number, default=600.0, metavar="SECONDS",
                                 help="how long to wait for its requests")  # fmt: skip
            changed.add_argument("--no-wait", action="store_true", help="return at once")
        add_examples(changed, (f"kvbelt workers --admin-key-file admin.key {name} 10.0.0.7:7200", what))


def _list(args: argparse.Namespace) -> int:
    proxy = ProxyClient.of(args)
    if args.json:
        print(proxy.pretty(proxy_client.WORKERS))
        return 0
    found = proxy.workers()
    rows = [("WORKER", "ROLE", "STATE", "REQUESTS", "MODEL", "")]
    rows += [(w.worker, w.role, w.shown_state, str(w.in_flight), w.model or "-", w.detail) for w in found.workers]
    print("\n".join(aligned(rows)))
    for pair in found.pairs:
        if pair.reason:
            print(f"{pair.prefill} cannot send to {pair.decode}: {pair.reason}: {pair.detail}".rstrip(": "))
    return 0


def _add(args: argparse.Namespace) -> int:
    host, _, port = args.worker.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"{args.worker} is not a worker's address; say HOST:PORT")
    added = ProxyClient.of(args).add(NewWorker(args.role, host.strip("[]"), int(port)))
    print(f"{added.worker} is now a {added.role} worker; its state is {added.state}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    client = ProxyClient.of(args)
    client.remove(args.worker, args.role)
    return _until_idle(client, args, "is gone", "is leaving")


def _drain(args: argparse.Namespace) -> int:
    client = ProxyClient.of(args)
    client.drain(args.worker, args.role)
    return _until_idle(client, args, "is drained", "is draining")


def _until_idle(client: ProxyClient, args: argparse.Namespace, done: str, under_way: str) -> int:
    if args.no_wait:
        print(f"{args.worker} {under_way}")
        return 0
    client.wait_until_idle(args.worker, args.role, args.wait)
    print(f"{args.worker} {done}")
    return 0


def _undrain(args: argparse.Namespace) -> int:
    ProxyClient.of(args).undrain(args.worker, args.role)
    print(f"{args.worker} takes requests again")
    return 0
