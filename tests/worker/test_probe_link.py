"""A worker that is asked to measure a link."""

import asyncio

import pytest
from starlette.testclient import TestClient

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.errors import RequestError
from kvbelt.wire.probe import parse_answer
from kvbelt.worker.app import make_app
from kvbelt.worker.probe import parse_probe, probe_link
from kvbelt.worker.service import State
from tests.transfer.belts import Side
from tests.transfer.test_warm import Warmed
from tests.worker.test_peers import service


def test_a_link_is_measured_over_http() -> None:
    """The figures of both directions; of a decode worker that is not connected, why not."""
    network = MemoryNetwork()
    with (
        Side("p", "prefill", MemoryChannel("p", network)) as p,
        Side("d", "decode", MemoryChannel("d", network)) as d,
        TestClient(make_app(service(p.belt))) as client,
    ):
        assert Warmed(p, d.belt.receiver_address()).answer().ok
        reply = client.post("/kvbelt/probe", json={"engine_id": "d"})
        assert reply.status_code == 200
        probed = parse_answer(reply.content)
        assert probed.reason == ""
        assert probed.write is not None
        assert probed.read is not None
        probed = parse_answer(client.post("/kvbelt/probe", json={"engine_id": "e"}).content)
        assert (probed.reason, probed.write) == ("not_connected", None)


def test_a_worker_with_requests_measures_nothing() -> None:
    """They are not disturbed, wherever they are."""
    with Side("p", "prefill", MemoryChannel("p", MemoryNetwork())) as p:
        assert asyncio.run(probe_link(p.belt, parse_probe(b'{"engine_id": "d"}'), busy=True)).reason == "busy"


def test_a_worker_without_a_belt_says_so() -> None:
    """An outcome as any other."""
    assert asyncio.run(probe_link(None, parse_probe(b'{"engine_id": "d"}'), busy=False)).reason == "no_belt"


def test_a_worker_that_is_loading_measures_nothing() -> None:
    """503, as for everything else."""
    loading = service(None)
    loading.state = State.LOADING
    with TestClient(make_app(loading)) as client:
        assert client.post("/kvbelt/probe", json={"engine_id": "d"}).status_code == 503


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"engine_id": 1}', b'{"engine_id": "d", "host": "x"}', b"\xff"])
def test_a_wrong_body_is_refused(body: bytes) -> None:
    """With 400; nobody can name an address to connect to."""
    with pytest.raises(RequestError, match="does not name a decode worker"):
        parse_probe(body)
    with TestClient(make_app(service(None))) as client:
        assert client.post("/kvbelt/probe", content=body).status_code == 400


def test_too_large_a_body_is_413() -> None:
    """Before it is parsed."""
    with TestClient(make_app(service(None))) as client:
        assert client.post("/kvbelt/probe", content=b" " * 5000).status_code == 413
