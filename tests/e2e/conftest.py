"""Whole deployments of real processes with the real demo model, shared by the tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.topology import Topology

#: Enough for the longest prompts of these tests, small enough for a laptop.
MAX_MODEL_LEN = 2048


def deployment_spec(model: Path, topology: str, **changes) -> DeploymentSpec:
    """The tests' deployments: free ports, one thread a worker, small memories."""
    given = {
        "topology": Topology.parse(topology),
        "model": model,
        "auto_ports": True,
        "threads": 1,
        "kv_gb": 0.75,
        "buffer_gb": 0.5,
        "max_model_len": MAX_MODEL_LEN,
        "device": "cpu",
    }
    return DeploymentSpec(**(given | changes))


@pytest.fixture(scope="session")
def one_p_one_d(demo_model: Path) -> Iterator[SyncDeployment]:
    """1p1d, shared: tests must leave it whole."""
    with running(deployment_spec(demo_model, "1p1d")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def two_p_two_d(demo_model: Path) -> Iterator[SyncDeployment]:
    """2p2d, shared: tests must leave it whole."""
    with running(deployment_spec(demo_model, "2p2d")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def aggregated(demo_model: Path) -> Iterator[SyncDeployment]:
    """0p1d, the yardstick, shared."""
    with running(deployment_spec(demo_model, "0p1d")) as deployment:
        yield deployment


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """A client that gives up long before the test does."""
    with httpx.Client(timeout=120) as http:
        yield http
