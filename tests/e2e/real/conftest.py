"""One 1p1d of the demo model, for what needs sensible answers or a prompt that takes a while.

Tests of this folder share it and run next to each other, so that it stands no longer than they do: a worker takes
two gigabytes.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from tests.e2e.asking import get, until
from tests.e2e.conftest import deployment_spec


@pytest.fixture(scope="package")
def started(demo_model: Path) -> Iterator[SyncDeployment]:
    """The 1p1d in the state that the last test left."""
    with running(deployment_spec(demo_model, "1p1d", kv_gb=0.4, buffer_gb=0.25)) as deployment:
        yield deployment


@pytest.fixture
def deployment(started: SyncDeployment) -> SyncDeployment:
    """A working 1p1d. Processes that the last test killed are restarted."""
    for process in started.processes:
        if not process.running:
            started.restart(process.name)
    until(lambda: whole(started), what="a whole deployment")
    return started


def whole(deployment: SyncDeployment) -> bool:
    """Whether every worker takes requests and the pair is connected."""
    workers = get(deployment.url + "/health").json()["workers"]
    return all(worker["state"] == "ready" and not worker["warming"] for worker in workers)
