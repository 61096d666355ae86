"""What this room's tests share."""

import sys
from pathlib import Path

import pytest

from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.topology import Topology


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
    return {
        "request_id": "r1",
        "route": "/v1/chat/completions",
        "status": 200,
        "decision": {"path": "first-token", "reason": None},
        "workers": {"prefill": "127.0.0.1:7100", "decode": "127.0.0.1:7200"},
        "transfer_id": "t1",
        "kv": "received",
        "timings_ms": {
            "proxy": 1.0,
            "queue": 2.0,
            "prefill": 80.0,
            "prefill_leg": 84.0,
            "kv_wait": 3.0,
            "load": 1.5,
            "decode_queue": 0.5,
            "decode_headers": 45.0,
            "first_decode_step": 40.0,
            "first_token": 85.2,
            "total": 900.0,
        },
        "transfer": {
            "state": "done",
            "bytes": 46_080_000,
            "seconds": 0.02,
            "milliseconds": 20.0,
            "gb_per_second": 2.304,
            "channel": "nixl",
            "tokens": 1000,
            "writes": 30,
            "exposed_ms": 4.0,
        },
        "spans": [
            {"name": "proxy", "start_ms": 0.0, "duration_ms": 1.0},
            {"name": "queue", "start_ms": 1.0, "duration_ms": 2.0, "worker": "127.0.0.1:7100"},
            {"name": "prefill", "start_ms": 3.0, "duration_ms": 80.0, "worker": "127.0.0.1:7100"},
            {"name": "transfer", "start_ms": 67.0, "duration_ms": 20.0, "worker": "127.0.0.1:7100"},
            {"name": "KV wait", "start_ms": 85.0, "duration_ms": 3.0, "worker": "127.0.0.1:7200"},
            {"name": "KV load", "start_ms": 88.5, "duration_ms": 1.5, "worker": "127.0.0.1:7200"},
            {"name": "first decode step", "start_ms": 90.0, "duration_ms": 40.0, "worker": "127.0.0.1:7200"},
            {"name": "answer", "start_ms": 85.2, "duration_ms": 814.8},
        ],
        "attempts": [],
        "errors": [],
    }
