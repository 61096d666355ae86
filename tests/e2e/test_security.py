"""``kvbelt up`` makes keys, and its control ports answer only peers that have one of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from kvbelt.ops.tiny_model import tiny_model_dir
from kvbelt.security.keys import KeyPair, load_keys, new_key_pair
from kvbelt.wire import codec
from kvbelt.wire import handshake as h
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout
from tests.e2e.asking import ask, get, until
from tests.e2e.conftest import deployment_spec
from tests.security.support import knock, peer

pytestmark = pytest.mark.e2e

BODY: dict[str, Any] = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
#: To the tiny model, whose first token is a whole character here.
TINY: dict[str, Any] = {**BODY, "prompt": "Twelve monkeys"}
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=1)


@pytest.fixture
def without_keys() -> Iterator[SyncDeployment]:
    """A deployment without keys."""
    with running(deployment_spec(tiny_model_dir(print), "1p1d", curve=False)) as deployment:
        yield deployment


def health(process: RunningProcess) -> dict[str, Any]:
    """A process's own health."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body


def refusals(process: RunningProcess, reason: str) -> float:
    """The refusals for this reason on all control ports, from the process's metrics."""
    text = get(process.url + "/metrics").text
    lines = re.findall(rf'^kvbelt_refused_messages_total{{reason="{reason}",socket="\w+"}} (\S+)', text, re.MULTILINE)
    return sum(map(float, lines))


def over_the_belt(url: str) -> bool:
    """Whether a request is answered from transferred KV."""
    reply = httpx.post(url + "/v1/completions", json=TINY, timeout=60)
    return reply.status_code == 200 and reply.headers["x-kvbelt-path"].startswith("first-token")


def hello(receiver: str) -> bytes:
    """A well-formed Hello of an unknown model."""
    fit = h.Compatibility(
        protocol=1,
        model="x",
        fingerprint="x",
        layout=LAYOUT,
        tp_size=1,
        tp_rank=0,
        hash_scheme="x",
        channel="nixl",
        kv_heads=1,
    )
    message = h.Hello(
        engine_id=EngineId("x"),
        receiver=EngineId(receiver),
        role="prefill",
        compatibility=fit,
    )
    return codec.handshakes().encode(message)


@pytest.mark.parametrize("key", ["none", "unknown"])
def test_a_deployment_has_keys_and_answers_no_other_peer(one_p_one_d: SyncDeployment, key: str) -> None:
    """Every port uses CURVE. A Hello without a trusted key is counted and not answered."""
    prefill, decode, proxy = (one_p_one_d.process(name) for name in ("prefill-0", "decode-0", "proxy"))
    assert ask(one_p_one_d.url, BODY, stream=False).path.startswith("first-token")
    assert health(prefill)["belt"]["mechanism"] == health(decode)["belt"]["mechanism"] == "CURVE"
    assert health(proxy)["notifications"]["mechanism"] == "CURVE"
    receiver = health(decode)["receiver"]
    own: KeyPair | None = new_key_pair() if key == "unknown" else None
    reason = "unknown_key" if key == "unknown" else "handshake"
    before = refusals(decode, reason)
    with peer(receiver["init_port"], own=own, server=receiver["public_key"], wait_ms=0) as socket:
        knock(socket, hello(receiver["engine_id"]))
        until(lambda: refusals(decode, reason) > before, what="it is counted")
        assert ask(one_p_one_d.url, BODY, stream=False).path.startswith("first-token")
        with pytest.raises(zmq.Again):
            socket.recv()
    before = refusals(proxy, reason)
    with peer(one_p_one_d.ports.notify, zmq.PUSH, own=own, server=_proxy_key(prefill)) as socket:
        knock(socket, b"rubbish")
        until(lambda: refusals(proxy, reason) > before, what="it is counted")


def test_without_keys_such_a_peer_is_answered(without_keys: SyncDeployment) -> None:
    """So the test above can fail."""
    receiver = health(without_keys.process("decode-0"))["receiver"]
    assert "public_key" not in receiver
    assert health(without_keys.process("decode-0"))["belt"]["mechanism"] == "NULL"
    with peer(receiver["init_port"]) as socket:
        socket.send(hello(receiver["engine_id"]))
        assert isinstance(codec.handshakes().decode(socket.recv()), h.HandshakeRefused)


def test_notifications_arrive_and_restarted_workers_are_let_in() -> None:
    """A restarted worker has the same key. Its next transfer is done, and the proxy is notified."""
    with running(deployment_spec(tiny_model_dir(print), "1p1d")) as deployment:
        for name in ("prefill-0", "decode-0", "proxy"):
            deployment.restart(name)
            until(
                lambda: over_the_belt(deployment.url),
                what=f"an answer over the belt after the restart of {name}",
            )
            told = deployment.url + "/kvbelt/requests"
            until(
                lambda told=told: (get(told).json()["requests"][0]["transfer"] or {}).get("state") == "done",
                what="the proxy is told of the transfer",
            )


def _proxy_key(prefill: RunningProcess) -> str:
    argv = Path(f"/proc/{prefill.pid}/cmdline").read_bytes().decode().split("\0")
    folder = Path(argv[argv.index("--config") + 1]).parent
    key = load_keys(folder / "prefill-0.key_secret", folder / "trusted").public_key_of("proxy")
    assert key is not None
    return key
