"""The notification port with keys: each worker notifies only for itself, and no other process is heard."""

import asyncio
import contextlib
import threading

import pytest
import zmq

from kvbelt.errors import SettingsError, StartError
from kvbelt.proxy import Address, ProxySettings
from kvbelt.proxy.workers import notifications
from kvbelt.security import authenticator, keys
from kvbelt.security.keys import new_engine_id, new_key_pair
from kvbelt.wire.handoff import DecodeOutcome
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import OutcomeReport, StepsReport, TransferDone, encode
from tests.http.support import free_port
from tests.proxy.support import Deployment, async_test, eventually
from tests.security.support import deployment, knock, peer
from tests.wire.messages import STEPS


def done(sender: str) -> bytes:
    """A TransferDone of this sender."""
    return encode(
        TransferDone(
            transfer_id="t", sender=sender, receiver="d", num_bytes=1, seconds=0.1, channel="nixl", num_tokens=1,
            num_writes=1, exposed_seconds=0.0,
        )
    )  # fmt: skip


def steps(engine: str) -> bytes:
    """What an engine's steps cost."""
    return encode(StepsReport(engine=EngineId(engine), steps=STEPS))


def pushing(port: int, frame: bytes, own=None, server=None, until=None) -> None:
    """Push one message. With ``until`` stay connected until it is set, because no answer comes."""
    with peer(port, zmq.PUSH, own=own, server=server) as socket:
        socket.linger = 60_000 if until is None else 0
        if until is None:
            socket.send(frame)
            return
        knock(socket, frame)
        until.wait(60)


@async_test
async def test_only_trusted_keys_notify_and_only_of_their_own():
    """No key, an unknown key, another server's key and another sender's name are each refused and counted."""
    own = deployment("proxy", "p", "q")
    async with Deployment(keys=own["proxy"]) as running:
        port, metrics = running.proxy.notification_port, running.proxy.context.metrics
        server = own["proxy"].own.public
        frame, over = done(new_engine_id(own["p"])), threading.Event()
        refused = [
            asyncio.create_task(asyncio.to_thread(pushing, port, frame, pair, other, over))
            for pair, other in ((None, None), (new_key_pair(), server), (own["p"].own, own["q"].own.public))
        ]
        await asyncio.to_thread(pushing, port, frame, own["q"].own, server)
        await asyncio.to_thread(pushing, port, frame, own["p"].own, server)
        expected = {"handshake": 2, "unknown_key": 1, "another_key": 1}
        await eventually(lambda: metrics.transfer_size.count == 1)
        await eventually(lambda: set(metrics.refusals.totals().get("notifications", {})) == set(expected))
        over.set()
        await asyncio.gather(*refused)
        assert metrics.transfer_size.count == 1
        assert (await running.get("/health")).json["notifications"] == {"port": port, "mechanism": "CURVE"}
        text = (await running.get("/metrics")).body.decode()
        assert 'kvbelt_refused_messages_total{reason="another_key",socket="notifications"} 1.0' in text


@async_test
async def test_steps_and_outcomes_are_told_of_one_s_own_engine_only():
    """Another one's would send all prompts to it, or none."""
    own = deployment("proxy", "p", "d")
    running = Deployment(keys=own["proxy"])
    running.decode[0].engine_id = new_engine_id(own["d"])
    async with running:
        port, worker = running.proxy.notification_port, running.worker(running.decode[0])
        frame, server = steps(running.decode[0].engine_id), own["proxy"].own.public
        await asyncio.to_thread(pushing, port, frame, own["p"].own, server)
        refused = running.proxy.context.metrics.refusals.totals
        await eventually(lambda: refused() == {"notifications": {"another_key": 1}})
        assert worker.steps is None
        await asyncio.to_thread(pushing, port, frame, own["d"].own, server)
        await eventually(lambda: worker.steps == STEPS)
        outcome = DecodeOutcome(TransferId("t"), "recomputed", "deadline")
        told = encode(OutcomeReport(engine=running.decode[0].engine_id, outcome=outcome))
        await asyncio.to_thread(pushing, port, told, own["p"].own, server)
        await eventually(lambda: refused() == {"notifications": {"another_key": 2}})


@pytest.mark.parametrize("off", ["keys", "judgement", "tie"])
@async_test
async def test_with_a_mechanism_off_such_a_message_is_accepted(off, monkeypatch):
    """CURVE, the ZAP handler and the name check each refuse one of the messages above."""
    own = deployment("proxy", "p", "q")
    server, frame, pair = own["proxy"].own.public, done(new_engine_id(own["p"])), own["q"].own
    if off == "keys":
        pair = server = None
    elif off == "judgement":
        monkeypatch.setattr(authenticator.Keys, "trusts", lambda self, key: True)
        pair = new_key_pair()
        frame = done(keys.new_engine_id(keys.Keys(pair, {})))
    else:
        monkeypatch.setattr(notifications, "speaks_for", lambda key, engine: True)
    async with Deployment(keys=None if off == "keys" else own["proxy"]) as running:
        await asyncio.to_thread(pushing, running.proxy.notification_port, frame, pair, server)
        await eventually(lambda: running.proxy.context.metrics.transfer_size.count == 1)


@async_test
async def test_a_connection_that_is_not_zeromq_is_closed():
    """An HTTP request and a greeting without a key are closed. libzmq reports the second, so it is counted."""
    own = deployment("proxy")
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    async with Deployment(keys=own["proxy"]) as running:
        for rubbish in (b"GET / HTTP/1.1\r\n\r\n" + bytes(100), greeting):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.proxy.notification_port)
            writer.write(rubbish)
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(1024):
                    pass
            writer.close()
        await eventually(lambda: running.proxy.context.metrics.refusals.totals() == {"notifications": {"handshake": 1}})


def settings(**changes) -> ProxySettings:
    """Settings of a proxy with one worker."""
    return ProxySettings(decode=(Address("127.0.0.1", 1),), **changes)


def test_beyond_loopback_keys_are_asked_for():
    """The setting ``insecure`` replaces them."""
    with pytest.raises(SettingsError, match=r"--notify-host is 0\.0\.0\.0.*--key-file.*--insecure"):
        settings(notification_host="0.0.0.0")
    settings(notification_host="0.0.0.0", insecure=True)
    settings(notification_host="0.0.0.0", keys=deployment("proxy")["proxy"])
    settings(host="0.0.0.0")  # the HTTP face is another matter


@async_test
async def test_a_busy_port_is_named_with_keys_too():
    """No socket stays open."""
    own, port = deployment("proxy"), free_port()
    first = notifications.Notifications(lambda message: None, own["proxy"], authenticator.Refusals())
    second = notifications.Notifications(lambda message: None, own["proxy"], authenticator.Refusals())
    assert first.start("127.0.0.1", port) == port
    with pytest.raises(StartError, match=str(port)):
        second.start("127.0.0.1", port)
    first.close()
    assert second.start("127.0.0.1", port) == port
    second.close()
