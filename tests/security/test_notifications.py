"""The notification port with keys: prefill workers tell of their own transfers, and nobody else tells anything."""

import asyncio
import contextlib
import threading

import pytest
import zmq

from kvbelt.errors import SettingsError, StartError
from kvbelt.proxy import Address, ProxySettings, notifications
from kvbelt.security import gate, keys
from kvbelt.security.keys import new_engine_id, new_key_pair
from kvbelt.wire.notification import TransferDone, encode
from tests.http.support import free_port
from tests.proxy.support import Deployment, async_test, eventually
from tests.security.support import deployment, knock, peer


def done(sender: str) -> bytes:
    """Somebody's transfer is done."""
    return encode(
        TransferDone(
            transfer_id="t", sender=sender, receiver="d", num_bytes=1, seconds=0.1, channel="nixl", num_tokens=1,
            num_writes=1, exposed_seconds=0.0,
        )
    )  # fmt: skip


def pushing(port: int, frame: bytes, own=None, server=None, until=None) -> None:
    """Push one message; stay until ``until`` is set, if given, for nobody answers."""
    with peer(port, zmq.PUSH, own=own, server=server) as socket:
        socket.linger = 60_000 if until is None else 0
        if until is None:
            socket.send(frame)
            return
        knock(socket, frame)
        until.wait(60)


@async_test
async def test_only_trusted_keys_notify_and_only_of_their_own():
    """Without a key, with an unknown one, for another server, in another's name: each is refused and counted."""
    own = deployment("proxy", "p", "q")
    async with Deployment(keys=own["proxy"]) as running:
        port, metrics = running.proxy.notification_port, running.proxy.context.metrics
        server = own["proxy"].own.public
        frame, over = done(new_engine_id(own["p"])), threading.Event()
        strangers = [
            asyncio.create_task(asyncio.to_thread(pushing, port, frame, pair, other, over))
            for pair, other in ((None, None), (new_key_pair(), server), (own["p"].own, own["q"].own.public))
        ]
        await asyncio.to_thread(pushing, port, frame, own["q"].own, server)
        await asyncio.to_thread(pushing, port, frame, own["p"].own, server)
        expected = {"handshake": 2, "unknown_key": 1, "another_key": 1}
        await eventually(lambda: metrics.transfer_size.count == 1)
        await eventually(lambda: set(metrics.refusals.totals().get("notifications", {})) == set(expected))
        over.set()
        await asyncio.gather(*strangers)
        assert metrics.transfer_size.count == 1
        assert (await running.get("/health")).json["notifications"] == {"port": port, "mechanism": "CURVE"}
        text = (await running.get("/metrics")).body.decode()
        assert 'kvbelt_refused_messages_total{reason="another_key",socket="notifications"} 1.0' in text


@pytest.mark.parametrize("off", ["keys", "judgement", "tie"])
def test_with_a_mechanism_off_the_same_is_taken(off, monkeypatch):
    """What the test above refuses is refused by the keys, by the gate's judgement, and by the tie to the name."""
    own = deployment("proxy", "p", "q")
    server, frame, pair = own["proxy"].own.public, done(new_engine_id(own["p"])), own["q"].own
    if off == "keys":
        pair = server = None
    elif off == "judgement":
        monkeypatch.setattr(gate.Keys, "trusts", lambda self, key: True)
        pair = new_key_pair()
        frame = done(keys.new_engine_id(keys.Keys(pair, {})))
    else:
        monkeypatch.setattr(notifications, "speaks_for", lambda key, engine: True)

    @async_test
    async def taken():
        async with Deployment(keys=None if off == "keys" else own["proxy"]) as running:
            await asyncio.to_thread(pushing, running.proxy.notification_port, frame, pair, server)
            await eventually(lambda: running.proxy.context.metrics.transfer_size.count == 1)

    taken()


@async_test
async def test_what_is_not_zeromq_is_hung_up_on():
    """A scanner, and a greeting without a key. libzmq tells of the second, so that it is counted."""
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
    """Of a proxy with one worker."""
    return ProxySettings(decode=(Address("127.0.0.1", 1),), **changes)


def test_beyond_loopback_keys_are_asked_for():
    """Or the explicit word."""
    with pytest.raises(SettingsError, match=r"--notify-host is 0\.0\.0\.0.*--key-file.*--insecure"):
        settings(notification_host="0.0.0.0")
    settings(notification_host="0.0.0.0", insecure=True)
    settings(notification_host="0.0.0.0", keys=deployment("proxy")["proxy"])
    settings(host="0.0.0.0")  # the HTTP face is another matter


@async_test
async def test_a_busy_port_is_named_with_keys_too():
    """And nothing stays open."""
    own, port = deployment("proxy"), free_port()
    first = notifications.Notifications(lambda message: None, own["proxy"], gate.Refusals())
    second = notifications.Notifications(lambda message: None, own["proxy"], gate.Refusals())
    assert first.start("127.0.0.1", port) == port
    with pytest.raises(StartError, match=str(port)):
        second.start("127.0.0.1", port)
    first.close()
    assert second.start("127.0.0.1", port) == port
    second.close()
