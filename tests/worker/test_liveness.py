"""What Kubernetes asks a worker: whether it is alive, and whether it takes requests."""

import asyncio

import httpx
import pytest

from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.worker.app import make_app
from kvbelt.worker.service import Service, State


def asked(service, *paths):
    """The status of each path's answer."""

    async def ask():
        transport = httpx.ASGITransport(app=make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return [(await client.get(path)).status_code for path in paths]

    return asyncio.run(ask())


@pytest.mark.parametrize("state", [State.LOADING, State.DRAINING])
def test_a_worker_that_loads_or_drains_is_alive_but_not_ready(state):
    """Liveness asks for /v1/models, readiness for /health."""
    service = Service(role=Role.DECODE, engine_id=EngineId("e"), model_name="m")
    service.state = state
    assert asked(service, "/v1/models", "/metrics", "/health") == [200, 200, 503]


def test_a_ready_worker_is_both(ready):
    """A ready worker takes requests."""
    assert asked(ready, "/v1/models", "/health") == [200, 200]
