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

from kvbelt.channels.memory import MemoryChannel, MemoryNetwork
from kvbelt.security.keys import Keys, new_engine_id
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.desk import Desk, DeskTimes
from kvbelt.transfer.fencing import this_process
from kvbelt.transfer.peers import PeerEvents, Peers
from kvbelt.transfer.reception import MAX_WRITERS, Reception
from kvbelt.transfer.sender import SenderSession, SendPlan
from kvbelt.transfer.sender_states import PeerReady, Quiet, SenderState, Written
from kvbelt.transfer.sockets import Received, Sockets
from kvbelt.wire import codec, notification
from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from tests.security.support import belts, deployment
from tests.transfer.belts import LAYOUT, identity

P, D = EngineId("p"), EngineId("d")
FIT = identity("d", "decode").compatibility("memory")
HERE = this_process()

integers = st.one_of(st.integers(-2, 70), st.integers(-(1 << 63), (1 << 64) - 1))
floats = st.one_of(st.sampled_from([0.0, 1e-9, 1.0, 1e308, -1.0]), st.floats())
texts = st.one_of(st.sampled_from(["", "p", "d", "t1", "t2", "lease"]), st.text(max_size=20))
slots = st.builds(SlotName, st.sampled_from([D, P, EngineId("")]), integers, integers)
senders = st.sampled_from([P, P, P, D, EngineId("q")])
transfers = st.sampled_from([TransferId("t1"), TransferId("t2"), TransferId("t3")])


def messages(*kinds: type, **fields: st.SearchStrategy) -> st.SearchStrategy:
    """Any message of these kinds; ``fields`` where a wild value would never get far."""
    st.register_type_strategy(SlotName, slots)
    st.register_type_strategy(int, integers)
    st.register_type_strategy(float, floats)
    st.register_type_strategy(str, texts)
    return st.one_of(
        *(st.builds(kind, **{name: value for name, value in fields.items() if name in kind.__struct_fields__})
          for kind in kinds)
    )  # fmt: skip


def sound_reserve() -> st.SearchStrategy:
    """A reservation that is accepted, so that what follows meets a slot."""
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
    messages(h.Hello, engine_id=senders, receiver=st.just(D), role=st.just("both"), compatibility=st.just(FIT),
             process=st.builds(h.ProcessIdentity, st.just(HERE.boot_id), st.just(HERE.pid_namespace))),
    messages(h.Hello, h.Welcome, h.HandshakeRefused),
)  # fmt: skip
HANDSHAKES, FROM_SENDER, FROM_RECEIVER = codec.handshakes(), codec.from_sender(), codec.from_receiver()


def frames_of(messages: st.SearchStrategy, by: codec.Codec) -> st.SearchStrategy[list[bytes]]:
    """Messages, damaged messages, and bytes that never were one; now and then in several frames or none."""
    sound = messages.map(by.encode)
    damaged = st.builds(lambda frame, end, more: frame[: end % (len(frame) + 1)] + more, sound, integers, st.binary())
    header = st.binary(max_size=300).map(lambda body: codec.MAGIC + bytes([h.PROTOCOL_VERSION]) + body)
    one = st.one_of(sound, sound, sound, damaged, header, st.binary(max_size=300))
    return st.one_of(one.map(lambda frame: [frame]), st.lists(one, max_size=3))


class Lines(Sockets):
    """Sockets that are lists: what is put into ``arrived`` is what comes."""

    def __init__(self) -> None:
        self.refusals = Refusals()
        self.arrived: list[Received] = []

    def bind(self, name: str, *_: object) -> tuple[zmq.Socket[bytes], int]:  # type: ignore[override]
        """A name stands for a socket."""
        return name, 0  # type: ignore[return-value]

    def connect(self, kind: int, address: str, server_key: str | None) -> zmq.Socket[bytes]:
        """Its address stands for it."""
        return address  # type: ignore[return-value]

    def close(self, socket: zmq.Socket[bytes]) -> None:
        """Nothing is open."""

    def received(self, socket: zmq.Socket[bytes]) -> Iterator[Received]:
        """All that has come."""
        taken, self.arrived = self.arrived, []
        return iter(taken)


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    """What is answered goes nowhere, but is encoded."""
    monkeypatch.setattr(Sockets, "say", staticmethod(lambda socket, *frames: True))


