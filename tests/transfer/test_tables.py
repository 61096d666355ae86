"""The transition tables: complete, closed, and the machines keep to them."""

import msgspec
import pytest

from kvbelt.transfer import receiver_states as r
from kvbelt.transfer import sender_states as s
from kvbelt.transfer.machine import IllegalTransitionError
from kvbelt.transfer.receiver import ReceiverSession
from kvbelt.transfer.sender import SenderSession, SendPlan
from kvbelt.transfer.shape import SlotShape
from kvbelt.transfer.slots import Slot
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

T, P, D = TransferId("t"), EngineId("p"), EngineId("d")
NAME = SlotName(D, 0, 1)
SLOT = Slot(NAME, 0, 0, 64)
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=64)
ROOM = r.Room(SLOT, SlotShape(LAYOUT, 1, 0, 1))

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
ROOM_FOR_TWO = r.Room(Slot(NAME, 0, 0, 128), SlotShape(LAYOUT, 2, 0, 1))


def landed(part: int) -> w.PartLanded:
    """A part is there."""
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
    s.Quiet(),
    s.Abandon("cancelled"),
    s.BeatDue(),
    s.PeerSilent(),
    s.DeadlinePassed(),
    s.StopOverdue(),
    s.Unanswered(),
]
RECEIVER_EVENTS = [
    RESERVE,
    w.Heartbeat(transfer_id=T, sender=P, slot=NAME),
    landed(0),
    COMMIT,
    w.Cancel(transfer_id=T, sender=P, slot=NAME, reason="cancelled"),
    w.Cancelled(transfer_id=T, sender=P, slot=NAME),
    ROOM,
    r.Verified(None, right=True),
    r.PartTaken(),
    r.Claim(10.0, 2.0),
    r.Unclaim(),
    r.Release(),
    r.WriterDead(),
    r.LeaseLapsed(),
    r.DeadlinePassed(),
    r.ReminderDue(),
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
    "leaving": [s.PeerReady(), s.Abandon("cancelled")],
    "cancelled": [s.Abandon("cancelled")],
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
    """A sending session, brought to a state by events."""
    session = SenderSession(SendPlan(T, P, D, 1, 1, 64, 10.0, 0.25, 2.0), 0.0)
    for event in TO_SENDER_STATE[state]:
        session.handle(event, 0.0)
    assert session.state == state
    return session


def receiver_in(state: str) -> ReceiverSession:
    """A receiving session, brought to a state by events."""
    session = ReceiverSession(T, 2.0, 10.0, "always" if state == "verifying" else "off")
    for event in TO_RECEIVER_STATE[state]:
        session.handle(event, 0.0)
    assert session.state == state
    return session


@pytest.mark.parametrize("event", SENDER_EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", list(s.SenderState))
def test_every_sender_state_handles_or_refuses_every_event(state, event):
    """An event leads where the table says, and one the table does not know raises with the story."""
    session = sender_in(state)
    allowed = s.SENDER_TABLE[state].get(type(event))
    if allowed is None:
        with pytest.raises(IllegalTransitionError, match=f"in state {state}"):
            session.handle(event, 1.0)
        assert session.state == state
    else:
        session.handle(event, 1.0)
        assert session.state in allowed


@pytest.mark.parametrize("event", RECEIVER_EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", list(r.ReceiverState))
def test_every_receiver_state_handles_or_refuses_every_event(state, event):
    """The same on the receiving side."""
    session = receiver_in(state)
    allowed = r.RECEIVER_TABLE[state].get(type(event))
    if allowed is None:
        with pytest.raises(IllegalTransitionError, match=f"in state {state}"):
            session.handle(event, 1.0)
        assert session.state == state
    else:
        session.handle(event, 1.0)
        assert session.state in allowed


@pytest.mark.parametrize("table", [s.SENDER_TABLE, r.RECEIVER_TABLE])
def test_tables_are_closed(table):
    """Every state has a row, and every arrow ends in a state of the same table."""
    states = set(type(next(iter(table))))
    assert set(table) == states
    assert {end for row in table.values() for ends in row.values() for end in ends} <= states


def test_whatever_a_peer_says_is_defined_in_every_sender_state():
    """No message of a peer can raise."""
    for row in s.SENDER_TABLE.values():
        assert set(s.FROM_PEER) <= set(row)


def test_whatever_a_writer_says_is_defined_in_every_receiver_state():
    """No message of a writer can raise."""
    for row in r.RECEIVER_TABLE.values():
        assert {w.Reserve, w.Heartbeat, w.PartLanded, w.Commit, w.Cancel, w.Cancelled} <= set(row)


@pytest.mark.parametrize("state", sorted(s.FINAL))
def test_final_sender_states_never_leave(state):
    """What has ended stays ended."""
    assert all(ends == {state} for ends in s.SENDER_TABLE[state].values())


@pytest.mark.parametrize("state", sorted(r.FINAL))
def test_final_receiver_states_never_leave(state):
    """What has ended stays ended."""
    assert all(ends == {state} for ends in r.RECEIVER_TABLE[state].values())
