"""Belts with keys and real sockets: a peer without a key gets nothing, and a key counts for its own name only."""

import contextlib
import socket as sockets
import threading

import msgspec
import pytest
import zmq

from kvbelt.errors import SettingsError
from kvbelt.security import authenticator
from kvbelt.security.keys import Keys, new_engine_id, new_key_pair
from kvbelt.transfer.receive import driver as receiver
from kvbelt.transfer.receive import incoming
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire import codec
from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.security.support import belts, deployment, knock, peer
from tests.transfer.belts import LAYOUT, Side, begin, eventually, hand_over, transfer_once

HANDSHAKES, FROM_SENDER, FROM_RECEIVER = codec.handshakes(), codec.from_sender(), codec.from_receiver()


@pytest.fixture
def channel():
    """Makes channels of one network."""
    network = MemoryNetwork()
    return lambda name: MemoryChannel(name, network)


@pytest.fixture
def trusted():
    """Keys of a prefill worker p, a decode worker d and another trusted worker q."""
    return deployment("p", "d", "q", "proxy")


@pytest.fixture
def pair(channel, trusted):
    """A prefill and a decode worker with keys."""
    with (
        Side("p", "prefill", channel("p"), settings=belts(trusted["p"])) as p,
        Side("d", "decode", channel("d"), settings=belts(trusted["d"])) as d,
    ):
        p.fill(1)
        yield p, d


def refused(side: Side) -> dict[str, dict[str, int]]:
    """The belt's refusals, by socket and reason."""
    return {name: dict(counts) for name, counts in side.belt.snapshot().refused_total.items()}


def hello(engine: EngineId, to: Side) -> bytes:
    """A Hello of a prefill worker of this name."""
    belt = to.belt
    message = h.Hello(
        engine_id=engine,
        receiver=belt.identity.engine_id,
        role="prefill",
        compatibility=belt.identity.compatibility("memory"),
    )
    return HANDSHAKES.encode(message)


def reserve(engine: EngineId, to: Side, transfer: str = "t") -> bytes:
    """A reservation of one block."""
    message = w.Reserve(
        transfer_id=TransferId(transfer),
        sender=engine,
        receiver=to.belt.identity.engine_id,
        num_tokens=1,
        num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1),
        deadline_seconds=30.0,
    )
    return FROM_SENDER.encode(message)


def test_every_byte_arrives_under_keys(pair):
    """The mechanism is CURVE on both sides, and nothing is refused."""
    p, d = pair
    for number in range(3):
        transfer_once(p, d, f"t{number}", 100, seed=number)
    assert (p.belt.snapshot().mechanism, d.belt.snapshot().mechanism) == ("CURVE", "CURVE")
    assert (refused(p), refused(d)) == ({}, {})


UNTRUSTED = {
    "no key": lambda keys: (None, None, "handshake"),
    "an unknown key": lambda keys: (new_key_pair(), keys["d"].own.public, "unknown_key"),
    "another server in mind": lambda keys: (keys["p"].own, keys["q"].own.public, "handshake"),
}


@pytest.mark.parametrize("credentials", UNTRUSTED)
@pytest.mark.parametrize("port", ["init", "alloc"])
def test_a_peer_without_a_trusted_key_gets_no_answer(pair, trusted, credentials, port):
    """It gets no byte on either port and is counted, and transfers of others go on."""
    p, d = pair
    own, server, reason = UNTRUSTED[credentials](trusted)
    address = d.belt.receiver_address()
    engine = new_engine_id(trusted["p"])
    with peer(getattr(address, f"{port}_port"), own=own, server=server, wait_ms=0) as socket:
        knock(socket, hello(engine, d) if port == "init" else reserve(engine, d))
        eventually(lambda: refused(d).get(port, {}).get(reason, 0) > 0, "it was counted")
        transfer_once(p, d, "a", 100)  # the thread that would have answered has been around meanwhile
        with pytest.raises(zmq.Again):
            socket.recv()