def reception(lines: Lines, now: list[float], keys: Keys | None = None) -> Reception:
    """A receiver with room for eight blocks."""
    engine = new_engine_id(keys, "d")
    times = DeskTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0)
    desk = Desk(engine, LAYOUT, [LAYOUT.slot_bytes(8)], times)
    welcome = h.Welcome(
        engine_id=engine,
        compatibility=FIT,
        agent_metadata=b"",
        regions=(h.MemoryRegion(0, LAYOUT.slot_bytes(8), "cpu", 0),),
    )
    return Reception(welcome, HERE, belts(keys), lines, desk, None, lambda call: True, lambda: now[0])


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
def test_a_receiver_outlives_whatever_it_hears(steps):
    """Its invariants hold after every message; what was not understood is counted."""
    now, lines = [0.0], Lines()
    here = reception(lines, now)
    sound = h.Hello(engine_id=P, receiver=D, worker="w", role="prefill", process=HERE, compatibility=FIT)
    lines.arrived = [Received([b"route", HANDSHAKES.encode(sound)], None)]
    here.hear({"init"})
    for (port, frames), seconds, claimed in steps:
        before = sum(sum(counts.values()) for counts in lines.refusals.totals().values())
        lines.arrived = [Received([b"route", *frames], None)]
        here.hear({port})
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
        here.desk.validate()


@wild
@given(frames=st.lists(frames_of(st.one_of(from_sender), FROM_SENDER), max_size=10))
def test_nothing_of_a_key_that_is_not_the_speakers_is_taken(frames):
    """With keys: whatever q says in the name of anybody else changes nothing."""
    keys, lines, now = deployment("d", "q"), Lines(), [0.0]
    here = reception(lines, now, keys["d"])
    lines.arrived = [Received([b"route", *message], keys["q"].own.public) for message in frames]
    here.hear({"alloc"})
    assert here.desk.states() == {}
    assert sum(sum(counts.values()) for counts in lines.refusals.totals().values()) == len(frames)


from_receiver = st.one_of(
    messages(*w.FromReceiver.__args__, slot=near_slots, transfer_id=st.just(TransferId("t"))),
    messages(w.Granted, slot=st.just(SlotName(D, 0, 1)), transfer_id=st.just(TransferId("t"))),
    messages(*w.FromReceiver.__args__),
)


@wild
@given(heard=st.lists(st.tuples(from_receiver, st.sampled_from([0.0, 0.1, 3.0])), max_size=20))
def test_a_sender_outlives_whatever_it_hears(heard):
    """Any message in any state, at any time; in the end it is over within its deadline."""
    plan = SendPlan(
        transfer_id=TransferId("t"), sender=P, receiver=D, num_tokens=1, num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1), deadline=30.0, heartbeat_seconds=0.25, lease_seconds=2.0, memory_seconds=5.0,
    )  # fmt: skip
    now = 0.0
    session = SenderSession(plan, now)
    session.handle(PeerReady(), now)
    for number, (message, seconds) in enumerate(heard):
        FROM_RECEIVER.decode(FROM_RECEIVER.encode(message))
        session.handle(message, now)
        if session.state is SenderState.WRITING and number % 3 == 2:
            session.handle(Written(), now)
        now += seconds
        session.tick(now)
    while not session.ended:
        now = max(now, session.due)
        assert now <= 40.0
        session.tick(now)
        if session.state is SenderState.STOPPING:
            session.handle(Quiet(), now)


