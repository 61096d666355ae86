"""Whatever comes over a control socket is taken, or refused and counted. Nothing that comes ends the loop.

The drivers are the real ones; their sockets are lists. Messages are made from the types of the protocol with values of
every size, and as bytes of every kind.
"""

import contextlib
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from kvbelt.security.keys import Keys, new_engine_id
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.liveness import LivenessConnections
from kvbelt.transfer.receive.driver import MAX_SENDERS, ReceiverDriver
from kvbelt.transfer.receive.incoming import IncomingTransfers, ReceiveTimes
from kvbelt.transfer.send.peers import Peers
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.send.states import PeerReady, SenderState, WritesDrained, Written
from kvbelt.transfer.sockets import Received, Sockets
from kvbelt.wire import codec, notification
from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.security.support import belts, deployment
from tests.transfer.belts import LAYOUT, identity
from tests.transfer.invariants import check_incoming
from tests.transfer.simulation.lines import Listener, Network
from tests.transfer.simulation.memory import Ether

P, D = EngineId("p"), EngineId("d")
FIT = identity("d", "decode").compatibility("memory")

integers = st.one_of(st.integers(-2, 70), st.integers(-(1 << 63), (1 << 64) - 1))
floats = st.one_of(st.sampled_from([0.0, 1e-9, 1.0, 1e308, -1.0]), st.floats())
texts = st.one_of(st.sampled_from(["", "p", "d", "t1", "t2", "lease"]), st.text(max_size=20))
slots = st.builds(SlotName, st.sampled_from([D, P, EngineId("")]), integers, integers)
senders = st.sampled_from([P, P, P, D, EngineId("q")])
transfers = st.sampled_from([TransferId("t1"), TransferId("t2"), TransferId("t3")])


def messages(*kinds: type, **fields: st.SearchStrategy) -> st.SearchStrategy:
    """Any message of these kinds. ``fields`` replaces values that would be refused at once."""
    st.register_type_strategy(SlotName, slots)
    st.register_type_strategy(int, integers)
    st.register_type_strategy(float, floats)
    st.register_type_strategy(str, texts)
    st.register_type_strategy(StepCosts, st.just(DEFAULT_COSTS))
    return st.one_of(
        *(st.builds(kind, **{name: value for name, value in fields.items() if name in kind.__struct_fields__})
          for kind in kinds)
    )  # fmt: skip


def sound_reserve() -> st.SearchStrategy:
    """A reservation that is accepted, so that later messages meet a slot."""
    return st.builds(
        lambda transfer, blocks, seconds: w.Reserve(
            transfer_id=transfer,
            sender=P,
            receiver=D,
            num_tokens=blocks * LAYOUT.block_size,
            num_blocks=blocks,
            num_bytes=LAYOUT.slot_bytes(blocks),
            deadline_seconds=seconds,
        ),
        transfers,
        st.integers(1, 3),
        st.one_of(st.just(30.0), floats),
    )


near_slots = st.builds(SlotName, st.just(D), st.integers(0, 3), st.integers(0, 3))
from_sender = st.one_of(
    sound_reserve(),
    messages(*w.FromSender.__args__, sender=senders, transfer_id=transfers, slot=near_slots),
    messages(*w.FromSender.__args__),
)
hellos = st.one_of(
    messages(h.Hello, receiver=st.just(D), role=st.just("prefill"), compatibility=st.just(FIT)),
    messages(h.Hello, engine_id=senders, receiver=st.just(D), role=st.just("both"), compatibility=st.just(FIT)),
    messages(h.Hello, h.Welcome, h.HandshakeRefused),
)  # fmt: skip
HANDSHAKES, FROM_SENDER, FROM_RECEIVER = codec.handshakes(), codec.from_sender(), codec.from_receiver()


def frames_of(messages: st.SearchStrategy, by: codec.Codec) -> st.SearchStrategy[list[bytes]]:
    """Messages, damaged messages and random bytes, sometimes in several frames or none."""
    sound = messages.map(by.encode)
    damaged = st.builds(lambda frame, end, more: frame[: end % (len(frame) + 1)] + more, sound, integers, st.binary())
    header = st.binary(max_size=300).map(lambda body: codec.MAGIC + bytes([h.PROTOCOL_VERSION]) + body)
    one = st.one_of(sound, sound, sound, damaged, header, st.binary(max_size=300))
    return st.one_of(one.map(lambda frame: [frame]), st.lists(one, max_size=3))


