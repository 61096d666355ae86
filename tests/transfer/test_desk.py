"""The receiving side: order, admission, leases, quarantine."""

import pytest

from kvbelt.transfer.desk import Desk, DeskTimes
from kvbelt.transfer.receiver_commands import Answer, Deliver, Lose
from kvbelt.transfer.receiver_states import ReceiverState
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=4096)
D, P, Q = EngineId("d"), EngineId("p"), EngineId("q")


@pytest.fixture
def desk():
    """A receiver with room for four blocks; its invariants hold at the end of every test."""
    desk = Desk(D, LAYOUT, [4 * 4096], DeskTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0))
    yield desk
    desk.validate()


def reserve(transfer, blocks, sender=P, **changes):
    """A reservation."""
    fields = {"num_tokens": blocks, "num_blocks": blocks, "num_bytes": blocks * 4096, "deadline_seconds": 30.0}
    return w.Reserve(transfer_id=TransferId(transfer), sender=sender, receiver=D, **{**fields, **changes})


def commit(transfer, slot, blocks, sender=P):
    """A commit."""
    return w.Commit(
        transfer_id=TransferId(transfer), sender=sender, slot=slot, num_tokens=blocks, num_bytes=blocks * 4096
    )


def answers(commands, kind):
    """The answers of one kind."""
    return [c.message for c in commands if isinstance(c, Answer) and isinstance(c.message, kind)]


def grant(desk, transfer, blocks, now=0.0, sender=P):
    """Reserve and get a slot."""
    (granted,) = answers(desk.hear(reserve(transfer, blocks, sender), now), w.Granted)
    return granted


def test_kv_is_visible_only_after_commit(desk):
    """A reader that waits is told at the commit, not before."""
    assert desk.claim(TransferId("a"), 10.0, 0.0) == []
    granted = grant(desk, "a", 2)
    (committed, delivered) = desk.hear(commit("a", granted.slot, 2), 0.1)
    assert isinstance(committed.message, w.Committed)
    assert isinstance(delivered, Deliver)
    assert (delivered.num_tokens, delivered.slot.name) == (2, granted.slot)


def test_reserve_may_be_repeated(desk):
    """The same slot is granted again."""
    assert grant(desk, "a", 2) == grant(desk, "a", 2)


def test_commit_may_be_repeated_for_as_long_as_it_is_remembered(desk):
    """Also after the KV was read."""
    granted = grant(desk, "a", 2)
    desk.hear(commit("a", granted.slot, 2), 0.1)
    assert answers(desk.hear(commit("a", granted.slot, 2), 0.2), w.Committed)
    desk.claim(TransferId("a"), 10.0, 0.3)
    desk.release(TransferId("a"), 0.4)
    assert answers(desk.hear(commit("a", granted.slot, 2), 0.5), w.Committed)
    assert desk.ended_total == {"done": 1}


def test_a_commit_of_an_older_generation_is_refused(desk):
    """A name that is not the slot's own commits nothing."""
    granted = grant(desk, "a", 2)
    stale = SlotName(D, granted.slot.slot, granted.slot.generation - 1)
    assert answers(desk.hear(commit("a", stale, 2), 0.1), w.Expired)
    assert desk.bytes_by_state() == {ReceiverState.RESERVED: 2 * 4096}


def test_a_commit_of_another_size_is_refused(desk):
    """What is committed must be what was reserved."""
    granted = grant(desk, "a", 2)
    (refused,) = answers(desk.hear(commit("a", granted.slot, 1), 0.1), w.Refused)
    assert refused.reason == "wrong_size"
    assert not desk.bytes_by_state()


def test_a_writer_speaks_for_its_own_transfers_only(desk):
    """Another engine can neither commit nor cancel."""
    granted = grant(desk, "a", 2)
    (refused,) = answers(desk.hear(commit("a", granted.slot, 2, sender=Q), 0.1), w.Refused)
    assert refused.reason == "not_yours"
    desk.hear(w.Cancel(transfer_id=TransferId("a"), slot=granted.slot, reason="x", sender=Q), 0.1)
    assert desk.states() == {"reserved": 1}


