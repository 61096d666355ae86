"""Whole deployments of real processes, shared by the tests of a session: a small random model, real tokens."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec
from kvbelt.ops.topology import Topology
from tests.channels.carriers import need
from tests.random_model import random_model_dir

#: Enough for the longest prompts of these tests, small enough for a laptop.
MAX_MODEL_LEN = 2048


def deployment_spec(model: Path, topology: str, **changes) -> DeploymentSpec:
    """The tests' deployments: free ports, one thread a worker, small memories; every request is split."""
    given = {
        "topology": Topology.parse(topology),
        "model": model,
        "auto_ports": True,
        "threads": 1,
        "kv_gb": 0.1,
        "buffer_gb": 0.05,
        "max_model_len": MAX_MODEL_LEN,
        "device": "cpu",
        "proxy_args": SPLIT_ALL,
    }
    return DeploymentSpec(**(given | changes))


@pytest.fixture(scope="session")
def small_model(demo_model: Path) -> Path:
    """A random model with the demo model's tokenizer."""
    return random_model_dir(demo_model)


@pytest.fixture(scope="session")
def one_p_one_d(small_model: Path) -> Iterator[SyncDeployment]:
    """1p1d, shared: tests must leave it whole."""
    with running(deployment_spec(small_model, "1p1d")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def elastic(small_model: Path) -> Iterator[SyncDeployment]:
    """1p1d that places requests by load. With an ITL level, answers this short are not split while decode is busy."""
    with running(deployment_spec(small_model, "1p1d", proxy_args=("--slo-itl-ms", "0"))) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def one_p_one_d_mooncake(small_model: Path) -> Iterator[SyncDeployment]:
    """1p1d over the other carrier."""
    need("mooncake")
    with running(deployment_spec(small_model, "1p1d", transfer_channel="mooncake")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def two_p_two_d_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its logs: ``proxy.log`` and one of each worker."""
    return tmp_path_factory.mktemp("2p2d-logs")


@pytest.fixture(scope="session")
def two_p_two_d(small_model: Path, two_p_two_d_logs: Path) -> Iterator[SyncDeployment]:
    """2p2d, shared: tests must leave it whole."""
    with running(deployment_spec(small_model, "2p2d", log_dir=two_p_two_d_logs)) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def aggregated(small_model: Path) -> Iterator[SyncDeployment]:
    """0p1d, the yardstick, shared."""
    with running(deployment_spec(small_model, "0p1d")) as deployment:
        yield deployment


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """A client that gives up long before the test does."""
    with httpx.Client(timeout=120) as http:
        yield http
