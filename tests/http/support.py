"""Sockets and waiting, for tests of servers and clients."""

import asyncio
import functools
import itertools
import os
import random
from collections.abc import Iterator

import uvloop

from kvbelt.http import Server
from kvbelt.ops.ports import bind_problem

SECONDS = 60.0  # how long anything may take before a test gives up, on a machine that does much else


def async_test(test):
    """Run a coroutine test on uvloop, within a limit. ``functools.wraps`` keeps its signature for pytest."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def limited():
            async with asyncio.timeout(2 * SECONDS):
                await test(*args, **kwargs)

        uvloop.run(limited())

    return run


async def eventually(condition):
    """Wait until a condition holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - conditions of other parties have no event
            await asyncio.sleep(0.005)


class Running:
    """A server inside a ``with`` block."""

    def __init__(self, handler, **kwargs):
        self.server = Server(handler, **kwargs)
        self.port = 0

    async def __aenter__(self):
        """Begin."""
        self.port = await self.server.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc):
        """End."""
        await self.server.close(0.1)


class Raw:
    """A client that sends raw bytes."""

    def __init__(self, port):
        self._port = port

    async def __aenter__(self):
        """Begin."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc):
        """End."""
        self.writer.transport.abort()

    def send(self, data):
        """Write."""
        self.writer.write(data)

    async def until_closed(self):
        """Everything that the peer sends."""
        return await asyncio.wait_for(self.reader.read(), SECONDS)

    async def until(self, marker):
        """What the peer sends up to a marker."""
        return await asyncio.wait_for(self.reader.readuntil(marker), SECONDS)


async def echo(exchange):
    """A handler that echoes its request."""
    request = exchange.request
    said = f"{request.method} {request.target} ".encode() + request.body
    exchange.respond(200, ((b"content-type", b"text/plain"),), said)


#: Above the ports that the system gives to connections and to listeners on any port. Each process of the tests
#: (pytest-xdist) has some of its own, so that a port stays free between two incarnations of its listener.
_PORTS = 61_000
_PORTS_EACH = 1000


def _own_ports() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    first = random.randrange(_PORTS_EACH)
    for number in itertools.count(first):
        yield _PORTS + worker * _PORTS_EACH + number % _PORTS_EACH


_own = _own_ports()


def free_port() -> int:
    """A free port that no other process takes and that the last thousand calls did not return."""
    return next(port for port in _own if bind_problem("127.0.0.1", port) is None)
