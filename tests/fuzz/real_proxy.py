"""A real proxy in this process before real workers, and bytes that are sent to it over TCP.

The bytes may hold ``content-length: @@``; the length of what follows the head is put there, so that a changed body
stays a body.
"""

import asyncio
import re
from collections.abc import Sequence
from random import Random
from typing import Any

import uvloop

from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.routing.placement import Mode

#: Seconds for an answer. The workers' models are tiny, but may share a core with much else.
ANSWER_SECONDS = 60.0
LENGTH = b"@@"

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)
#: What a proxy with well workers may say: a transfer coding that it does not know, and a deadline of the client's.
_FIVES = {b"501", b"504"}


def completed(data: bytes) -> bytes:
    """With the length of the body, where one is to be put in."""
    at = data.find(LENGTH)
    end = _HEAD_END.search(data, at) if at >= 0 else None
    return data if end is None else data[:at] + b"%d" % (len(data) - end.end()) + data[at + len(LENGTH) :]


def check(answer: bytes) -> None:
    """Raises AssertionError: it is no HTTP, or says that a server has failed."""
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:100]
    failed = [status for status in _STATUS.findall(answer) if status >= b"500" and status not in _FIVES]
    assert not failed, answer[:2000]


class RealProxy:
    """Called with bytes it sends them, waits for the answers, and raises AssertionError where one is wrong."""

    def __init__(self, prefill: Sequence[Address], decode: Sequence[Address]) -> None:
        self._loop = uvloop.new_event_loop()
        settings = ProxySettings(
            prefill=tuple(prefill), decode=tuple(decode), port=0, notification_port=0, placement=Mode.SPLIT,
            request_lines_per_second=0,
        )  # fmt: skip
        self._faults: list[Any] = []
        self._loop.set_exception_handler(lambda _, context: self._faults.append(context))
        self._proxy = self._run(self._started(settings))

    def __call__(self, data: bytes) -> None:
        self._run(self._send(completed(data)))
        assert not self._faults, self._faults

    def close(self) -> None:
        self._run(self._proxy.close())
        self._loop.close()

    def _run(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    @staticmethod
    async def _started(settings: ProxySettings) -> Proxy:
        proxy = Proxy(settings)
        await proxy.start()
        await proxy.workers_asked()
        return proxy

    async def _send(self, data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._proxy.port)
        at = Random(len(data)).randrange(len(data) + 1)
        for piece in (data[:at], data[at:]):
            writer.write(piece)
            await asyncio.sleep(0)
        reading = asyncio.ensure_future(_piece(reader))
        answer = b""
        async with asyncio.timeout(ANSWER_SECONDS):
            while not reading.done() or reading.result():
                if reading.done():
                    answer += reading.result()
                    reading = asyncio.ensure_future(_piece(reader))
                elif not self._busy():
                    # What is here has been answered, or the rest of a request is waited for.
                    if (await asyncio.wait({reading}, timeout=0.002))[0] or self._busy():
                        continue
                    break
                else:
                    await asyncio.wait({reading}, timeout=0.05)
        reading.cancel()
        writer.transport.abort()
        check(answer)
        async with asyncio.timeout(ANSWER_SECONDS):
            while self._proxy.context.records.open:  # noqa: ASYNC110 - a request of a client that is gone ends at once
                await asyncio.sleep(0.001)

    def _busy(self) -> bool:
        return any(connection.busy for connection in self._proxy._server._connections)


async def _piece(reader: asyncio.StreamReader) -> bytes:
    """Empty: the connection has ended. What is sent behind a connection's last request resets it."""
    try:
        return await reader.read(1 << 24)
    except ConnectionError:
        return b""
