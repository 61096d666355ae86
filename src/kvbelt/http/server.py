"""The server: its listener and its connections."""

import asyncio
from collections.abc import Callable, Sequence

from kvbelt.http.errors import BadRequestError
from kvbelt.http.limits import ServerLimits
from kvbelt.http.server_connection import Handler, ServerConnection

__all__ = ["Handler", "Server"]

#: Seconds between two checks for silent connections, while there are any.
_SWEEP_SECONDS = 1.0


def _plain_refusal(error: BadRequestError) -> tuple[Sequence[tuple[bytes, bytes]], bytes]:
    return ((b"content-type", b"text/plain; charset=utf-8"),), f"{error}\n".encode()


class Server:
    """An HTTP/1.1 server: one handler call for each request, cancelled when its client leaves.

    Args:
        handler: called with an Exchange; must end its answer. An exception becomes a 500.
        limits: of one client's connection.
        refusal: headers and body of an answer to a request that is refused before the handler is called.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        limits: ServerLimits | None = None,
        refusal: Callable[[BadRequestError], tuple[Sequence[tuple[bytes, bytes]], bytes]] = _plain_refusal,
    ) -> None:
        self.handler = handler
        self.limits = limits or ServerLimits()
        self.draining = False
        self.refusal = refusal
        self._connections: set[ServerConnection] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen. Returns the port, for callers that gave 0.

        Raises:
            OSError: the address is taken or not this host's.
        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: ServerConnection(self, loop), host, port, backlog=1024)
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self, grace_seconds: float = 5.0) -> None:
        """Accept no more requests, give open ones the grace to end, then cut them. Idempotent."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        try:
            await asyncio.wait_for(self._emptied.wait(), grace_seconds)
        except TimeoutError:
            self.abort()
            await self._emptied.wait()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def abort(self) -> None:
        """Cut every connection now."""
        for connection in list(self._connections):
            connection.abort()

    # Called by connections

    def opened(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        self._emptied.clear()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def closed(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._connections):
            if connection.deadline is not None and connection.deadline < now:
                connection.expire()
        # The sweep ends with the last connection and starts with the next, so that an idle server sleeps.
        self._sweeper = loop.call_later(_SWEEP_SECONDS, self._sweep) if self._connections else None
