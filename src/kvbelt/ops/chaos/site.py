"""A deployment as its clients and neighbours see it: who listens where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbelt.errors import StartError
from kvbelt.ops.chaos.client import Address, get
from kvbelt.ops.chaos.faults import Whom
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.probe import reachable

#: What the proxy tells of its last requests.
RECORDS = "/kvbelt/requests"


@dataclass(frozen=True, slots=True)
class Site:
    """Workers by name; the proxy's HTTP port, and where it takes notifications (None: nobody tells)."""

    proxy: Address
    notify: Address | None
    workers: Mapping[str, Address]
    admin_key: str | None = None  #: with which the proxy shows its records

    def of_role(self, role: Whom) -> list[str]:
        """Names of the workers of a role, or of everybody."""
        if role is Whom.ANY:
            return ["proxy", *self.workers]
        return [name for name in self.workers if name.startswith(role)]

    def address(self, name: str) -> Address:
        """A process's HTTP port."""
        return self.proxy if name == "proxy" else self.workers[name]


def site_of(deployment: Deployment) -> Site:
    """Of one that runs here."""
    assert deployment.ports is not None
    proxy = deployment.process("proxy")
    return Site(
        Address(reachable(proxy.host), proxy.port),
        Address(deployment.spec.notify_host, deployment.ports.notify),
        {worker.name: Address(worker.host, worker.port) for worker in deployment.workers},
    )


async def site_at(proxy: Address, admin_key: str | None = None) -> Site:
    """Of one that somebody else has started, as its proxy tells it.

    Raises:
        StartError: nobody answers there, or no proxy of ours, or it does not show its records.
    """
    raw = await get(proxy, "/health")
    try:
        body: dict[str, Any] = json.loads(raw or b"")
        numbers: dict[str, int] = {}
        workers = {}
        for worker in body["workers"]:
            number = numbers[worker["role"]] = numbers.get(worker["role"], -1) + 1
            host, _, port = worker["worker"].rpartition(":")
            workers[f"{worker['role']}-{number}"] = Address(host, int(port))
        port = body.get("notifications", {}).get("port")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StartError(f"there is no kvbelt proxy at http://{proxy}; give the address of one that runs") from None
    if await get(proxy, RECORDS, key=admin_key) is None:
        # Who took part in which request stands nowhere else.
        given = "does not take this admin key" if admin_key is not None else "wants its admin key (--admin-key-file)"
        raise StartError(f"the proxy at http://{proxy} does not show its records: it {given}")
    return Site(proxy, Address(proxy.host, port) if port else None, workers, admin_key)
