"""The sending session: what it says, when, and how it ends."""

import msgspec
import pytest

from kvbelt.transfer.sender import AbortWrites, BeginWriting, Outcome, Say, StopWriting
from kvbelt.transfer.sender_states import Abandon, PeerFailed, Quiet, SenderState, StopOverdue, WriteFailed, Written
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName
from tests.transfer.test_tables import GRANTED, NAME, D, P, T, sender_in


def said(commands):
    """The messages among commands."""
    return [command.message for command in commands if isinstance(command, Say)]


def outcomes(commands):
    """The outcomes among commands."""
    return [command for command in commands if isinstance(command, Outcome)]


def test_reserve_carries_the_remaining_time():
    """Deadlines travel as remaining seconds, smaller every time."""
    session = sender_in("reserving")
    (again,) = said(session.tick(0.25))
    assert isinstance(again, w.Reserve)
    assert again.deadline_seconds == pytest.approx(9.75)


def test_a_grant_starts_the_writing():
    """The slot and its place come with the grant."""
    assert sender_in("reserving").handle(GRANTED, 0.1) == [BeginWriting(GRANTED)]


def test_a_slot_of_another_life_of_the_receiver_is_ignored():
    """A grant that names another engine is not ours."""
    session = sender_in("reserving")
    stale = msgspec.structs.replace(GRANTED, slot=SlotName(EngineId("old"), 0, 1))
    assert session.handle(stale, 0.1) == []
    assert session.state is SenderState.RESERVING


def test_what_names_an_older_generation_changes_nothing():
    """Expired for an earlier use of the slot does not stop this one."""
    session = sender_in("writing")
    older = w.Expired(transfer_id=T, slot=SlotName(D, 0, 0), reason="lease")
    assert session.handle(older, 0.1) == []
    assert session.state is SenderState.WRITING


def test_a_writer_keeps_its_lease_alive():
    """A heartbeat every beat, as long as answers come."""
    session = sender_in("writing")
    beats = 0
    for step in range(1, 20):
        now = step * 0.25
        beats += sum(isinstance(message, w.Heartbeat) for message in said(session.tick(now)))
        session.handle(w.Renewed(transfer_id=T, slot=NAME), now)
    assert beats == 19


@pytest.mark.parametrize("state", ["reserving", "waiting", "writing", "committing"])
def test_a_silent_receiver_is_lost_after_a_lease(state):
    """Nothing waits for ever for an answer."""
    session = sender_in(state)
    (end,) = outcomes(session.tick(2.0))
    assert (end.state, end.reason) == (SenderState.FAILED, "peer_lost")


@pytest.mark.parametrize(
    ("state", "reason"),
    [("handshaking", "deadline"), ("reserving", "deadline"), ("waiting", "receiver_full"), ("writing", "deadline")],
)
def test_the_deadline_ends_every_wait(state, reason):
    """... with a reason that tells a full receiver from a slow one."""
    session = sender_in(state)
    (end,) = outcomes(session.tick(10.0))
    assert (end.state, end.reason) == (SenderState.EXPIRED, reason)


def test_cancel_waits_for_writes_in_flight():
    """The receiver hears Cancel only when nothing is in flight any more."""
    session = sender_in("writing")
    commands = session.handle(Abandon("client_gone"), 0.1)
    assert said(commands) == []
    assert StopWriting() in commands
    assert outcomes(commands)[0].reason == "client_gone"
    (farewell,) = said(session.handle(Quiet(), 0.5))
    assert isinstance(farewell, w.Cancel)
    assert farewell.slot == NAME
    session.handle(w.Cancelled(transfer_id=T, slot=NAME), 0.6)
    assert session.state is SenderState.CANCELLED


