"""The sending session: what it says, when, and how it ends."""

import msgspec
import pytest

from kvbelt.transfer.send.session import AbortWrites, BeginWriting, Outcome, Send, StopWriting
from kvbelt.transfer.send.states import Abort, PeerFailed, SenderState, StopOverdue, WriteFailed, WritesDrained, Written
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName
from tests.transfer.sessions import GRANTED, NAME, D, P, T, sender_in


def said(commands):
    """The messages among commands."""
    return [command.message for command in commands if isinstance(command, Send)]


def outcomes(commands):
    """The outcomes among commands."""
    return [command for command in commands if isinstance(command, Outcome)]


def test_reserve_carries_the_remaining_time():
    """A repeated Reserve carries fewer remaining seconds."""
    session = sender_in("reserving")
    (again,) = said(session.tick(0.25))
    assert isinstance(again, w.Reserve)
    assert again.deadline_seconds == pytest.approx(9.75)


def test_a_grant_starts_the_writing():
    """A grant starts the writing, with the slot and its place."""
    assert sender_in("reserving").handle(GRANTED, 0.1) == [BeginWriting(GRANTED)]


def test_a_slot_of_another_incarnation_of_the_receiver_is_ignored():
    """A grant that names another engine is ignored."""
    session = sender_in("reserving")
    stale = msgspec.structs.replace(GRANTED, slot=SlotName(EngineId("old"), 0, 1))
    assert session.handle(stale, 0.1) == []
    assert session.state is SenderState.RESERVING


def test_what_names_an_older_generation_changes_nothing():
    """An Expired about an earlier use of the slot is ignored."""
    session = sender_in("writing")
    older = w.Expired(transfer_id=T, slot=SlotName(D, 0, 0), reason="lease")
    assert session.handle(older, 0.1) == []
    assert session.state is SenderState.WRITING


def test_a_writer_keeps_its_lease_alive():
    """A sender sends a heartbeat at every beat while answers come."""
    session = sender_in("writing")
    beats = 0
    for step in range(1, 20):
        now = step * 0.25
        beats += sum(isinstance(message, w.Heartbeat) for message in said(session.tick(now)))
        session.handle(w.Renewed(transfer_id=T, slot=NAME), now)
    assert beats == 19


@pytest.mark.parametrize("state", ["reserving", "waiting", "writing", "committing"])
def test_a_silent_receiver_is_lost_after_a_lease(state):
    """A receiver that is silent for a lease is lost, in every waiting state."""
    session = sender_in(state)
    (end,) = outcomes(session.tick(2.0))
    assert (end.state, end.reason) == (SenderState.FAILED, "peer_lost")


@pytest.mark.parametrize(
    ("state", "reason"),
    [("handshaking", "deadline"), ("reserving", "deadline"), ("waiting", "receiver_full"), ("writing", "deadline")],
)
def test_the_deadline_ends_every_wait(state, reason):
    """The deadline ends every wait; the reason tells a full receiver from a slow one."""
    session = sender_in(state)
    (end,) = outcomes(session.tick(10.0))
    assert (end.state, end.reason) == (SenderState.EXPIRED, reason)


def test_cancel_waits_for_writes_in_flight():
    """Cancel is sent only once no write is in flight."""
    session = sender_in("writing")
    commands = session.handle(Abort("client_gone"), 0.1)
    assert said(commands) == []
    assert StopWriting() in commands
    assert outcomes(commands)[0].reason == "client_gone"
    (end_message,) = said(session.handle(WritesDrained(), 0.5))
    assert isinstance(end_message, w.Cancel)
    assert end_message.slot == NAME
    session.handle(w.Cancelled(transfer_id=T, slot=NAME), 0.6)
    assert session.state is SenderState.CANCELLED


