"""Workers that DNS names join and leave by themselves."""

import pytest

from kvbelt.http import Pool
from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.proxy.context import Context
from kvbelt.proxy.workers.discovery import Discovery, resolve
from kvbelt.routing.endpoint import Standing
from kvbelt.routing.placement import Mode
from kvbelt.wire.health import Role
from tests.http.support import async_test, eventually
from tests.proxy.standin import Standin

SETTINGS = {"notification_port": 0, "health_interval_seconds": 0.02, "health_timeout_seconds": 0.2}


class Names:
    """Stands in for DNS: which addresses a name has, or why there is no answer."""

    def __init__(self, **addresses):
        self.addresses = addresses

    async def __call__(self, host, port):
        """The addresses of a name."""
        found = self.addresses[host]
        if isinstance(found, OSError):
            raise found
        return found


class Looking:
    """A fleet that is discovered, with one real stand-in behind each address."""

    def __init__(self, names, port):
        settings = ProxySettings(
            prefill=(Address("prefill", port),), decode=(Address("decode", port),), discover=True, **SETTINGS
        )
        self.context = Context(settings)
        self.fleet = self.context.fleet
        self.discovery = Discovery(self.fleet, settings, names)

    async def __aenter__(self):
        """Start."""
        self.fleet.start()
        await self.discovery.refresh()
        return self

    async def __aexit__(self, *exc):
        """Stop."""
        await self.discovery.close()
        await self.context.warmer.close()
        await self.fleet.close()

    def hosts(self, role):
        """The hosts of the workers of one role."""
        return {worker.address.host for worker in self.fleet.of(role)}


@async_test
async def test_each_address_of_a_name_is_a_worker():
    """Addresses that DNS adds later join."""
    names = Names(prefill=["127.0.0.1"], decode=["127.0.0.1", "127.0.0.2"])
    async with Looking(names, 7) as looking:
        assert looking.hosts(Role.PREFILL) == {"127.0.0.1"}
        assert looking.hosts(Role.DECODE) == {"127.0.0.1", "127.0.0.2"}
        names.addresses["prefill"] = ["127.0.0.1", "127.0.0.3"]
        await looking.discovery.refresh()
        assert looking.hosts(Role.PREFILL) == {"127.0.0.1", "127.0.0.3"}


@async_test
async def test_a_worker_without_an_address_leaves_when_no_request_needs_it():
    """It leaves like a worker that an operator removes."""
    names = Names(prefill=[], decode=["127.0.0.1", "127.0.0.2"])
    async with Looking(names, 7) as looking:
        (needed,) = (worker for worker in looking.fleet if worker.address.host == "127.0.0.2")
        needed.hold()
        names.addresses["decode"] = ["127.0.0.1"]
        await looking.discovery.refresh()
        assert needed.endpoint.standing is Standing.LEAVING
        needed.release()
        assert looking.hosts(Role.DECODE) == {"127.0.0.1"}


@async_test
async def test_a_worker_whose_address_was_missing_for_a_moment_stays():
    """A leaving worker is active again if DNS names it before it has left."""
    names = Names(prefill=[], decode=["127.0.0.1"])
    async with Looking(names, 7) as looking:
        (worker,) = looking.fleet
        worker.hold()
        names.addresses["decode"] = []
        await looking.discovery.refresh()
        names.addresses["decode"] = ["127.0.0.1"]
        await looking.discovery.refresh()
        assert worker.endpoint.standing is Standing.ACTIVE


@async_test
async def test_without_an_answer_no_healthy_worker_leaves():
    """If DNS fails, only lost workers leave."""
    standin = Standin("decode", engine_id="d0")
    await standin.start()
    names = Names(prefill=[], decode=["127.0.0.1", "127.0.0.9"])
    try:
        async with Looking(names, standin.port) as looking:
            healthy, gone = sorted(looking.fleet.of(Role.DECODE), key=lambda one: one.name)
            await eventually(lambda: healthy.healthy and gone.lost)
            names.addresses["decode"] = OSError("DNS is down")
            await looking.discovery.refresh()
            assert looking.hosts(Role.DECODE) == {"127.0.0.1"}
            assert healthy.endpoint.standing is Standing.ACTIVE
    finally:
        await standin.stop()


@async_test
async def test_an_operators_workers_are_left_alone():
    """A worker that DNS does not name stays if an operator added it. A drained worker stays drained."""
    names = Names(prefill=[], decode=["127.0.0.1"])
    async with Looking(names, 7) as looking:
        added = looking.fleet.add(Role.DECODE, Address("127.0.0.8", 7))
        (named,) = (worker for worker in looking.fleet if worker is not added)
        named.set_standing(Standing.DRAINING)
        await looking.discovery.refresh()
        assert looking.hosts(Role.DECODE) == {"127.0.0.1", "127.0.0.8"}
        assert named.endpoint.standing is Standing.DRAINING


@async_test
async def test_a_name_without_an_address_is_logged_once(caplog):
    names = Names(prefill=OSError("no such name"), decode=["127.0.0.1"])
    async with Looking(names, 7) as looking:
        await looking.discovery.refresh()
        await looking.discovery.refresh()
    assert caplog.text.count("prefill has no address: no such name") == 1


@async_test
async def test_real_names_are_looked_up():
    """The system's resolver finds a name or raises OSError."""
    assert set(await resolve("localhost", 80)) & {"127.0.0.1", "::1"}
    with pytest.raises(OSError, match=r"no-such-host|not known|resolution"):
        await resolve("no-such-host.invalid", 80)


@async_test
async def test_a_proxy_serves_with_workers_that_it_has_only_names_of():
    """It finds and connects them, and sends them requests."""
    standins = [Standin("prefill", engine_id="p0"), Standin("decode", engine_id="d0")]
    for standin in standins:
        await standin.start()
    prefill, decode = ((Address("localhost", standin.port),) for standin in standins)
    more = {"discover": True, "drain_seconds": 0.05, "placement": Mode.SPLIT} | SETTINGS
    proxy = Proxy(ProxySettings(prefill=prefill, decode=decode, port=0, **more))
    await proxy.start()
    pool = Pool("127.0.0.1", proxy.port)
    try:
        await proxy.workers_asked()
        body = b'{"prompt": "hello", "max_tokens": 4, "temperature": 0}'
        response = await pool.request("POST", "/v1/completions", ((b"content-type", b"application/json"),), body)
        await response.read(1 << 20)
        assert (response.status, response.headers[b"x-kvbelt-path"]) == (200, b"first-token")
    finally:
        pool.close()
        await proxy.close()
        for standin in standins:
            await standin.stop()
