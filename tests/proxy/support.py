"""A proxy with stand-in workers around it, and a client that asks."""

import asyncio
import json
from dataclasses import dataclass, replace

import zmq

from kvbelt.http import Pool
from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.routing.placement import Mode
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import TransferDone, TransferFailed
from tests.http.support import async_test, eventually, free_port
from tests.proxy.standin import Standin

__all__ = ["Deployment", "Reply", "async_test", "eventually", "free_port", "generated", "in_time"]


@dataclass
class Reply:
    """A client's answer."""

    status: int
    headers: dict
    body: bytes

    @property
    def path(self):
        """The value of x-kvbelt-path."""
        return self.headers.get(b"x-kvbelt-path", b"").decode()

    @property
    def json(self):
        """A whole answer."""
        return json.loads(self.body)

    @property
    def events(self):
        """A stream's events without the last, which must be ``[DONE]``."""
        assert self.body.endswith(b"data: [DONE]\n\n")
        parts = self.body.split(b"\n\n")[:-2]
        return [json.loads(part.removeprefix(b"data: ")) for part in parts if not part.startswith(b":")]

    @property
    def text(self):
        """The answer's text, streamed or whole."""
        if not self.headers[b"content-type"].startswith(b"text/event-stream"):
            return "".join(c["message"]["content"] if "message" in c else c["text"] for c in self.json["choices"])
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


class Deployment:
    """Prefill and decode stand-ins, one more decode worker to compare with, and a proxy."""

    def __init__(self, prefill=1, decode=1, **settings):
        self.prefill = [Standin("prefill", engine_id=f"p{i}") for i in range(prefill)]
        self.decode = [Standin("decode", engine_id=f"d{i}") for i in range(decode)]
        self.alone = Standin("both")
        # Slow by default: what happens must not be due to a health check, unless the test says so.
        self.settings = {
            "health_interval_seconds": 30.0,
            "health_timeout_seconds": 5.0,
            "drain_seconds": 0.05,
            "placement": Mode.SPLIT,
        } | settings

    async def __aenter__(self):
        """Start everything and wait until it is ready."""
        for standin in (*self.prefill, *self.decode, self.alone):
            await standin.start()
        self.proxy = Proxy(
            ProxySettings(
                prefill=tuple(Address("127.0.0.1", s.port) for s in self.prefill),
                decode=tuple(Address("127.0.0.1", s.port) for s in self.decode),
                port=free_port(),  # so that it may be started again there
                notification_port=free_port(),
                **self.settings,
            )
        )
        await self.proxy.start()
        await self.proxy.workers_asked()
        self.pool = Pool("127.0.0.1", self.proxy.port)
        self._alone_pool = Pool("127.0.0.1", self.alone.port)
        return self

    async def __aexit__(self, *exc):
        """Stop everything."""
        self.pool.close()
        self._alone_pool.close()
        await self.proxy.close()
        for standin in (*self.prefill, *self.decode, self.alone):
            await standin.stop()
        if exc == (None, None, None):
            assert nothing_is_booked(self.proxy)

    async def restart_proxy(self, port):
        """Restart the proxy on this port."""
        self.proxy = Proxy(replace(self.proxy.settings, port=port))
        await self.proxy.start()

    async def ask(self, body, *, chat=False, request_id="r1", pool=None, headers=()):
        """One request through the proxy. ``body``: a dictionary, or bytes as they are."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await (pool or self.pool).request(
            "POST", path, ((b"x-request-id", request_id.encode()), *headers), data
        )
        return Reply(response.status, response.headers, await response.read(1 << 26))

    async def ask_alone(self, body, *, chat=False):
        """The same request to one server, whose answer the proxy's must equal."""
        return await self.ask(body, chat=chat, pool=self._alone_pool)

    async def get(self, path, method="GET", *, headers=(), body=None):
        """Any other request."""
        response = await self.pool.request(method, path, headers, body)
        return Reply(response.status, response.headers, await response.read(1 << 26))

    async def record(self, request_id="r1"):
        """The proxy's record of a request."""
        return (await self.get(f"/kvbelt/requests/{request_id}")).json

    def push(self, *frames):
        """Send a message to the notification port."""
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"tcp://127.0.0.1:{self.proxy.notification_port}")
            socket.send_multipart(frames)

    async def notify(self, *frames):
        """The same, off the event loop."""
        await asyncio.to_thread(self.push, *frames)

    async def right(self, reply, body):
        """Whether a reply has one server's text."""
        expected = await self.ask_alone({**body, "stream": False})
        return reply.status == 200 and reply.text == expected.text

    def worker(self, standin):
        """The proxy's view of a stand-in."""
        return next(w for w in self.proxy.context.fleet if w.name.endswith(f":{standin.port}"))


def nothing_is_booked(proxy):
    """Whether every request has given its place back."""
    placement = proxy.context.dispatcher.placement
    books = proxy.context.dispatcher._workers
    left = [(b.incarnation, b.prompts, b.decodes) for b in books if b.requests or b.kv_booked or b.kv_tokens]
    return (placement.running, placement.waiting, left) == (0, 0, [])


async def in_time(attempt):
    """Let ``attempt(seconds)`` meet its deadline at the intended place. On a late machine it gets more time."""
    for seconds in (0.2, 2.0, 20.0):
        if await attempt(seconds):
            return
    raise AssertionError("it never came as far")


def generated(standin):
    """The generation requests that a stand-in got: their bodies."""
    return [body for _, _, body in standin.requests]


def done(seconds=0.02, exposed=0.004, transfer_id="t"):
    """The notification of a transfer that succeeded."""
    return TransferDone(
        transfer_id=TransferId(transfer_id), sender=EngineId("p"), receiver=EngineId("d"), num_bytes=1000,
        seconds=seconds, channel="nixl", num_tokens=10, num_writes=3, exposed_seconds=exposed,
    )  # fmt: skip


def failed(reason="peer_lost"):
    """The notification of a transfer that failed."""
    return TransferFailed(
        transfer_id=TransferId("t"), sender=EngineId("p"), receiver=EngineId("d"), num_bytes=0, seconds=0.01,
        reason=reason,
    )  # fmt: skip