def test_an_end_message_is_repeated_until_it_is_acknowledged():
    """An end message is repeated every lease until it is acknowledged."""
    session = sender_in("leaving")
    for lease in range(1, 5):
        (end_message,) = said(session.tick(lease * 2.0))
        assert isinstance(end_message, w.Cancel)
    session.handle(w.Granted(**{**msgspec.structs.asdict(GRANTED), "transfer_id": T}), 9.0)
    assert session.state is SenderState.LEAVING
    assert session.handle(w.Cancelled(transfer_id=T, slot=None), 9.1) == []
    assert session.state is SenderState.CANCELLED
    assert session.due == float("inf")


def test_an_end_message_without_an_answer_is_given_up():
    """It is not repeated after the time in which the receiver remembers the transfer."""
    session = sender_in("leaving")
    session.tick(119.9)
    assert session.state is SenderState.LEAVING
    session.tick(120.0)
    assert session.state is SenderState.CANCELLED


@pytest.mark.parametrize("state", ["reserving", "waiting", "committing", "leaving"])
def test_an_ended_incarnation_gets_no_end_message(state):
    """No end message goes to a receiver that is known to have been replaced."""
    session = sender_in(state)
    assert said(session.handle(PeerFailed("stale_engine", "", gone=True), 0.1)) == []
    assert session.ended


def test_expired_is_acknowledged_when_writes_have_stopped():
    """A sender that was told to stop acknowledges once it is true, and again when asked again."""
    session = sender_in("writing")
    expired = w.Expired(transfer_id=T, slot=NAME, reason="lease")
    assert said(session.handle(expired, 0.1)) == []
    assert said(session.handle(expired, 0.2)) == []
    assert said(session.handle(WritesDrained(), 0.3)) == [w.Cancel(transfer_id=T, slot=NAME, reason="lease", sender=P)]
    assert said(session.handle(expired, 0.4)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]
    session.handle(w.Cancelled(transfer_id=T, slot=NAME), 0.5)
    assert session.state is SenderState.EXPIRED
    assert said(session.handle(expired, 0.6)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]


def test_a_grant_that_was_never_seen_is_given_up():
    """A question about a slot whose grant was never seen is answered with Cancelled and the name of that slot."""
    session = sender_in("leaving")
    expired = w.Expired(transfer_id=T, slot=NAME, reason="lease")
    assert said(session.handle(expired, 0.1)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]


def test_a_full_receiver_is_the_reason_even_if_it_notices_first():
    """The receiver's clock may see the deadline before the sender's."""
    session = sender_in("waiting")
    (end,) = outcomes(session.handle(w.Expired(transfer_id=T, slot=None, reason="deadline"), 0.1))
    assert end.reason == "receiver_full"


def test_writes_that_do_not_stop_are_aborted():
    """Writes that have not ended a lease after the stop are aborted, and again a lease later."""
    session = sender_in("stopping")
    assert session.due == pytest.approx(2.0)
    assert session.tick(2.0) == [AbortWrites()]
    assert session.tick(4.0) == [AbortWrites()]
    assert session.handle(StopOverdue(), 5.0) == [AbortWrites()]


def test_the_outcome_is_decided_once():
    """Events after a failure do not change the outcome."""
    session = sender_in("writing")
    session.handle(WriteFailed("write_failed", "broken"), 0.1)
    assert outcomes(session.handle(Abort("late"), 0.2)) == []
    assert outcomes(session.handle(PeerFailed("peer_lost", ""), 0.2)) == []
    session.handle(WritesDrained(), 0.3)
    assert session.outcome.reason == "write_failed"


def test_commit_is_repeated_until_it_is_answered():
    session = sender_in("writing")
    first = said(session.handle(Written(), 0.1))
    again = said(session.tick(0.4))
    assert first == again
    assert isinstance(first[0], w.Commit)
    (end,) = outcomes(session.handle(w.Committed(transfer_id=T, slot=NAME), 0.5))
    assert (end.state, end.reason) == (SenderState.DONE, "done")