@pytest.mark.parametrize("port", ["init", "alloc"])
def test_without_keys_such_a_peer_is_answered(channel, port):
    """With CURVE off the peer of the test above gets an answer, so that test can fail."""
    with Side("d", "decode", channel("d"), settings=belts(None)) as d:
        with peer(getattr(d.belt.receiver_address(), f"{port}_port")) as socket:
            socket.send(hello(EngineId("x"), d) if port == "init" else reserve(EngineId("x"), d))
            assert socket.recv()
        assert d.belt.snapshot().mechanism == "NULL"


def test_a_gate_that_trusts_every_key_lets_unknown_keys_in(pair, trusted, monkeypatch):
    """Without the check of the key an unknown key is answered."""
    _, d = pair
    monkeypatch.setattr(authenticator.Keys, "trusts", lambda self, key: True)
    unknown = new_key_pair()
    engine = new_engine_id(Keys(unknown, {}))
    with peer(d.belt.receiver_address().init_port, own=unknown, server=trusted["d"].own.public) as socket:
        socket.send(hello(engine, d))
        assert isinstance(HANDSHAKES.decode(socket.recv()), h.Welcome)


def test_without_an_answer_of_the_gate_no_peer_passes(pair, trusted, monkeypatch):
    """The ports are closed while the ZAP handler does not answer."""
    _, d = pair
    monkeypatch.setattr(authenticator.ZapAuthenticator, "_answer_requests", lambda self: False)
    with peer(
        d.belt.receiver_address().init_port, own=trusted["p"].own, server=trusted["d"].own.public, wait_ms=500
    ) as socket:
        socket.send(hello(new_engine_id(trusted["p"]), d))
        with pytest.raises(zmq.Again):
            socket.recv()


def test_without_a_gate_no_peer_passes(channel, trusted, monkeypatch):
    """Without a ZAP handler libzmq would accept every key; here no peer is let in."""
    monkeypatch.setattr(authenticator, "_ZAP_ADDRESS", "inproc://elsewhere")
    with (
        Side("d", "decode", channel("d"), settings=belts(trusted["d"])) as d,
        peer(
            d.belt.receiver_address().init_port, own=trusted["p"].own, server=trusted["d"].own.public, wait_ms=500
        ) as socket,
    ):
        socket.send(hello(new_engine_id(trusted["p"]), d))
        with pytest.raises(zmq.Again):
            socket.recv()


@pytest.mark.parametrize("tied", [True, False])
def test_a_trusted_peer_speaks_only_for_itself(pair, trusted, monkeypatch, tied):
    """Q is refused and counted on both ports when it uses p's name. Without the name check q is answered."""
    _, d = pair
    if not tied:
        monkeypatch.setattr(receiver, "_may_speak", lambda key, engine: True)
    stolen, address = new_engine_id(trusted["p"]), d.belt.receiver_address()
    q, server = trusted["q"].own, trusted["d"].own.public
    with peer(address.init_port, own=q, server=server) as socket:
        socket.send(hello(stolen, d))
        answer = HANDSHAKES.decode(socket.recv())
    with peer(address.alloc_port, own=q, server=server, wait_ms=60_000 if not tied else 200) as socket:
        socket.send(reserve(stolen, d))
        if not tied:
            assert isinstance(answer, h.Welcome)
            assert isinstance(FROM_RECEIVER.decode(socket.recv()), w.Granted)
            return
        assert isinstance(answer, h.HandshakeRefused)
        assert answer.field == "key"
        eventually(lambda: refused(d) == {"init": {"another_key": 1}, "alloc": {"another_key": 1}}, "both are counted")
        with pytest.raises(zmq.Again):
            socket.recv()
        socket.rcvtimeo = 60_000
        socket.send(reserve(new_engine_id(trusted["q"]), d))
        assert FROM_RECEIVER.decode(socket.recv()).reason == "no_handshake"


