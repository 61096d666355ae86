"""Asking one process over HTTP, patiently but not for ever."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from kvbelt.errors import SettingsError
from kvbelt.http import ClientLimits, HttpError, Pool
from kvbelt.ops.probe import reachable

#: A process that takes longer is as good as dead to its clients.
PATIENCE_SECONDS = 4.0

_MAX_BYTES = 1 << 25
_JSON = (b"content-type", b"application/json")


class NoAnswerError(Exception):
    """Nothing came, or not in time. The message says which."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    began: float  #: ``time.time()`` when it was asked for
    ended: float  #: ... when its head was there

    @property
    def seconds(self) -> float:
        """From the question to the answer's head."""
        return self.ended - self.began

    @property
    def json(self) -> dict[str, Any]:
        """The body's object; empty if it is none."""
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return body if isinstance(body, dict) else {}


class Asker:
    """One process. Close it."""

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        self._headers = () if key is None else ((b"authorization", f"Bearer {key}".encode()),)
        self._pool = Pool(reachable(host), port, limits=ClientLimits(connect_seconds=PATIENCE_SECONDS))

    @classmethod
    def at(cls, name: str) -> Self:
        """``host:port``, as the proxy calls its workers."""
        host, _, port = name.rpartition(":")
        return cls(host.strip("[]"), int(port))

    async def get(self, path: str, seconds: float = PATIENCE_SECONDS) -> Reply:
        """Ask.

        Raises:
            NoAnswerError: why.
        """
        return await self._ask("GET", path, None, seconds)

    async def post(self, path: str, body: dict[str, Any], seconds: float) -> Reply:
        """Ask for something to be done.

        Raises:
            NoAnswerError: why.
        """
        return await self._ask("POST", path, json.dumps(body).encode(), seconds)

    async def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> Reply:
        began = time.time()
        try:
            async with asyncio.timeout(seconds):
                headers = self._headers if body is None else (*self._headers, _JSON)
                response = await self._pool.request(method, path, headers, body)
                ended = time.time()
                return Reply(response.status, response.headers, await response.read(_MAX_BYTES), began, ended)
        except TimeoutError:
            raise NoAnswerError(f"no answer to {path} within {seconds:g} s") from None
        except HttpError as error:
            raise NoAnswerError(str(error)) from None

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()


def address_of(url: str) -> tuple[str, int]:
    """Host and port of ``--url``.

    Raises:
        SettingsError: it is not a plain HTTP address.
    """
    there = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = there.port
    except ValueError:
        port = -1
    if there.scheme != "http" or there.hostname is None or port == -1:
        raise SettingsError(
            f"--url {url} is not the address of a proxy; say for example http://127.0.0.1:9100 (the proxy's own, "
            "without TLS)"
        )
    return there.hostname, port or 80