def test_room_is_given_in_order(desk):
    """A large prompt at the head is not overtaken by small ones that would fit."""
    first = grant(desk, "a", 3)
    (wait,) = answers(desk.hear(reserve("large", 4), 0.1), w.Wait)
    assert wait.position == 0
    (wait,) = answers(desk.hear(reserve("small", 1), 0.1), w.Wait)
    assert wait.position == 1
    desk.hear(commit("a", first.slot, 3), 0.2)
    desk.claim(TransferId("a"), 10.0, 0.2)
    (granted,) = answers(desk.release(TransferId("a"), 0.3), w.Granted)
    assert granted.transfer_id == "large"


def test_who_stops_asking_loses_the_place(desk):
    """The queue has leases too."""
    grant(desk, "a", 4)
    desk.hear(reserve("b", 1), 0.0)
    desk.hear(reserve("c", 1), 1.0)
    commands = desk.tick(2.5)
    assert [c.message.transfer_id for c in commands if isinstance(c, Answer)] == ["a", "b"]
    assert desk.states() == {"quarantined": 1, "queued": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_bytes": 1}, "wrong_size"),
        ({"num_tokens": -1}, "wrong_size"),
        ({"num_blocks": 2}, "wrong_size"),
        ({"receiver": EngineId("old")}, "stale_engine"),
        ({"deadline_seconds": 0.0}, "deadline"),
        ({"deadline_seconds": float("nan")}, "deadline"),
    ],
)
def test_what_waiting_would_not_help_is_refused_at_once(desk, changes, reason):
    """A reservation that can never be granted does not wait, and leaves nothing behind."""
    message = w.Reserve(
        **{
            **{f: getattr(reserve("a", 1), f) for f in w.Reserve.__struct_fields__},
            **changes,
        }
    )
    (refused,) = answers(desk.hear(message, 0.0), w.Refused)
    assert refused.reason == reason
    assert not desk.states()


def test_a_buffer_of_less_than_two_blocks_takes_no_larger_prompt():
    """There is nothing to stream through; both sizes are named."""
    small = Desk(D, LAYOUT, [4096, 4096], DeskTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0))
    (refused,) = answers(small.hear(reserve("a", 2), 0.0), w.Refused)
    assert refused.reason == "too_large"
    assert "8192 bytes" in refused.detail
    assert "4096" in refused.detail
    assert grant(small, "b", 1)


def test_a_lapsed_lease_quarantines_the_slot(desk):
    """The reader learns it at once; the slot is nobody's until the writer acknowledges."""
    granted = grant(desk, "a", 4)
    desk.claim(TransferId("a"), 30.0, 0.0)
    commands = desk.tick(2.0)
    assert [c.reason for c in commands if isinstance(c, Lose)] == ["lease"]
    assert answers(commands, w.Expired)
    assert desk.bytes_by_state() == {ReceiverState.QUARANTINED: 4 * 4096}
    assert answers(desk.hear(reserve("b", 1), 2.1), w.Wait)
    acknowledged = desk.hear(w.Cancelled(transfer_id=TransferId("a"), slot=granted.slot, sender=P), 2.2)
    assert answers(acknowledged, w.Granted)[0].transfer_id == "b"


def test_a_quarantined_writer_is_reminded(desk):
    """A lost Expired is said again, every lease."""
    grant(desk, "a", 4)
    desk.tick(2.0)
    assert answers(desk.tick(4.0), w.Expired)
    assert answers(desk.tick(6.0), w.Expired)


def test_who_asks_for_a_quarantined_slot_is_told_to_stop(desk):
    """The grant was lost, and so was the word that it is over: a refusal would leave the slot held."""
    granted = grant(desk, "a", 4)
    desk.tick(2.0)
    (expired,) = answers(desk.hear(reserve("a", 4), 2.1), w.Expired)
    assert expired.slot == granted.slot


