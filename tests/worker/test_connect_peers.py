"""A worker connects to decode workers when the proxy names them."""

import asyncio
import socket
from contextlib import closing

import msgspec
import pytest
from starlette.testclient import TestClient

from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.worker import links
from kvbelt.worker.app import make_app
from kvbelt.worker.links import MAX_PEERS, connect_peers
from kvbelt.worker.service import State
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Side
from tests.worker.support import service

ADDRESS = {"engine_id": "e", "host": "127.0.0.1", "init_port": 1, "alloc_port": 1}
QUICK = BeltSettings(handshake_seconds=2.0)


def test_each_receiver_is_answered_for(monkeypatch):
    """One answer has a connected receiver, a refusal with both values, and a missing receiver."""
    monkeypatch.setattr(links, "GRACE_SECONDS", 60.0)
    network = MemoryNetwork()
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    with (
        Side("p", "prefill", MemoryChannel("p", network), settings=QUICK) as p,
        Side("d", "decode", MemoryChannel("d", network)) as d,
        Side("o", "decode", MemoryChannel("o", network), layout=other) as o,
        TestClient(make_app(service(p.belt))) as client,
    ):
        addresses = [msgspec.to_builtins(side.belt.receiver_address()) for side in (d, o)] + [ADDRESS]
        reply = client.post("/kvbelt/peers", json=addresses)
        assert reply.status_code == 200
        good, refused, absent = reply.json()["peers"]
        assert good == {"engine_id": "d", "state": "ready", "reason": "", "detail": ""}
        assert (refused["state"], refused["reason"]) == ("failed", "refused_dtype")
        assert "float32 here and bfloat16 there" in refused["detail"]
        assert (absent["state"], absent["reason"]) == ("failed", "peer_unreachable")


def test_a_receiver_that_does_not_answer_holds_no_other_up():
    """The answer comes soon after the first connection. The caller asks again for the rest."""
    patient = BeltSettings(handshake_seconds=200.0)
    network = MemoryNetwork()
    with (
        Side("p", "prefill", MemoryChannel("p", network), settings=patient) as p,
        Side("d", "decode", MemoryChannel("d", network)) as d,
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
    ):
        absent = [msgspec.convert(ADDRESS | {"init_port": silent.getsockname()[1]}, ReceiverAddress)]

        async def ask():
            async with asyncio.timeout(100):
                return await connect_peers(p.belt, [d.belt.receiver_address(), *absent])

        ready, waiting = asyncio.run(ask()).peers
        assert (ready.state, waiting.state, waiting.reason) == ("ready", "failed", "not_yet")


def test_a_worker_without_a_belt_says_so():
    address = [msgspec.convert(ADDRESS, ReceiverAddress)]
    answer = asyncio.run(connect_peers(None, address))
    assert answer.peers[0].reason == "no_belt"


def test_a_worker_that_is_loading_takes_no_peers():
    """The status is 503."""
    loading = service(None)
    loading.state = State.LOADING
    with TestClient(make_app(loading)) as client:
        assert client.post("/kvbelt/peers", json=[]).status_code == 503


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{}", "list of receivers"),
        (b"\xff", "list of receivers"),
        (msgspec.json.encode([ADDRESS | {"host": "a b"}]), "host is 'a b'"),
        (msgspec.json.encode([ADDRESS] * (MAX_PEERS + 1)), f"at most {MAX_PEERS}"),
    ],
)
def test_a_wrong_body_is_refused(body, said):
    """The status is 400, and the error names what is wrong."""
    with TestClient(make_app(service(None))) as client:
        reply = client.post("/kvbelt/peers", content=body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_too_large_a_body_is_413():
    """The body is not parsed."""
    with TestClient(make_app(service(None))) as client:
        assert client.post("/kvbelt/peers", content=b" " * (1 << 20)).status_code == 413
