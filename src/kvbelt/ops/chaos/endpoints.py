"""The addresses of a deployment's processes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvbelt.errors import StartError
from kvbelt.ops.chaos.faults import TargetRole
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.http_client import Address, Client, NoAnswerError, UnreadableReplyError, get, reachable
from kvbelt.wire.health import PROXY_HEALTH
from kvbelt.wire.request_record import REQUEST_LIST

#: The proxy's last requests.
RECORDS = "/kvbelt/requests"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """HTTP addresses of proxy and workers by name, and where the proxy takes notifications."""

    proxy: Address
    notify: Address | None
    workers: Mapping[str, Address]
    admin_key: str | None = None  #: the proxy shows its records with it

    def of_role(self, role: TargetRole) -> list[str]:
        """Names of a role's processes."""
        if role is TargetRole.ANY:
            return ["proxy", *self.workers]
        return [name for name in self.workers if name.startswith(role)]

    def address(self, name: str) -> Address:
        return self.proxy if name == "proxy" else self.workers[name]


def endpoints_of(deployment: Deployment) -> Endpoints:
    assert deployment.ports is not None
    proxy = deployment.process("proxy")
    return Endpoints(
        Address(reachable(proxy.host), proxy.port),
        Address(deployment.spec.notify_host, deployment.ports.notify),
        {worker.name: Address(worker.host, worker.port) for worker in deployment.workers},
    )


async def discover_endpoints(proxy: Address, admin_key: str | None = None) -> Endpoints:
    """Of a running deployment, from its proxy's ``/health``.

    Raises:
        StartError: no kvbelt proxy answers there, or it does not show its records.
    """
    try:
        with Client(proxy) as client:
            health = (await client.get("/health")).read(PROXY_HEALTH, "the server")
    except (NoAnswerError, UnreadableReplyError) as error:
        raise StartError(f"there is no kvbelt proxy at http://{proxy}: {error}; give the address of one") from None
    numbers: Counter[str] = Counter()
    workers = {}
    for row in health.workers:
        workers[f"{row.role}-{numbers[row.role]}"] = Address.of_worker(row.worker)
        numbers[row.role] += 1
    records = await get(proxy, RECORDS, key=admin_key)
    if records is None or records.status != 200:
        # Only the records tell which workers took part in a request.
        given = "does not take this admin key" if admin_key is not None else "wants its admin key (--admin-key-file)"
        raise StartError(f"the proxy at http://{proxy} does not show its records: it {given}")
    records.read(REQUEST_LIST, f"the proxy at http://{proxy}")  # fail before the load, not during it
    return Endpoints(proxy, Address(proxy.host, health.notifications.port), workers, admin_key)
