"""Workers that DNS names join and leave by themselves."""

import pytest

from kvbelt.http import Pool
from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.proxy.context import Context
from kvbelt.proxy.discovery import Discovery, resolve
from kvbelt.routing.endpoint import Role, Standing
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
        """Who is there."""
        return {worker.address.host for worker in self.fleet.of(role)}


@async_test
async def test_each_address_of_a_name_is_a_worker():
    """And those that come later join."""
    names = Names(prefill=["127.0.0.1"], decode=["127.0.0.1", "127.0.0.2"])
    async with Looking(names, 7) as looking:
        assert looking.hosts(Role.PREFILL) == {"127.0.0.1"}
        assert looking.hosts(Role.DECODE) == {"127.0.0.1", "127.0.0.2"}
        names.addresses["prefill"] = ["127.0.0.1", "127.0.0.3"]
        await looking.discovery.refresh()
        assert looking.hosts(Role.PREFILL) == {"127.0.0.1", "127.0.0.3"}


@async_test
async def test_whoever_is_not_named_any_more_leaves_when_nobody_needs_it():
    """As an operator's removal does."""
    names = Names(prefill=[], decode=["127.0.0.1", "127.0.0.2"])
    async with Looking(names, 7) as looking:
        (needed,) = (worker for worker in looking.fleet if worker.address.host == "127.0.0.2")
        needed.hold()
        names.addresses["decode"] = ["127.0.0.1"]
        await looking.discovery.refresh()
        assert needed.endpoint.standing is Standing.LEAVING
        needed.let_go()
        assert looking.hosts(Role.DECODE) == {"127.0.0.1"}


@async_test
async def test_whoever_was_gone_for_a_moment_stays():
    """If it is named again before it has left."""
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
async def test_no_answer_sends_no_healthy_worker_away():
    """Only those that do not serve, for nobody knows whether they come back."""
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
    """No name need lead to them; nor is a drained one used again."""
    names = Names(prefill=[], decode=["127.0.0.1"])
    async with Looking(names, 7) as looking:
        added = looking.fleet.add(Role.DECODE, Address("127.0.0.8", 7))
        (named,) = (worker for worker in looking.fleet if worker is not added)
        named.stand(Standing.DRAINING)
        await looking.discovery.refresh()
        assert looking.hosts(Role.DECODE) == {"127.0.0.1", "127.0.0.8"}
        assert named.endpoint.standing is Standing.DRAINING


@async_test
async def test_a_name_without_an_address_is_said_once(caplog):
    """Not at each look."""
    names = Names(prefill=OSError("no such name"), decode=["127.0.0.1"])
    async with Looking(names, 7) as looking:
        await looking.discovery.refresh()
        await looking.discovery.refresh()
    assert caplog.text.count("prefill has no address: no such name") == 1


@async_test
async def test_real_names_are_looked_up():
    """By the system's resolver."""
    assert set(await resolve("localhost", 80)) & {"127.0.0.1", "::1"}
    with pytest.raises(OSError, match=r"no-such-host|not known|resolution"):
        await resolve("no-such-host.invalid", 80)


@async_test
async def test_a_proxy_serves_with_workers_that_it_was_told_only_the_names_of():
    """Found, connected, and asked like any others."""
    standins = [Standin("prefill", engine_id="p0"), Standin("decode", engine_id="d0")]
    for standin in standins:
        await standin.start()
    prefill, decode = ((Address("localhost", standin.port),) for standin in standins)
    proxy = Proxy(ProxySettings(prefill=prefill, decode=decode, port=0, discover=True, drain_seconds=0.05, **SETTINGS))
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
