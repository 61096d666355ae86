"""Connections to one endpoint, kept open between requests."""

import asyncio
from collections.abc import Sequence

from kvbelt.http.client_connection import ClientConnection
from kvbelt.http.errors import ConnectError, HttpError, PeerClosedError
from kvbelt.http.limits import ClientLimits
from kvbelt.http.message import encode_head
from kvbelt.http.response import Response


class Pool:
    """An HTTP/1.1 client of one endpoint. As many connections as there are requests at once.

    A request is sent a second time only where the first cannot have been processed: it went out on a kept
    connection that was reset before anything of the answer came, which is what a peer does to bytes that it
    never read.
    """

    def __init__(self, host: str, port: int, *, limits: ClientLimits | None = None) -> None:
        self.name = f"{host}:{port}"
        self._host = host
        self._port = port
        self._limits = limits or ClientLimits()
        self._authority = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        self._idle: dict[ClientConnection, float] = {}  # connection → when it became idle; the newest last
        self._open: set[ClientConnection] = set()
        self._closed = False

    async def request(
        self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes | None = None
    ) -> Response:
        """Send a request and wait for the head of its answer. HEAD is not offered: its answers look unfinished.

        Raises:
            ConnectError: no connection; nothing was sent.
            HttpError: the connection ended before a head came, or what came was not HTTP.
        """
        response = await self.send(method, target, headers, body)
        try:
            await response.head()
        except PeerClosedError as error:
            if error.started or not (error.reused and error.reset):
                raise
            response = (await self._connect()).send(self._encode(method, target, headers, body))
            await response.head()
        return response

    async def send(
        self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes | None = None
    ) -> Response:
        """Send a request and return at once; nothing of the answer need have come. Never sent twice.

        Raises:
            ConnectError: no connection; nothing was sent.
        """
        data = self._encode(method, target, headers, body)
        connection = self._take_idle() or await self._connect()
        return connection.send(data)

    def abort_all(self, error: HttpError) -> None:
        """The endpoint is lost: whoever waits for it gets this error, and every connection is closed."""
        for connection in list(self._open):
            connection.fail(error)
        self._idle.clear()

    def close(self) -> None:
        """Close every connection, and those that are still being made. Idempotent."""
        self._closed = True
        self.abort_all(PeerClosedError(f"the pool of {self.name} was closed"))

    def __repr__(self) -> str:
        """Its peer and how many connections."""
        return f"<Pool {self.name} {len(self._open)} open, {len(self._idle)} idle>"

    def _encode(self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes | None) -> bytes:
        lines = [(b"host", self._authority), *headers]
        if body is None:
            return encode_head(b"%b %b HTTP/1.1\r\n" % (method.encode(), target.encode()), lines)
        lines.append((b"content-length", b"%d" % len(body)))
        return encode_head(b"%b %b HTTP/1.1\r\n" % (method.encode(), target.encode()), lines) + body

    def _take_idle(self) -> ClientConnection | None:
        oldest = asyncio.get_running_loop().time() - self._limits.idle_seconds
        while self._idle:
            connection, since = self._idle.popitem()
            if connection.closed:
                continue
            if since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limits.connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: ClientConnection(self, self._limits, self.name, loop), self._host, self._port
                )
        except TimeoutError:
            raise ConnectError(f"no connection to {self.name} within {self._limits.connect_seconds} s") from None
        except OSError as error:
            raise ConnectError(f"cannot connect to {self.name}: {error}") from error
        if self._closed:
            connection.abort()
            raise ConnectError(f"the pool of {self.name} was closed")
        self._open.add(connection)
        return connection

    # The connections' calls

    def reusable(self, connection: ClientConnection) -> None:
        """Keep it for the next request."""
        if self._closed or len(self._idle) >= self._limits.max_idle_connections:
            connection.abort()
        else:
            self._idle[connection] = asyncio.get_running_loop().time()

    def gone(self, connection: ClientConnection) -> None:
        """Forget it."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
