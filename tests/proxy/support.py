"""A proxy with stand-in workers around it, and a client that asks."""

import asyncio
import json
from dataclasses import dataclass, replace

import zmq

from kvbelt.http import Pool
from kvbelt.proxy import Address, Proxy, ProxySettings
from tests.http.support import async_test, eventually, free_port
from tests.proxy.standin import Standin

__all__ = ["Deployment", "Reply", "async_test", "eventually", "free_port", "generated", "in_time"]


@dataclass
class Reply:
    """What the client got."""

    status: int
    headers: dict
    body: bytes

    @property
    def path(self):
        """The road taken, and why."""
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

    async def restart_proxy(self, port):
        """Another life of the proxy, on a port of the first."""
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
        """The same request to one server, which is what the answer has to equal."""
        return await self.ask(body, chat=chat, pool=self._alone_pool)

    async def get(self, path, method="GET", *, headers=(), body=None):
        """Anything else."""
        response = await self.pool.request(method, path, headers, body)
        return Reply(response.status, response.headers, await response.read(1 << 26))

    async def record(self, request_id="r1"):
        """What the proxy says of a request."""
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
        return next(w for w in self.proxy._workers if w.name.endswith(f":{standin.port}"))


async def in_time(attempt):
    """Let ``attempt(seconds)`` meet its deadline in the place that is meant.

    It says whether it has come as far: a machine that stands still for a moment may be overtaken by the deadline, and
    then there is more time.
    """
    for seconds in (0.2, 2.0, 20.0):
        if await attempt(seconds):
            return
    raise AssertionError("it never came as far")


def generated(standin):
    """The generation requests that a stand-in got: their bodies."""
    return [body for _, _, body in standin.requests]
