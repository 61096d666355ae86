"""Sessions brought into a given state, and the messages that do it."""

import msgspec

from kvbelt.transfer.receive import states as r
from kvbelt.transfer.receive.session import ReceiverSession
from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.send import states as s
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

T, P, D = TransferId("t"), EngineId("p"), EngineId("d")


NAME = SlotName(D, 0, 1)


SLOT = Slot(NAME, 0, 0, 64)


LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=64)


ROOM = r.SlotGranted(SLOT, SlotShape(LAYOUT, 1, 0, 1))


RESERVE = w.Reserve(
    transfer_id=T, sender=P, receiver=D, num_tokens=1, num_blocks=1, num_bytes=64, deadline_seconds=10.0
)


COMMIT = w.Commit(transfer_id=T, sender=P, slot=NAME, num_tokens=1, num_bytes=64)


GRANTED = w.Granted(
    transfer_id=T,
    slot=NAME,
    region=0,
    offset=0,
    num_bytes=64,
    lease_seconds=2.0,
    first_block=0,
    part_blocks=1,
    verify="off",
)


#: A prompt of two blocks that comes in two parts.
TWO = w.Reserve(transfer_id=T, sender=P, receiver=D, num_tokens=2, num_blocks=2, num_bytes=128, deadline_seconds=10.0)


ROOM_FOR_TWO = r.SlotGranted(Slot(NAME, 0, 0, 128), SlotShape(LAYOUT, 2, 0, 1))


def landed(part: int) -> w.PartLanded:
    """The event that a part has landed."""
    return w.PartLanded(transfer_id=T, sender=P, slot=NAME, part=part, digest=7)


SENDER_EVENTS = [
    GRANTED,
    w.Wait(transfer_id=T, retry_after_seconds=0.1, position=0),
    w.Refused(transfer_id=T, reason="too_large", detail=""),
    w.Renewed(transfer_id=T, slot=NAME),
    w.PartsTaken(transfer_id=T, slot=NAME, parts=1),
    w.Committed(transfer_id=T, slot=NAME),
    w.Expired(transfer_id=T, slot=NAME, reason="lease"),
    w.Cancel(transfer_id=T, slot=NAME, reason="reader_gone"),
    w.Cancelled(transfer_id=T, slot=NAME),
    s.PeerReady(),
    s.PeerFailed("peer_lost", ""),
    s.PartWritten(0, None),
    s.Written(),
    s.WriteFailed("write_failed", ""),
    s.WritesDrained(),
    s.Abort("cancelled"),
    s.BeatDue(),
    s.PeerSilent(),
    s.DeadlinePassed(),
    s.StopOverdue(),
    s.Unanswered(),
]


TO_SENDER_STATE = {
    "handshaking": [],
    "reserving": [s.PeerReady()],
    "waiting": [s.PeerReady(), SENDER_EVENTS[1]],
    "writing": [s.PeerReady(), GRANTED],
    "committing": [s.PeerReady(), GRANTED, s.Written()],
    "stopping": [s.PeerReady(), GRANTED, s.WriteFailed("write_failed", "")],
    "done": [s.PeerReady(), GRANTED, s.Written(), w.Committed(transfer_id=T, slot=NAME)],
    "failed": [s.PeerFailed("peer_unreachable", "")],
    "leaving": [s.PeerReady(), s.Abort("cancelled")],
    "cancelled": [s.Abort("cancelled")],
    "expired": [s.PeerReady(), s.DeadlinePassed(), s.Unanswered()],
}


TO_RECEIVER_STATE = {
    "expected": [r.Claim(10.0, 2.0)],
    "queued": [RESERVE],
    "reserved": [RESERVE, ROOM],
    "streaming": [TWO, ROOM_FOR_TWO, r.Claim(10.0, 2.0)],
    "taken": [TWO, ROOM_FOR_TWO, r.Claim(10.0, 2.0), landed(0), r.PartTaken(), landed(1), r.PartTaken()],
    "verifying": [RESERVE, ROOM, msgspec.structs.replace(COMMIT, digest=7)],
    "committed": [RESERVE, ROOM, COMMIT],
    "claimed": [RESERVE, ROOM, r.Claim(10.0, 2.0), COMMIT],
    "quarantined": [RESERVE, ROOM, r.LeaseLapsed()],
    "released": [RESERVE, ROOM, r.Claim(10.0, 2.0), COMMIT, r.Release()],
    "cancelled": [RESERVE, w.Cancel(transfer_id=T, sender=P, slot=None, reason="cancelled")],
    "expired": [RESERVE, r.LeaseLapsed()],
}


def sender_in(state: str) -> SenderSession:
    """A sending session that events have brought to a state."""
    session = SenderSession(T, P, D, 1, LAYOUT, 10.0, SendTimes(0.25, 2.0), 0.0)
    for event in TO_SENDER_STATE[state]:
        session.handle(event, 0.0)
    assert session.state == state
    return session


def receiver_in(state: str) -> ReceiverSession:
    """A receiving session that events have brought to a state."""
    session = ReceiverSession(T, 2.0, 10.0, "always" if state == "verifying" else "off")
    for event in TO_RECEIVER_STATE[state]:
        session.handle(event, 0.0)
    assert session.state == state
    return session
