"""Random requests and bytes against whole deployments: no difference between them, no 5xx, no hang, no worker lost."""

import asyncio
import itertools
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment
from kvbelt.proxy import Address
from tests.e2e.asking import health
from tests.fuzz.differential import as_curl, ask_all, differing, same
from tests.fuzz.mutation import inputs
from tests.fuzz.real_proxy import RealProxy
from tests.fuzz.requests import requests

pytestmark = pytest.mark.e2e


def engine_ids(deployment: SyncDeployment) -> list[str]:
    """They change where a worker has been restarted."""
    return [health(worker)["engine_id"] for worker in deployment.workers]


def addresses(deployment: SyncDeployment, role: str) -> list[Address]:
    return [_address(worker) for worker in deployment.workers if worker.name.startswith(role)]


def _address(worker: RunningProcess) -> Address:
    return Address("127.0.0.1", int(worker.url.rpartition(":")[2]))


def test_split_requests_differ_in_nothing(
    one_p_one_d: SyncDeployment, two_p_two_d: SyncDeployment, aggregated: SyncDeployment
) -> None:
    """Eight at a time, streamed and whole, right and wrong."""
    asked = list(itertools.islice(requests(3), 60))
    expected = asyncio.run(ask_all(aggregated.url, asked))
    for deployment in (one_p_one_d, two_p_two_d):
        found = differing(asked, asyncio.run(ask_all(deployment.url, asked)), expected, same)
        assert not found, [(as_curl(deployment.url, request), one, other) for request, one, other in found]


def test_answers_are_as_the_openapi_document_says(one_p_one_d: SyncDeployment, tmp_path: Path) -> None:
    """What schemathesis makes of the document gets statuses, types and bodies of the document, and no 5xx.

    Chats are left out: without a limit this model's go on to the end of its context.
    """
    before = engine_ids(one_p_one_d)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
        f"{one_p_one_d.url}/openapi.json", "--checks", checks, "--phases", "fuzzing", "--max-examples", "8",
        "--exclude-operation-id", "createChatCompletion", "--request-timeout", "60",
        "--generation-deterministic", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert engine_ids(one_p_one_d) == before


def test_a_proxy_answers_whatever_bytes_come(one_p_one_d: SyncDeployment) -> None:
    """Changed requests, over TCP, to a proxy before real workers: each is answered or refused, and none stays open."""
    before = engine_ids(one_p_one_d)
    proxy = RealProxy(addresses(one_p_one_d, "prefill"), addresses(one_p_one_d, "decode"))
    try:
        for data in itertools.islice(inputs("proxy", Random(1)), 300):
            proxy(data)
    finally:
        proxy.close()
    assert engine_ids(one_p_one_d) == before
