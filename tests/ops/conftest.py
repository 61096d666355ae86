"""What this room's tests share."""

import sys
from pathlib import Path

import pytest

from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.topology import Topology
from tests.ops.support import request_record


@pytest.fixture
def spec(tmp_path):
    """1p1d over stand-ins."""
    return DeploymentSpec(
        topology=Topology(1, 1),
        model=tmp_path,
        device="cpu",
        auto_ports=True,
        start_timeout=120,
        command=(sys.executable, "-S", str(Path(__file__).with_name("standin.py"))),
    )


@pytest.fixture
def record():
    """A request that went over the belt, as the proxy tells it."""
    return request_record()
