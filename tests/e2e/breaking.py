"""A request under way while something breaks, and what a decode worker holds meanwhile."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from kvbelt.ops.deployment import RunningProcess, SyncDeployment
from tests.e2e.asking import Answer, get, until


def kill(deployment: SyncDeployment, name: str) -> None:
    """End a process with SIGKILL, and wait for its end."""
    os.kill(deployment.process(name).pid, signal.SIGKILL)
    until(lambda: not deployment.process(name).running, what=f"the end of {name}")


def belt_of(process: RunningProcess) -> dict[str, Any]:
    """The belt in a worker's health."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body["belt"]


def bytes_held(process: RunningProcess) -> dict[str, int]:
    """Bytes of a decode worker's receive buffer, by state."""
    belt = belt_of(process)
    return {state: belt[f"bytes_{state}"] for state in ("reserved", "committed", "quarantined")}


class Asking:
    """A request on a thread of its own, so that the test can inject faults meanwhile."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._pool = ThreadPoolExecutor(1)
        path = "/v1/completions"
        wanted = {**body, "return_token_ids": True}
        self.reply = self._pool.submit(lambda: httpx.post(url + path, json=wanted, timeout=180))
        self._pool.shutdown(wait=False)

    def answer_or_error(self) -> httpx.Response:
        """The reply. A hang exceeds httpx's own timeout, and so fails the test."""
        return self.reply.result(timeout=200)


def assert_right(reply: httpx.Response, expected: Answer) -> str:
    """Check for a 200 with the right tokens. Returns the path."""
    assert reply.status_code == 200, reply.text
    assert tuple(reply.json()["choices"][0]["token_ids"]) == expected.token_ids[0]
    return reply.headers["x-kvbelt-path"]
