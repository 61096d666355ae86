"""A worker that is asked to measure a link."""

import asyncio

import pytest
from starlette.testclient import TestClient

from kvbelt.wire.ids import EngineId
from kvbelt.wire.probe import PROBE_RESULT
from kvbelt.worker.app import make_app
from kvbelt.worker.links import probe_link
from kvbelt.worker.service import State
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.transfer.belts import Side, Warmed
from tests.worker.support import service


def test_a_link_is_measured_over_http() -> None:
    """The answer has figures of both directions, or the reason for a receiver that is not connected."""
    network = MemoryNetwork()
    with (
        Side("p", "prefill", MemoryChannel("p", network)) as p,
        Side("d", "decode", MemoryChannel("d", network)) as d,
        TestClient(make_app(service(p.belt))) as client,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        reply = client.post("/kvbelt/probe", json={"engine_id": "d"})
        assert reply.status_code == 200
        probed = PROBE_RESULT.parse(reply.content, "p")
        assert probed.reason == ""
        assert probed.write is not None
        assert probed.read is not None
        probed = PROBE_RESULT.parse(client.post("/kvbelt/probe", json={"engine_id": "e"}).content, "p")
        assert (probed.reason, probed.write) == ("not_connected", None)


def test_a_worker_with_requests_measures_nothing() -> None:
    """A measurement would disturb them."""
    with Side("p", "prefill", MemoryChannel("p", MemoryNetwork())) as p:
        assert asyncio.run(probe_link(p.belt, EngineId("d"), busy=True)).reason == "busy"


def test_a_worker_without_a_belt_says_so() -> None:
    assert asyncio.run(probe_link(None, EngineId("d"), busy=False)).reason == "no_belt"


def test_a_worker_that_is_loading_measures_nothing() -> None:
    """The status is 503."""
    loading = service(None)
    loading.state = State.LOADING
    with TestClient(make_app(loading)) as client:
        assert client.post("/kvbelt/probe", json={"engine_id": "d"}).status_code == 503


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"engine_id": 1}', b"\xff"])
def test_a_wrong_body_is_refused(body: bytes) -> None:
    """The status is 400. A caller cannot name an address to connect to."""
    with TestClient(make_app(service(None))) as client:
        reply = client.post("/kvbelt/probe", content=body)
    assert reply.status_code == 400
    assert "the probe of the caller" in reply.json()["error"]["message"]


def test_too_large_a_body_is_413() -> None:
    """The body is not parsed."""
    with TestClient(make_app(service(None))) as client:
        assert client.post("/kvbelt/probe", content=b" " * 5000).status_code == 413
