"""A worker that is told of decode workers."""

import asyncio
import socket
from contextlib import closing

import msgspec
import pytest
from starlette.testclient import TestClient

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.errors import RequestError
from kvbelt.transfer.settings import BeltSettings
from kvbelt.wire.ids import EngineId
from kvbelt.worker import peers
from kvbelt.worker.app import make_app
from kvbelt.worker.peers import MAX_PEERS, connect_peers, parse_peers
from kvbelt.worker.service import Service, State
from tests.transfer.belts import LAYOUT, Side

ADDRESS = {"engine_id": "e", "host": "127.0.0.1", "init_port": 1, "alloc_port": 1}
QUICK = BeltSettings(handshake_seconds=2.0)


def service(belt):
    """A worker with this belt and no engine, which nobody asks here."""
    made = Service(role="prefill", engine_id=EngineId("p"), model_name="m")
    made.belt, made.state = belt, State.READY
    return made


def test_each_receiver_is_answered_for(monkeypatch):
    """One is connected, one refuses with both values, one is not there: all in one answer."""
    monkeypatch.setattr(peers, "GRACE_SECONDS", 60.0)
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
    """The answer comes soon after the first connection; the rest is to be asked about again."""
    patient = BeltSettings(handshake_seconds=200.0)
    network = MemoryNetwork()
    with (
        Side("p", "prefill", MemoryChannel("p", network), settings=patient) as p,
        Side("d", "decode", MemoryChannel("d", network)) as d,
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
    ):
        absent = parse_peers(msgspec.json.encode([ADDRESS | {"init_port": silent.getsockname()[1]}]))

        async def ask():
            async with asyncio.timeout(100):
                return await connect_peers(p.belt, [d.belt.receiver_address(), *absent])

        ready, waiting = asyncio.run(ask())["peers"]
        assert (ready["state"], waiting["state"], waiting["reason"]) == ("ready", "failed", "not_yet")


def test_a_worker_without_a_belt_says_so():
    """An outcome as any other."""
    address = parse_peers(msgspec.json.encode([ADDRESS]))
    answer = asyncio.run(connect_peers(None, address))
    assert answer["peers"][0]["reason"] == "no_belt"


def test_a_worker_that_is_loading_takes_no_peers():
    """503, as for everything else."""
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
        (msgspec.json.encode([ADDRESS | {"more": 1}]), "more"),
        (msgspec.json.encode([ADDRESS] * (MAX_PEERS + 1)), f"at most {MAX_PEERS}"),
    ],
)
def test_a_wrong_body_is_refused(body, said):
    """With what is wrong in it."""
    with pytest.raises(RequestError, match=said):
        parse_peers(body)


def test_too_large_a_body_is_413():
    """Before it is parsed."""
    with TestClient(make_app(service(None))) as client:
        assert client.post("/kvbelt/peers", content=b" " * (1 << 20)).status_code == 413