def test_a_late_commit_frees_the_quarantined_slot_and_delivers_nothing(desk):
    """It says that the writer has stopped; it comes too late to be KV."""
    granted = grant(desk, "a", 4)
    desk.tick(2.0)
    assert answers(desk.hear(commit("a", granted.slot, 4), 2.5), w.Expired)
    assert not desk.bytes_by_state()
    assert desk.claim(TransferId("a"), 10.0, 3.0)[0].reason == "lease"


def test_the_death_of_a_writer_frees_its_quarantined_slots(desk):
    """... and nobody else's."""
    grant(desk, "a", 2, sender=P)
    grant(desk, "b", 2, sender=Q)
    desk.tick(2.0)
    assert desk.suspects() == {P, Q}
    desk.writer_dead(P, 2.1)
    assert desk.bytes_by_state() == {ReceiverState.QUARANTINED: 2 * 4096}
    assert desk.suspects() == {Q}


def test_a_reader_that_goes_away_stops_the_writer(desk):
    """Cancel goes out, the slot waits for the acknowledgement."""
    grant(desk, "a", 2)
    desk.claim(TransferId("a"), 10.0, 0.0)
    commands = desk.unclaim(TransferId("a"), 0.1)
    assert answers(commands, w.Cancel)
    assert [c.reason for c in commands if isinstance(c, Lose)] == ["reader_gone"]
    assert desk.states() == {"quarantined": 1}


def test_an_unknown_transfer_is_waited_for_one_lease(desk):
    """Nobody has heard of it: it is lost after a lease, not at the reader's deadline."""
    desk.claim(TransferId("a"), 30.0, 0.0)
    assert desk.tick(1.9) == []
    assert desk.tick(2.0)[0].reason == "unknown_transfer"


def test_a_known_transfer_is_waited_for_until_the_readers_deadline(desk):
    """Once a writer has asked for room the reader's own deadline counts."""
    desk.claim(TransferId("a"), 5.0, 0.0)
    granted = grant(desk, "a", 2, now=1.0)
    for step in range(4, 20):
        now = step * 0.25
        desk.hear(w.Heartbeat(transfer_id=TransferId("a"), sender=P, slot=granted.slot), now)
        assert desk.tick(now) == []
    assert [c.reason for c in desk.tick(5.0) if isinstance(c, Lose)] == ["deadline"]


def test_committed_kv_that_nobody_claims_expires(desk):
    """Its request has ended meanwhile: soon the slot is free again, however far the transfer's deadline is."""
    granted = grant(desk, "a", 2)
    desk.hear(commit("a", granted.slot, 2), 0.1)
    desk.tick(10.0)
    assert desk.states() == {"committed": 1}
    desk.tick(10.1)
    assert not desk.bytes_by_state()
    assert desk.ended_total == {"unclaimed": 1}


def test_a_second_reader_is_told_that_there_is_another(desk):
    """One transfer, one reader; the first is not disturbed."""
    desk.claim(TransferId("a"), 10.0, 0.0)
    assert desk.claim(TransferId("a"), 10.0, 0.0)[0].reason == "already_claimed"
    granted = grant(desk, "a", 2)
    assert isinstance(desk.hear(commit("a", granted.slot, 2), 0.1)[1], Deliver)
    assert desk.claim(TransferId("a"), 10.0, 0.2)[0].reason == "already_claimed"


def test_ends_are_forgotten_in_time(desk):
    """Memory of ended transfers is bounded."""
    desk.claim(TransferId("a"), 1.0, 0.0)
    desk.tick(1.0)
    assert desk.claim(TransferId("a"), 10.0, 1.5)[0].reason == "unknown_transfer"
    desk.tick(100.0)
    assert desk.claim(TransferId("a"), 110.0, 100.0) == []
