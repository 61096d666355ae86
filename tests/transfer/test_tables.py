"""The transition tables are complete, and in every state every event keeps the rules of states.py."""

from collections import Counter
from typing import get_args

import pytest

from kvbelt.transfer.machine import IllegalTransitionError, Machine, go
from kvbelt.transfer.receive import states as r
from kvbelt.transfer.receive.commands import Answer
from kvbelt.transfer.receive.session import ReceiverSession
from kvbelt.transfer.send import states as s
from kvbelt.transfer.send.session import Outcome, Send
from kvbelt.wire import reservation as w
from tests.transfer.sessions import COMMIT, NAME, RESERVE, ROOM, SENDER_EVENTS, P, T, landed, receiver_in, sender_in

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
    r.CancelRead(),
    r.Release(),
    r.SenderDead(),
    r.LeaseLapsed(),
    r.DeadlinePassed(),
    r.ReminderDue(),
]


def each(events, states):
    """Yield every event in every state."""
    return lambda test: pytest.mark.parametrize("event", events, ids=lambda event: type(event).__name__)(
        pytest.mark.parametrize("state", list(states))(test)
    )


def kinds(commands):
    """The number of commands of each kind."""
    return Counter(type(command).__name__ for command in commands)


def said(commands):
    """The kinds of messages that are sent."""
    return {type(command.message) for command in commands if isinstance(command, Send | Answer)}


@each(SENDER_EVENTS, s.SenderState)
def test_a_sender_keeps_its_rules_in_every_state(state, event):
    """The outcome is decided once, the end message is true when it is sent, and writes stop at the end."""
    session = sender_in(state)
    if type(event) not in s.SENDER_TABLE[session.state]:
        with pytest.raises(IllegalTransitionError, match=f"in state {state}"):
            session.handle(event, 1.0)
        assert session.state == state
        return
    before = session.outcome
    commands = session.handle(event, 1.0)
    decided = [command for command in commands if isinstance(command, Outcome)]
    over = session.ended or session.state in (s.SenderState.STOPPING, s.SenderState.LEAVING)
    assert (session.outcome is not None) == over
    assert decided == ([] if before is session.outcome else [session.outcome])
    assert kinds(commands)["StopWriting"] == len(decided)
    assert (kinds(commands)["BeginWriting"] == 1) == (session.slot is not None and state in ("reserving", "waiting"))
    if session.state in (s.SenderState.WRITING, s.SenderState.STOPPING):
        assert not said(commands) & {w.Commit, w.Cancel, w.Cancelled}, "a write may be in flight"
    if session.ended:
        assert session.state is session.outcome.state
        assert session.due == float("inf")
        assert said(commands) <= {w.Cancelled}
    else:
        session.tick(1.0)
        assert 1.0 < session.due < float("inf")


@each(RECEIVER_EVENTS, r.ReceiverState)
def test_a_receiver_keeps_its_rules_in_every_state(state, event):
    """A slot that may be written is kept, the reader is notified once, and the end is counted once."""
    session = receiver_in(state)
    if type(event) not in r.RECEIVER_TABLE[session.state]:
        with pytest.raises(IllegalTransitionError, match=f"in state {state}"):
            session.handle(event, 1.0)
        assert session.state == state
        return
    waited, reason, slot = session.has_consumer, session.reason, session.slot
    commands = session.handle(event, 1.0)
    counts = kinds(commands)
    assert (session.slot is not None) == (session.state in r.HOLDING)
    assert counts["FreeSlot"] == (slot is not None and session.slot is None)
    if counts["FreeSlot"] and state in ("reserved", "streaming", "taken", "quarantined"):
        assert isinstance(event, w.Commit | w.Cancel | w.Cancelled | r.SenderDead), "its sender may write"
    waits = waited or (isinstance(event, r.Claim) and reason is None)
    assert counts["Deliver"] + counts["Lose"] == (waits and not session.has_consumer) + (
        isinstance(event, r.Claim) and reason is not None
    )
    assert counts["Ended"] == (reason is None and session.reason is not None)
    assert reason in {None, session.reason}
    assert counts["LeaveQueue"] == (state == "queued" and session.ended)
    if w.Granted in said(commands):
        assert session.state in ("reserved", "streaming")
    if state in r.FINAL:
        assert session.state == state
        assert said(commands).isdisjoint({w.Granted, w.Renewed})


def test_nothing_is_granted_or_counted_after_the_end():
    """Every order of two events in a final state leaves it as it was."""
    for state in r.FINAL:
        for event in [event for event in RECEIVER_EVENTS if type(event) in r.RECEIVER_TABLE[state]]:
            session = receiver_in(state)
            session.handle(event, 1.0)
            for other in [event for event in RECEIVER_EVENTS if type(event) in r.RECEIVER_TABLE[state]]:
                commands = session.handle(other, 2.0)
                assert session.state == state
                assert set(kinds(commands)) <= {"Answer", "Lose"}


def test_a_sender_ends_as_it_was_decided():
    """Every cause of an end, in every state that it may come in, leads to the state that its outcome names."""
    for state in s.SenderState:
        for event in [event for event in SENDER_EVENTS if type(event) in s.SENDER_TABLE[state]]:
            session = sender_in(state)
            session.handle(event, 1.0)
            outcome = session.outcome
            if outcome is None:
                continue
            if session.state is s.SenderState.STOPPING:
                session.handle(s.WritesDrained(), 1.0)
            if session.state is s.SenderState.LEAVING:
                session.handle(s.Unanswered(), 1.0)
            assert (session.state, session.outcome) == (outcome.state, outcome)


@pytest.mark.parametrize("table", [s.SENDER_TABLE, r.RECEIVER_TABLE])
def test_tables_are_closed(table):
    """Every state has a row, every arrow ends in a state of the same table, and every state is reached."""
    states = set(type(next(iter(table))))
    assert set(table) == states
    reached = {end for state, row in table.items() for cell in row.values() for end in cell.to if end is not state}
    assert states - reached == {next(iter(table))}


def test_whatever_a_peer_says_is_defined_in_every_state():
    """No message of a peer can raise."""
    for row in s.SENDER_TABLE.values():
        assert set(get_args(w.FromReceiver)) <= set(row)
    for row in r.RECEIVER_TABLE.values():
        assert set(get_args(w.FromSender)) <= set(row)


def test_a_table_that_names_no_method_is_refused():
    """The error comes when the class is made."""
    table = {s.SenderState.DONE: {s.Abort: go(s.SenderState.DONE, "no_such_action")}}
    with pytest.raises(AttributeError, match="no_such_action"):
        type("Broken", (Machine,), {"table": table, "final": s.FINAL})


def test_a_choice_outside_the_table_is_refused(monkeypatch):
    """An action cannot lead to a state that the table does not have."""
    monkeypatch.setattr(ReceiverSession, "whether_last", lambda self, event: r.ReceiverState.CLAIMED)
    with pytest.raises(IllegalTransitionError, match="may not lead from streaming to claimed"):
        receiver_in("streaming").handle(r.PartTaken(), 1.0)
