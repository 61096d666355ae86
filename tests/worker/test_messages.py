"""What a real worker says is what its readers decode."""

import msgspec
from starlette.testclient import TestClient

from kvbelt.wire.about import ABOUT
from kvbelt.wire.health import WORKER_HEALTH, Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.peers import PEER_STATES
from kvbelt.wire.probe import PROBE_RESULT
from kvbelt.worker.app import make_app
from kvbelt.worker.service import Service


def said(client, contract: JsonMessage, method: str, path: str, body=None):
    """The answer as its type, which must hold every key that was sent."""
    reply = client.request(method, path, json=body)
    message = contract.parse(reply.content, "d")
    assert msgspec.to_builtins(message) == reply.json()
    return message


def test_a_ready_workers_health_is_its_contract(ready: Service) -> None:
    """It has the load, the receiver and the belt's counters."""
    with TestClient(make_app(ready)) as client:
        health = said(client, WORKER_HEALTH, "GET", "/health")
    assert (health.state, health.role, health.engine_id) == ("ready", Role.DECODE, ready.engine_id)
    assert health.load == msgspec.structs.replace(health.load, blocks_total=64, blocks_free=64, running=0)
    assert health.receiver == ready.belt.receiver_address()
    assert health.belt.receive_bytes > 0


def test_a_loading_workers_health_is_its_contract() -> None:
    """The status is 503, and unknown fields are left out."""
    with TestClient(make_app(Service(role=Role.PREFILL, engine_id=EngineId("p"), model_name="m"))) as client:
        health = said(client, WORKER_HEALTH, "GET", "/health")
    assert (health.status, health.state, health.load, health.belt) == ("unavailable", "loading", None, None)


def test_a_workers_other_answers_are_their_contracts(ready: Service) -> None:
    """These are /kvbelt/about, peers and a probe."""
    with TestClient(make_app(ready)) as client:
        assert said(client, ABOUT, "GET", "/kvbelt/about").engine == "embedded"
        assert said(client, PEER_STATES, "POST", "/kvbelt/peers", []).peers == []
        assert said(client, PROBE_RESULT, "POST", "/kvbelt/probe", {"engine_id": "x"}).reason == "sends_nothing"