def recorded(p: Side, d: Side, monkeypatch) -> list[bytes]:
    """Make one transfer from p to d. Returns all that p has sent to the alloc port, in order."""
    said: list[bytes] = []
    say = Sockets.send

    def listen(socket, *frames):
        if len(frames) == 1:
            said.append(frames[0])
        return say(socket, *frames)

    monkeypatch.setattr(Sockets, "send", staticmethod(listen))
    transfer_once(p, d, "recorded", 100)
    monkeypatch.undo()
    frames = []
    for frame in said:
        try:
            FROM_SENDER.decode(frame)
        except codec.FrameError:
            continue  # a Hello
        frames.append(frame)
    kinds = {type(FROM_SENDER.decode(frame)) for frame in frames}
    assert {w.Reserve, w.Commit} <= kinds
    return frames


def test_a_transfer_replayed_in_another_name_is_refused(pair, trusted, monkeypatch):
    """A trusted peer replays another peer's messages. Each is counted, and none is answered."""
    p, d = pair
    frames = recorded(p, d, monkeypatch)
    before = d.belt.snapshot()
    with peer(
        d.belt.receiver_address().alloc_port, own=trusted["q"].own, server=trusted["d"].own.public, wait_ms=0
    ) as socket:
        socket.sndtimeo = 60_000
        for frame in frames:
            socket.send(frame)
        eventually(lambda: refused(d) == {"alloc": {"another_key": len(frames)}}, "all is counted")
        with pytest.raises(zmq.Again):
            socket.recv()
    assert msgspec.structs.replace(d.belt.snapshot(), refused_total={}) == before
    transfer_once(p, d, "b", 100)


@pytest.mark.parametrize("order", ["as it was", "backwards"])
def test_a_transfer_replayed_in_its_own_name_changes_nothing(pair, trusted, monkeypatch, order):
    """A sender repeats its ended transfer. Nothing is reserved, committed or delivered again."""
    p, d = pair
    frames = recorded(p, d, monkeypatch)
    before = d.belt.snapshot()
    with peer(d.belt.receiver_address().alloc_port, own=trusted["p"].own, server=trusted["d"].own.public) as socket:
        for frame in frames if order == "as it was" else reversed(frames):
            socket.send(frame)
        reserves = sum(isinstance(FROM_SENDER.decode(frame), w.Reserve) for frame in frames)
        eventually(lambda: refused(d) == {"alloc": {"ended": reserves}}, "the reservations are refused and counted")
        answer = FROM_RECEIVER.decode(socket.recv())
        assert isinstance(answer, w.Refused | w.Committed)
    assert msgspec.structs.replace(d.belt.snapshot(), refused_total={}) == before
    transfer_once(p, d, "b", 100)


class Tap:
    """A relay between two ports that keeps every byte of its first client."""

    def __init__(self, port: int) -> None:
        self.bytes = b""
        self._to = port
        self._listener = sockets.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        self._listener.close()
        server = sockets.create_connection(("127.0.0.1", self._to))
        threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
        self._pump(client, server, keep=True)

    def _pump(self, source: sockets.socket, target: sockets.socket, *, keep: bool = False) -> None:
        with contextlib.suppress(OSError):  # the other direction has closed both
            while data := source.recv(65536):
                if keep:
                    self.bytes += data
                target.sendall(data)
        target.close()
        source.close()


def test_a_replayed_connection_is_refused(pair, trusted):
    """Recorded bytes fail in the handshake."""
    _, d = pair
    address = d.belt.receiver_address()
    tap = Tap(address.init_port)
    with peer(tap.port, own=trusted["p"].own, server=trusted["d"].own.public) as socket:
        socket.send(hello(new_engine_id(trusted["p"]), d))
        assert isinstance(HANDSHAKES.decode(socket.recv()), h.Welcome)
    assert refused(d) == {}
    assert b"Hello" not in tap.bytes  # nor can it be read
    with sockets.create_connection(("127.0.0.1", address.init_port), timeout=60) as thief:
        thief.sendall(tap.bytes)
        while thief.recv(65536):
            pass  # a greeting; then it hangs up
    eventually(lambda: refused(d) == {"init": {"handshake": 1}}, "it is counted")