class Lines(Sockets):
    """Sockets without a network: the test puts received messages into ``arrived``."""

    def __init__(self) -> None:
        self.refusals = Refusals()
        self.arrived: list[Received] = []

    def bind(self, name: str, *_: object) -> tuple[zmq.Socket[bytes], int]:  # type: ignore[override]
        return name, 0  # type: ignore[return-value]

    def connect(self, kind: int, address: str, server_key: str | None) -> zmq.Socket[bytes]:
        return address  # type: ignore[return-value]

    def listen_for_liveness(self, host: str, port: int) -> Listener:
        """A listener that reports no end of a sender."""
        return Listener(Network(), "d", Ether())

    def liveness_connections(self) -> LivenessConnections:
        return LivenessConnections()

    def close(self, socket: zmq.Socket[bytes]) -> None:
        """Nothing to close."""

    def received(self, socket: zmq.Socket[bytes]) -> Iterator[Received]:
        taken, self.arrived = self.arrived, []
        return iter(taken)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    """Answers are encoded, and not sent."""
    monkeypatch.setattr(Sockets, "send", staticmethod(lambda socket, *frames: True))


def receiver(lines: Lines, now: list[float], keys: Keys | None = None) -> ReceiverDriver:
    """A receiver with room for eight blocks."""
    engine = new_engine_id(keys, "d")
    times = ReceiveTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0)
    incoming = IncomingTransfers(engine, LAYOUT, [LAYOUT.slot_bytes(8)], times)
    welcome = h.Welcome(
        engine_id=engine,
        compatibility=FIT,
        agent_metadata=b"",
        regions=(h.MemoryRegion(0, LAYOUT.slot_bytes(8), "cpu", 0),),
    )
    return ReceiverDriver(
        engine, FIT, lambda: welcome, belts(keys), lines, incoming, None, lambda call: True, lambda: now[0]
    )


wild = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@wild
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["init", "alloc", "alloc", "alloc"]).flatmap(
                lambda port: st.tuples(
                    st.just(port),
                    frames_of(hellos, HANDSHAKES) if port == "init" else frames_of(from_sender, FROM_SENDER),
                )
            ),
            st.sampled_from([0.0, 0.1, 1.0, 5.0, 1000.0]),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_a_receiver_survives_any_message(steps):
    """Its invariants hold after every message, and each invalid message is counted."""
    now, lines = [0.0], Lines()
    here = receiver(lines, now)
    sound = h.Hello(engine_id=P, receiver=D, role="prefill", compatibility=FIT)
    lines.arrived = [Received([b"route", HANDSHAKES.encode(sound)], None, "127.0.0.1")]
    here.on_messages({"init"})
    for (port, frames), seconds, claimed in steps:
        before = sum(sum(counts.values()) for counts in lines.refusals.totals().values())
        lines.arrived = [Received([b"route", *frames], None, "127.0.0.1")]
        here.on_messages({port})
        after = sum(sum(counts.values()) for counts in lines.refusals.totals().values())
        with contextlib.suppress(codec.FrameError):
            by = HANDSHAKES if port == "init" else FROM_SENDER
            if len(frames) == 1 and by.decode(frames[0]):
                continue
        assert after == before + 1, "what is no message is counted"
        if claimed:
            here.claim(TransferId("t1"), now[0] + 5.0, lambda arrival: None)
        now[0] += seconds
        here.tick(now[0])
        check_incoming(here.incoming)


@wild
@given(frames=st.lists(frames_of(st.one_of(from_sender), FROM_SENDER), max_size=10))
def test_a_message_in_another_name_changes_nothing(frames):
    """With keys, a message of q in any other name changes nothing."""
    keys, lines, now = deployment("d", "q"), Lines(), [0.0]
    here = receiver(lines, now, keys["d"])
    lines.arrived = [Received([b"route", *message], keys["q"].own.public, "") for message in frames]
    here.on_messages({"alloc"})
    assert here.incoming.states() == {}
    assert sum(sum(counts.values()) for counts in lines.refusals.totals().values()) == len(frames)


from_receiver = st.one_of(
    messages(*w.FromReceiver.__args__, slot=near_slots, transfer_id=st.just(TransferId("t"))),
    messages(w.Granted, slot=st.just(SlotName(D, 0, 1)), transfer_id=st.just(TransferId("t"))),
    messages(*w.FromReceiver.__args__),
)


@wild
@given(heard=st.lists(st.tuples(from_receiver, st.sampled_from([0.0, 0.1, 3.0])), max_size=20))
def test_a_sender_survives_any_message(heard):
    """It takes any message in any state, and ends soon after its deadline or the last message, whichever is later."""
    now, deadline = 0.0, 30.0
    times = SendTimes(heartbeat_seconds=0.25, lease_seconds=2.0, memory_seconds=5.0)
    session = SenderSession(TransferId("t"), P, D, 1, LAYOUT, deadline, times, now)
    session.handle(PeerReady(), now)
    for number, (message, seconds) in enumerate(heard):
        FROM_RECEIVER.decode(FROM_RECEIVER.encode(message))
        session.handle(message, now)
        if session.state is SenderState.WRITING and number % 3 == 2:
            session.handle(Written(), now)
        now += seconds
        session.tick(now)
    latest = max(now, deadline) + times.lease_seconds + times.memory_seconds
    while not session.ended:
        now = max(now, session.due)
        assert now <= latest
        session.tick(now)
        if session.state is SenderState.STOPPING:
            session.handle(WritesDrained(), now)