def test_a_farewell_is_repeated_until_it_is_acknowledged():
    """A lost one would leave the slot held for as long as this sender has nothing else to say there."""
    session = sender_in("leaving")
    for lease in range(1, 5):
        (farewell,) = said(session.tick(lease * 2.0))
        assert isinstance(farewell, w.Cancel)
    session.handle(w.Granted(**{**msgspec.structs.asdict(GRANTED), "transfer_id": T}), 9.0)
    assert session.state is SenderState.LEAVING
    assert session.handle(w.Cancelled(transfer_id=T, slot=None), 9.1) == []
    assert session.state is SenderState.CANCELLED
    assert session.due == float("inf")


def test_a_farewell_that_nobody_answers_ends_with_memory():
    """When the other side has forgotten everything, too."""
    session = sender_in("leaving")
    session.tick(119.9)
    assert session.state is SenderState.LEAVING
    session.tick(120.0)
    assert session.state is SenderState.CANCELLED


@pytest.mark.parametrize("state", ["reserving", "waiting", "committing", "leaving"])
def test_nobody_says_goodbye_to_a_life_that_is_over(state):
    """A new life at the same address holds nothing of the old one's."""
    session = sender_in(state)
    assert said(session.handle(PeerFailed("stale_engine", "", gone=True), 0.1)) == []
    assert session.ended


def test_expired_is_acknowledged_when_writes_have_stopped():
    """A sender told to stop says so once it is true, and again if asked again."""
    session = sender_in("writing")
    expired = w.Expired(transfer_id=T, slot=NAME, reason="lease")
    assert said(session.handle(expired, 0.1)) == []
    assert said(session.handle(expired, 0.2)) == []
    assert said(session.handle(Quiet(), 0.3)) == [w.Cancel(transfer_id=T, slot=NAME, reason="lease", sender=P)]
    assert said(session.handle(expired, 0.4)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]
    session.handle(w.Cancelled(transfer_id=T, slot=NAME), 0.5)
    assert session.state is SenderState.EXPIRED
    assert said(session.handle(expired, 0.6)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]


def test_a_grant_that_was_never_seen_is_let_go_of():
    """The receiver asks about a slot that this sender has not heard of: it is told, by its name, that nobody writes."""
    session = sender_in("leaving")
    expired = w.Expired(transfer_id=T, slot=NAME, reason="lease")
    assert said(session.handle(expired, 0.1)) == [w.Cancelled(transfer_id=T, slot=NAME, sender=P)]


def test_a_receiver_that_was_full_is_the_reason_whoever_notices_first():
    """The receiver's clock may be the first to see the deadline."""
    session = sender_in("waiting")
    (end,) = outcomes(session.handle(w.Expired(transfer_id=T, slot=None, reason="deadline"), 0.1))
    assert end.reason == "receiver_full"


def test_writes_that_do_not_stop_are_aborted():
    """After a lease in STOPPING the driver is told to abort, and again a lease later."""
    session = sender_in("stopping")
    assert session.due == pytest.approx(2.0)
    assert session.tick(2.0) == [AbortWrites()]
    assert session.tick(4.0) == [AbortWrites()]
    assert session.handle(StopOverdue(), 5.0) == [AbortWrites()]


def test_the_outcome_is_decided_once():
    """Whatever follows a failure does not change it."""
    session = sender_in("writing")
    session.handle(WriteFailed("write_failed", "broken"), 0.1)
    assert outcomes(session.handle(Abandon("late"), 0.2)) == []
    assert outcomes(session.handle(PeerFailed("peer_lost", ""), 0.2)) == []
    session.handle(Quiet(), 0.3)
    assert session.outcome.reason == "write_failed"


def test_commit_is_said_again_until_it_is_answered():
    """A lost Commit, or a lost answer, is repaired."""
    session = sender_in("writing")
    first = said(session.handle(Written(), 0.1))
    again = said(session.tick(0.4))
    assert first == again
    assert isinstance(first[0], w.Commit)
    (end,) = outcomes(session.handle(w.Committed(transfer_id=T, slot=NAME), 0.5))
    assert (end.state, end.reason) == (SenderState.DONE, "done")