def test_what_comes_too_early_or_too_late_is_refused_and_counted(pair, trusted):
    """A commit before the grant, a wrong generation and an unknown transfer change nothing."""
    _, d = pair
    engine, address = new_engine_id(trusted["p"], "raw"), d.belt.receiver_address()
    own, server = trusted["p"].own, trusted["d"].own.public
    with peer(address.init_port, own=own, server=server) as socket:
        socket.send(hello(engine, d))
        assert isinstance(HANDSHAKES.decode(socket.recv()), h.Welcome)
    with peer(address.alloc_port, own=own, server=server) as socket:

        def say(message):
            socket.send(message if isinstance(message, bytes) else FROM_SENDER.encode(message))
            return FROM_RECEIVER.decode(socket.recv())

        guess = SlotName(d.belt.identity.engine_id, 0, 1)
        commit = w.Commit(
            transfer_id=TransferId("t"),
            sender=engine,
            slot=guess,
            num_tokens=1,
            num_bytes=LAYOUT.slot_bytes(1),
            digest=0,  # of a buffer without writes
        )
        assert say(commit) == w.Expired(transfer_id=TransferId("t"), slot=guess, reason="unknown_transfer")
        granted = say(reserve(engine, d))
        assert isinstance(granted, w.Granted)
        slot = granted.slot
        later = SlotName(slot.engine_id, slot.slot, slot.generation + 1)
        assert say(msgspec.structs.replace(commit, slot=later)).reason == "stale_slot"
        assert say(w.Heartbeat(transfer_id=TransferId("t"), sender=engine, slot=later)).reason == "stale_slot"
        assert d.belt.snapshot().bytes_committed == 0
        assert isinstance(say(msgspec.structs.replace(commit, slot=slot)), w.Committed)
    assert refused(d) == {"alloc": {"unknown_transfer": 1, "stale_slot": 2}}


def test_a_frame_larger_than_anything_ends_its_connection(pair, trusted):
    """The frame is not read. A smaller one above the limit is only counted. Transfers of others go on."""
    p, d = pair
    address = d.belt.receiver_address()
    with peer(address.alloc_port, own=trusted["q"].own, server=trusted["d"].own.public) as socket:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        monitor.rcvtimeo = 60_000
        socket.send(bytes(codec.MAX_RESERVATION_BYTES + 1))
        eventually(lambda: refused(d) == {"alloc": {"oversized": 1}}, "it is counted")
        socket.send(bytes(authenticator.MAX_MESSAGE_BYTES + 1))
        assert monitor.recv_multipart()  # hung up
        socket.disable_monitor()
        monitor.close()
    transfer_once(p, d, "a", 100)


DISTRUST = {
    "the decode worker has no key": (
        lambda keys, a: (keys["p"], msgspec.structs.replace(a, public_key=None)),
        "no_key",
    ),
    "the prefill worker has no key": (lambda keys, a: (None, a), "no_key"),
    "its key is not trusted": (
        lambda keys, a: (Keys(keys["p"].own, {keys["p"].own.public: "p"}), a),
        "untrusted_key",
    ),
    "another's key is given for it": (
        lambda keys, a: (keys["p"], msgspec.structs.replace(a, public_key=keys["q"].own.public)),
        "another_key",
    ),
    "another's name is given for it": (
        lambda keys, a: (keys["p"], msgspec.structs.replace(a, engine_id=new_engine_id(keys["q"]))),
        "another_key",
    ),
}


