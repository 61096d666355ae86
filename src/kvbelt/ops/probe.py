"""Asking a process over HTTP how it is."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from kvbelt.http import HttpError, Pool

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

    @property
    def ready(self) -> bool:
        """Whether it serves: 200, no state but ``ready``, and so for every worker that a proxy knows of."""
        workers = self.body.get("workers", [])
        states = [self.state, *(worker.get("state") for worker in workers)]
        return self.status == 200 and all(state in (None, "ready") for state in states)


def reachable(host: str) -> str:
    """The address under which a listener on ``host`` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


async def get(host: str, port: int, path: str) -> Answer | None:
    """GET a JSON document. None if nobody answers, or not in HTTP, or not in time."""
    pool = Pool(reachable(host), port)
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            response = await pool.request("GET", path)
            raw = await response.read(_MAX_BYTES)
    except (HttpError, TimeoutError):
        return None
    finally:
        pool.close()
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    return Answer(response.status, body if isinstance(body, dict) else {})
