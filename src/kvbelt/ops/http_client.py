"""The HTTP client of every command: JSON from proxies and workers, with a time limit on each request."""

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from kvbelt.errors import KVBeltError
from kvbelt.http import ClientLimits, HttpError, Pool
from kvbelt.wire.json_body import JsonMessage, MessageError

T = TypeVar("T")

#: A client treats a process that takes longer as dead.
ANSWER_SECONDS = 4.0

_MAX_BYTES = 1 << 25
_JSON = (b"content-type", b"application/json")


class NoAnswerError(KVBeltError):
    """No response came, or not in time. The message says which."""


class UnreadableReplyError(KVBeltError):
    """A response is not the message that was expected. The text names the sender and the field at fault."""


@dataclass(frozen=True, slots=True)
class Address:
    """The HTTP endpoint of a proxy or a worker."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def of_worker(cls, name: str) -> Self:
        """``host:port``, as the proxy names its workers."""
        host, _, port = name.rpartition(":")
        return cls(host.strip("[]"), int(port))

    @classmethod
    def of_url(cls, url: str) -> Self:
        """Read ``http://HOST[:PORT]`` or ``https://HOST[:PORT]``.

        Raises:
            ValueError: the URL is neither.
        """
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        if (not tls and parts.scheme != "http") or parts.hostname is None:
            raise ValueError(f"{url} is not an HTTP URL")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def reachable(host: str) -> str:
    """The address at which this machine reaches a listener on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response."""

    status: int
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    sent_at: float = 0.0  #: ``time.time()`` before the request
    head_at: float = 0.0  #: ``time.time()`` when the head of the response was there

    @property
    def seconds(self) -> float:
        """From the request to the head of the response."""
        return self.head_at - self.sent_at

    def read(self, message: JsonMessage[T], sender: str) -> T:
        """Parse the body as ``message``.

        Raises:
            UnreadableReplyError: the body is another message, or lacks a field.
        """
        try:
            return message.parse(self.body, sender)
        except MessageError as error:
            raise UnreadableReplyError(str(error)) from None

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object in the body; empty if the body is no JSON object."""
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return body if isinstance(body, dict) else {}


class Client:
    """A client of one process. Close it, or use it in a ``with`` block."""

    def __init__(self, address: Address, key: str | None = None) -> None:
        self._headers = () if key is None else ((b"authorization", f"Bearer {key}".encode()),)
        self.pool = Pool(
            reachable(address.host),
            address.port,
            limits=ClientLimits(connect_seconds=ANSWER_SECONDS),
            tls=ssl.create_default_context() if address.tls else None,
        )

    async def get(self, path: str, seconds: float = ANSWER_SECONDS) -> Reply:
        """As ``request``."""
        return await self.request("GET", path, None, seconds)

    async def post(self, path: str, body: object, seconds: float) -> Reply:
        """As ``request``."""
        return await self.request("POST", path, body, seconds)

    async def request(self, method: str, path: str, body: object, seconds: float) -> Reply:
        """Send ``body`` as JSON (None: no body) and read the whole response.

        Raises:
            NoAnswerError: no response within ``seconds``, or the connection failed.
        """
        sent_at = time.time()
        headers = self._headers if body is None else (*self._headers, _JSON)
        content = None if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(seconds):
                response = await self.pool.request(method, path, headers, content)
                head_at = time.time()
                return Reply(response.status, response.headers, await response.read(_MAX_BYTES), sent_at, head_at)
        except TimeoutError:
            raise NoAnswerError(f"no answer to {path} within {seconds:g} s") from None
        except HttpError as error:
            raise NoAnswerError(str(error)) from None

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def get(address: Address, path: str, seconds: float = ANSWER_SECONDS, *, key: str | None = None) -> Reply | None:
    """One GET on a connection of its own; None if no response came."""
    with Client(address, key) as client:
        try:
            return await client.get(path, seconds)
        except NoAnswerError:
            return None
