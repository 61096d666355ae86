"""Asking a process over HTTP how it is, with nothing but asyncio.

HTTP/1.0 on purpose: the answer comes unchunked and the connection closes behind it.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

_TIMEOUT_SECONDS = 2.0
_MAX_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. ``body`` is the parsed JSON object, empty if there was none."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str | None:
        """What a worker's ``/health`` says of itself: ``loading``, ``ready``, ``draining``, ``failed``."""
        state = self.body.get("state")
        return state if isinstance(state, str) else None


def reachable(host: str) -> str:
    """The address under which a listener on ``host`` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


async def get(host: str, port: int, path: str) -> Answer | None:
    """GET a JSON document. None if nobody answers, or not in HTTP, or not in time."""
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            return await _get(reachable(host), port, path)
    except (OSError, TimeoutError, ValueError):
        return None


async def _get(host: str, port: int, path: str) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nAccept: application/json\r\n\r\n".encode())
        raw = await reader.read(_MAX_BYTES) if (first := await reader.readline()) else b""
        while more := await reader.read(_MAX_BYTES):
            raw += more
    finally:
        writer.close()
    status = int(first.split()[1]) if first.startswith(b"HTTP/") else 0
    if not status:
        raise ValueError("not HTTP")
    try:
        body = json.loads(raw.partition(b"\r\n\r\n")[2])
    except ValueError:
        body = None
    return Answer(status, body if isinstance(body, dict) else {})