@wild
@given(answers=st.lists(frames_of(st.one_of(messages(h.Welcome, engine_id=st.just(D), compatibility=st.just(FIT)), hellos), HANDSHAKES), max_size=5))  # fmt: skip # noqa: E501
def test_a_handshake_outlives_whatever_is_answered(answers):
    """A receiver that lies is lost, or believed; what it says raises nothing."""
    lines, lost = Lines(), []
    events = PeerEvents(lambda peer: None, lambda peer, reason, detail: lost.append(reason), lambda peer: None)

    def hello(receiver: EngineId) -> h.Hello:
        return h.Hello(engine_id=P, receiver=receiver, worker="", role="prefill", process=HERE, compatibility=FIT)

    peers = Peers(hello, belts(None), lines, MemoryChannel("p", MemoryNetwork()), events)
    peer = peers.of(ReceiverAddress(D, "127.0.0.1", 1, 2), 0.0)
    for frames in answers:
        lines.arrived = [Received(frames, None)]
        peers.hear({peer.init_socket})
    peers.tick(100.0)  # later than any handshake takes
    assert peer.ready or lost
    assert all(len(reason) < 100 for reason in lost)


@wild
@given(frame=st.one_of(
    messages(*notification.Notification.__args__).map(notification.encode),
    st.binary(max_size=300),
    st.integers(1, 2000).map(lambda depth: b"\x91" * depth),
))  # fmt: skip
def test_a_notification_is_one_or_a_value_error(frame):
    """Nothing else comes out of its parser."""
    with contextlib.suppress(ValueError):
        assert isinstance(notification.decode(frame), msgspec.Struct)


def greet(here: Reception, lines: Lines, keys: Keys, engine: EngineId, worker: str = "") -> None:
    """A Hello of a process on another machine."""
    process = h.ProcessIdentity(boot_id="elsewhere", pid_namespace="", pid=1, start_time=1)
    hello = h.Hello(
        engine_id=engine,
        receiver=here.desk._engine_id,
        worker=worker,
        role="prefill",
        process=process,
        compatibility=FIT,
    )
    lines.arrived = [Received([b"route", HANDSHAKES.encode(hello)], keys.own.public)]
    here.hear({"init"})


def test_those_who_only_say_hello_are_forgotten_in_time():
    """Under a thousand names one peer costs no more memory than so much; who has something here stays known."""
    keys, lines, now = deployment("d", "p", "q"), Lines(), [0.0]
    here, p = reception(lines, now, keys["d"]), new_engine_id(keys["p"])
    greet(here, lines, keys["p"], p)
    wanted = w.Reserve(
        transfer_id=TransferId("t"), sender=p, receiver=here.desk._engine_id, num_tokens=1, num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1), deadline_seconds=9.0,
    )  # fmt: skip
    lines.arrived = [Received([b"route", FROM_SENDER.encode(wanted)], keys["p"].own.public)]
    here.hear({"alloc"})
    for number in range(MAX_WRITERS + 100):
        now[0] += 1e-6
        greet(here, lines, keys["q"], new_engine_id(keys["q"], str(number)))
    assert len(here._writers) == MAX_WRITERS
    assert p in here._writers


@pytest.mark.parametrize("same_key", [True, False])
def test_a_worker_is_declared_dead_by_its_own_next_life_only(same_key):
    """A name that another key uses as well proves nothing: the slot stays with its writer."""
    keys, lines, now = deployment("d", "p", "q"), Lines(), [0.0]
    here, p = reception(lines, now, keys["d"]), new_engine_id(keys["p"])
    greet(here, lines, keys["p"], p, worker="10.0.0.7:7100")
    wanted = w.Reserve(
        transfer_id=TransferId("t"), sender=p, receiver=here.desk._engine_id, num_tokens=1, num_blocks=1,
        num_bytes=LAYOUT.slot_bytes(1), deadline_seconds=9.0,
    )  # fmt: skip
    lines.arrived = [Received([b"route", FROM_SENDER.encode(wanted)], keys["p"].own.public)]
    here.hear({"alloc"})
    assert here.desk.states() == {"reserved": 1}
    who = keys["p" if same_key else "q"]
    greet(here, lines, who, new_engine_id(who), worker="10.0.0.7:7100")
    assert here.desk.states() == ({} if same_key else {"reserved": 1})


def test_the_size_of_a_process_id_is_checked():
    """A pid that the kernel's call would not take is not looked for."""
    from kvbelt.transfer.fencing import is_dead  # noqa: PLC0415

    for pid in (-1, 0, 1 << 31, 1 << 63):
        assert not is_dead(msgspec.structs.replace(HERE, pid=pid), HERE)
