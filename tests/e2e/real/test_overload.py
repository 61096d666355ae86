"""A prefill worker with more to read than it can."""

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment
from tests.e2e.asking import get, until
from tests.e2e.doctoring import doctor, wrong
from tests.e2e.prompts import long_text

pytestmark = pytest.mark.e2e


def test_overloaded_prefill_is_the_first_finding(deployment: SyncDeployment) -> None:
    """More long prompts at once, all the time, than the prefill worker computes in ten seconds."""
    numbers, seen = itertools.count(), threading.Event()

    def ask() -> None:
        while not seen.is_set():
            body = {"prompt": long_text(900, next(numbers)), "max_tokens": 1}
            with contextlib.suppress(httpx.ReadTimeout):  # the client leaves, and with it what it asked for
                httpx.post(deployment.url + "/v1/completions", json=body, timeout=6)

    with ThreadPoolExecutor(20) as pool:
        asking = [pool.submit(ask) for _ in range(20)]
        try:
            until(lambda: _waiting(deployment.process("prefill-0")) > 10, what="a queue")
            _, findings = doctor("--url", deployment.url, "--seconds", "1", "--no-probe")
        finally:
            seen.set()
    for one in asking:
        one.result()
    assert wrong(findings)[0] == "prefill_overloaded", findings
    until(lambda: not _waiting(deployment.process("prefill-0")), what="an empty queue")


def _waiting(process: RunningProcess) -> int:
    return get(process.url + "/health").json()["load"]["waiting"]