@wild
@given(answers=st.lists(frames_of(st.one_of(messages(h.Welcome, engine_id=st.just(D), compatibility=st.just(FIT)), hellos), HANDSHAKES), max_size=5))  # fmt: skip # noqa: E501
def test_a_handshake_survives_any_answer(answers):
    """Each answer connects the receiver or loses it, and none raises."""
    lines, lost = Lines(), []

    def hello(receiver: EngineId) -> h.Hello:
        return h.Hello(engine_id=P, receiver=receiver, role="prefill", compatibility=FIT)

    peers = Peers(hello, belts(None), lines, MemoryChannel("p", MemoryNetwork()))
    peer = peers.at(ReceiverAddress(D, "127.0.0.1", 1, 2), 0.0)

    def follow(changes):
        for change in changes:
            if change.lost is not None:
                lost.append(change.lost[0])
                assert peers.forget(peer)

    for frames in answers:
        lines.arrived = [Received(frames, None, "127.0.0.1")]
        follow(peers.on_handshakes({"tcp://127.0.0.1:1"}))
    follow(peers.tick(100.0))  # later than any handshake takes
    peers.liveness.close(writing=False)
    assert peer.ready or lost
    assert all(len(reason) < 100 for reason in lost)


@wild
@given(frame=st.one_of(
    messages(*notification.Notification.__args__).map(notification.encode),
    st.binary(max_size=300),
    st.integers(1, 2000).map(lambda depth: b"\x91" * depth),
))  # fmt: skip
def test_a_notification_is_one_or_a_value_error(frame):
    """The parser returns a notification or raises ValueError."""
    with contextlib.suppress(ValueError):
        assert isinstance(notification.decode(frame), msgspec.Struct)


def greet(here: ReceiverDriver, lines: Lines, keys: Keys, engine: EngineId) -> None:
    """Let a sender say hello."""
    hello = h.Hello(
        engine_id=engine,
        receiver=here.incoming._engine_id,
        role="prefill",
        compatibility=FIT,
    )
    lines.arrived = [Received([b"route", HANDSHAKES.encode(hello)], keys.own.public, "127.0.0.1")]
    here.on_messages({"init"})


def test_senders_that_only_say_hello_are_forgotten_in_time():
    """One peer may use a thousand names at a bounded cost. A sender with a transfer is not forgotten."""
    keys, lines, now = deployment("d", "p", "q"), Lines(), [0.0]
    here, p = receiver(lines, now, keys["d"]), new_engine_id(keys["p"])
    greet(here, lines, keys["p"], p)
    wanted = w.Reserve(
        transfer_id=TransferId("t"), sender=p, receiver=here.incoming._engine_id, num_tokens=1, num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1), deadline_seconds=9.0,
    )  # fmt: skip
    lines.arrived = [Received([b"route", FROM_SENDER.encode(wanted)], keys["p"].own.public, "127.0.0.1")]
    here.on_messages({"alloc"})
    for number in range(MAX_SENDERS + 100):
        now[0] += 1e-6
        greet(here, lines, keys["q"], new_engine_id(keys["q"], str(number)))
    assert len(here._senders) == MAX_SENDERS
    assert p in here._senders


def test_no_sender_is_declared_dead_by_anothers_message():
    """Several workers may share a key and an address, so only the sender's own kernel proves its death."""
    keys, lines, now = deployment("d", "p"), Lines(), [0.0]
    here, p = receiver(lines, now, keys["d"]), new_engine_id(keys["p"])
    greet(here, lines, keys["p"], p)
    wanted = w.Reserve(
        transfer_id=TransferId("t"), sender=p, receiver=here.incoming._engine_id, num_tokens=1, num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1), deadline_seconds=9.0,
    )  # fmt: skip
    lines.arrived = [Received([b"route", FROM_SENDER.encode(wanted)], keys["p"].own.public, "127.0.0.1")]
    here.on_messages({"alloc"})
    assert here.incoming.states() == {"reserved": 1}
    greet(here, lines, keys["p"], new_engine_id(keys["p"]))
    assert here.incoming.states() == {"reserved": 1}
    here.tick(5.0)
    assert here.incoming.states() == {"quarantined": 1}
    greet(here, lines, keys["p"], new_engine_id(keys["p"]))
    here.tick(1e6)
    assert here.incoming.states() == {"quarantined": 1}