@pytest.mark.parametrize("case", DISTRUST)
def test_a_prefill_worker_sends_only_to_trusted_receivers(channel, trusted, pair, case):
    """A receiver's key must be among this worker's trusted keys, whatever the proxy says."""
    _, d = pair
    make, reason = DISTRUST[case]
    keys, address = make(trusted, d.belt.receiver_address())
    with Side("p2", "prefill", channel("p2"), settings=belts(keys)) as p:
        _, sent = begin(p, address, "t", 100)
        assert sent.outcome().reason == reason
        assert sent.blocks_free.is_set()


def test_another_process_in_the_receivers_place_gets_no_kv(channel, trusted):
    """A sender sends nothing to a listener that has the receiver's address but not its key."""
    with (
        Side("p", "prefill", channel("p"), settings=belts(trusted["p"], handshake_seconds=1.0)) as p,
        Side("q", "decode", channel("q"), settings=belts(trusted["q"])) as q,
    ):
        there = q.belt.receiver_address()
        d = new_engine_id(trusted["d"])
        address = msgspec.structs.replace(there, engine_id=d, public_key=trusted["d"].own.public)
        sending, sent = begin(p, address, "t", 100)
        hand_over(sending, LAYOUT, list(range(7)))
        outcome = sent.outcome()
        assert outcome.reason == "peer_unreachable"
        assert "may not trust this worker's key" in outcome.detail
        assert outcome.num_bytes == 0
        eventually(lambda: refused(q)["init"]["handshake"] > 0, "it is counted")


def test_names_and_keys_must_fit_at_the_start(channel, trusted):
    """An engine id must go with the key, and the proxy's key must be known."""
    with pytest.raises(SettingsError, match="does not go with this process's key"):
        Side("d", "decode", channel("d"), settings=belts(trusted["d"]), engine_id=EngineId("d"))
    lonely = Keys(trusted["p"].own, {trusted["p"].own.public: "p"})
    with pytest.raises(SettingsError, match=r"proxy\.key"):
        belts(lonely, notification_endpoint="tcp://127.0.0.1:7500")


def test_a_belt_listens_beyond_loopback_with_keys_or_when_told_to(channel, trusted):
    """The belt checks its own settings. A sender listens nowhere and needs no keys."""
    everywhere = {"bind_host": "0.0.0.0"}
    with pytest.raises(SettingsError, match=r"bind_host is 0\.0\.0\.0"):
        Side("d", "decode", channel("d"), settings=belts(None, **everywhere))
    for number, settings in enumerate((belts(None, insecure=True, **everywhere), belts(trusted["d"], **everywhere))):
        with Side("d", "decode", channel(f"d{number}"), settings=settings):
            pass
    with Side("p", "prefill", channel("p"), settings=belts(None, **everywhere)):
        pass


@pytest.mark.parametrize("bounded", [True, False])
def test_a_writer_may_open_so_many_transfers_and_no_more(channel, trusted, monkeypatch, bounded):
    """A flood of reservations leaves room for others. Without the limit it takes all of the buffer."""
    if bounded:
        monkeypatch.setattr(incoming, "MAX_OPEN", 100)
    engine, room = new_engine_id(trusted["q"]), 150  # slots of one block
    with Side(
        "d", "decode", channel("d"), settings=belts(trusted["d"], lease_seconds=60.0), staging_blocks=4 * room
    ) as d:
        address = d.belt.receiver_address()
        own, server = trusted["q"].own, trusted["d"].own.public
        with peer(address.init_port, own=own, server=server) as socket:
            socket.send(hello(engine, d))
            socket.recv()
        with peer(address.alloc_port, own=own, server=server) as socket:
            for number in range(room + 100):
                socket.send(reserve(engine, d, f"flood-{number}"))
            for _ in range(room + 100):
                socket.recv()  # everything was taken up
        snapshot = d.belt.snapshot()
        assert (snapshot.bytes_reserved < snapshot.receive_bytes) is bounded
        assert ("too_many" in refused(d).get("alloc", {})) is bounded
        if bounded:
            with Side("p", "prefill", channel("p"), settings=belts(trusted["p"])) as p:
                p.fill(1)
                transfer_once(p, d, "a", 100)
