"""``kvbelt workers``: list, add, drain, remove and restart the workers of a running proxy.

``remove`` and ``drain`` return when no request needs the worker, so that it can be stopped. ``restart`` and ``replace``
are for workers that ``kvbelt up`` has started; each command takes the names that it gave them.
"""

import argparse
from pathlib import Path
from typing import Any

from kvbelt.errors import SettingsError
from kvbelt.ops import control, proxy_client
from kvbelt.ops.arguments import positive_number
from kvbelt.ops.losses import meaning
from kvbelt.ops.parser import add_examples
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.running import RunningDeployment, RunningWorker, deployment_at, running_deployments
from kvbelt.ops.tables import aligned
from kvbelt.security.admin_key import load_admin_key
from kvbelt.wire.workers import NewWorker

_DRAINED = "is drained"

_WORKER = "HOST:PORT, as kvbelt workers list shows it; or its name in kvbelt up, such as decode-0"


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
        changed.add_argument("worker", metavar="WORKER", help=_WORKER)
        changed.add_argument(
            "--role",
            choices=["prefill", "decode"],
            help="needed only if the address is in both (default: the one it is in)",
        )
        if name != "undrain":
            changed.add_argument("--wait", type=positive_number, default=600.0, metavar="SECONDS",
                                 help="how long to wait for its requests")  # fmt: skip
            changed.add_argument("--no-wait", action="store_true", help="return at once")
            _add_force(changed)
        add_examples(
            changed,
            (f"kvbelt workers {name} decode-0", "one of kvbelt up"),
            (f"kvbelt workers {name} 10.0.0.7:7200 --admin-key-file admin.key", "one of another deployment"),
        )
    for name, what, run in (
        ("restart", "start a process of kvbelt up again, also one that has died", _restart),
        ("replace", "drain a worker of kvbelt up, restart it and use it again", _replace),
    ):
        started = verb(name, what, run)
        started.add_argument("worker", metavar="WORKER", help=_WORKER)
        started.add_argument("--wait", type=positive_number, default=600.0, metavar="SECONDS",
                             help="how long to wait for its requests, and for it to be ready")  # fmt: skip
        if name == "replace":
            _add_force(started)
        add_examples(started, (f"kvbelt workers {name} decode-0", what))


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="also the last worker of its role")


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
    client = _asked(args)
    _require_another(client, args.worker, args.role, force=args.force)
    client.remove(args.worker, args.role)
    return _until_idle(client, args, "is gone", "is leaving")


def _drain(args: argparse.Namespace) -> int:
    client = _asked(args)
    _require_another(client, args.worker, args.role, force=args.force)
    client.drain(args.worker, args.role)
    return _until_idle(client, args, _DRAINED, "is draining")


def _until_idle(client: ProxyClient, args: argparse.Namespace, done: str, under_way: str) -> int:
    if args.no_wait:
        print(f"{args.worker} {under_way}")
        return 0
    client.wait_until_idle(args.worker, args.role, args.wait)
    print(f"{args.worker} {done}")
    if done == _DRAINED:
        print(f"kvbelt workers undrain {args.worker} uses it again")
    return 0


def _undrain(args: argparse.Namespace) -> int:
    _asked(args).undrain(args.worker, args.role)
    print(f"{args.worker} takes requests again")
    return 0


def _asked(args: argparse.Namespace) -> ProxyClient:
    """The proxy. A process's name is replaced by its address, which is what the proxy knows."""
    if ":" not in args.worker:
        process = _started(args)[1]
        args.worker, args.role = process.address, args.role or _role(process)
    return ProxyClient.of(args)


def _role(process: RunningWorker) -> str:
    """What it is to the proxy: a server of both roles is a decode worker."""
    return "prefill" if process.role == "prefill" else "decode"


def _restart(args: argparse.Namespace) -> int:
    deployment, process = _started(args)
    _restart_process(deployment, process.name, args.wait)
    print(f"{process.name} is ready")
    return 0


def _replace(args: argparse.Namespace) -> int:
    deployment, process = _started(args)
    if process.role == "proxy":
        raise SettingsError("the proxy cannot be drained and kept; kvbelt workers restart proxy cuts open requests")
    client = ProxyClient(deployment.url, load_admin_key(Path(deployment.admin_key_file)))
    name, role = process.address, _role(process)
    _require_another(client, name, role, force=args.force)
    client.drain(name, role)
    print(f"{process.name} is draining", flush=True)
    try:
        client.wait_until_idle(name, role, args.wait)
        print(f"{process.name} {_DRAINED}; restarting it", flush=True)
        _restart_process(deployment, process.name, args.wait)
    finally:
        client.undrain(name, role)
    print(f"{process.name} is ready and used again")
    return 0


def _restart_process(deployment: RunningDeployment, name: str, seconds: float) -> None:
    from rich.console import Console  # noqa: PLC0415 -- only this command pays for it

    with Console(stderr=True).status(f"{name} is starting"):  # moves on a terminal, and is silent elsewhere
        control.restart(deployment, name, seconds)


def _started(args: argparse.Namespace) -> tuple[RunningDeployment, RunningWorker]:
    """The named process.

    Raises:
        SettingsError: this user runs no deployment there, or it has no such process.
    """
    url = proxy_client.url_of(args)
    found = deployment_at(url)
    if found is None:
        others = ", ".join(one.url for one in running_deployments()) or "none"
        raise SettingsError(
            f"no kvbelt up of this user serves {url} (found: {others}); {args.worker} is not one of its processes"
        )
    process = found.named(args.worker)
    if process is None:
        known = ", ".join(one.name for one in found.processes)
        raise SettingsError(f"there is no {args.worker!r} in the deployment at {found.url}; there are {known}")
    return found, process


def _require_another(client: ProxyClient, name: str, role: str | None, *, force: bool) -> None:
    """Refuse to take the last worker of a role out of use. Raises SettingsError."""
    if force:
        return
    rows = client.workers().workers
    gone = {row.role for row in rows if row.worker == name and role in (None, row.role) and row.standing == "active"}
    for one in gone:
        if not any(r.role == one and r.worker != name and r.standing == "active" and r.state == "ready" for r in rows):
            means = meaning(name, one, []).partition(": ")[2]
            raise SettingsError(f"{name} is the last ready {one} worker: {means}; --force does it all the same")
