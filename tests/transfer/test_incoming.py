"""The receiving side: order, admission, leases, quarantine."""

import pytest

from kvbelt.transfer.receive.commands import Answer, Deliver, Lose
from kvbelt.transfer.receive.incoming import IncomingTransfers, ReceiveTimes
from kvbelt.transfer.receive.states import CancelRead, ReceiverState, Release
from kvbelt.wire import reservation as w
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout
from tests.transfer.invariants import check_incoming

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=4096)
D, P, Q = EngineId("d"), EngineId("p"), EngineId("q")


@pytest.fixture
def incoming():
    """A receiver with room for four blocks; its invariants hold at the end of every test."""
    incoming = IncomingTransfers(
        D, LAYOUT, [4 * 4096], ReceiveTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0)
    )
    yield incoming
    check_incoming(incoming)


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


def grant(incoming, transfer, blocks, now=0.0, sender=P):
    """Reserve and get a slot."""
    (granted,) = answers(incoming.on_message(reserve(transfer, blocks, sender), now), w.Granted)
    return granted


def test_kv_is_visible_only_after_commit(incoming):
    """A waiting reader gets it at the commit, not before."""
    assert incoming.claim(TransferId("a"), 10.0, 0.0) == []
    granted = grant(incoming, "a", 2)
    (committed, delivered) = incoming.on_message(commit("a", granted.slot, 2), 0.1)
    assert isinstance(committed.message, w.Committed)
    assert isinstance(delivered, Deliver)
    assert (delivered.num_tokens, delivered.slot.name) == (2, granted.slot)


def test_reserve_may_be_repeated(incoming):
    """The answer grants the same slot."""
    assert grant(incoming, "a", 2) == grant(incoming, "a", 2)


def test_commit_may_be_repeated_for_as_long_as_it_is_remembered(incoming):
    """This holds even after the KV was read."""
    granted = grant(incoming, "a", 2)
    incoming.on_message(commit("a", granted.slot, 2), 0.1)
    assert answers(incoming.on_message(commit("a", granted.slot, 2), 0.2), w.Committed)
    incoming.claim(TransferId("a"), 10.0, 0.3)
    incoming.handle(TransferId("a"), Release(), 0.4)
    assert answers(incoming.on_message(commit("a", granted.slot, 2), 0.5), w.Committed)
    assert incoming.ended_total == {"done": 1}


def test_a_commit_of_an_older_generation_is_refused(incoming):
    granted = grant(incoming, "a", 2)
    stale = SlotName(D, granted.slot.slot, granted.slot.generation - 1)
    assert answers(incoming.on_message(commit("a", stale, 2), 0.1), w.Expired)
    assert incoming.bytes_by_state() == {ReceiverState.RESERVED: 2 * 4096}


def test_a_commit_of_another_size_is_refused(incoming):
    """The size must be the reserved one."""
    granted = grant(incoming, "a", 2)
    (refused,) = answers(incoming.on_message(commit("a", granted.slot, 1), 0.1), w.Refused)
    assert refused.reason == "wrong_size"
    assert not incoming.bytes_by_state()


def test_a_writer_speaks_for_its_own_transfers_only(incoming):
    """Another engine can neither commit nor cancel."""
    granted = grant(incoming, "a", 2)
    (refused,) = answers(incoming.on_message(commit("a", granted.slot, 2, sender=Q), 0.1), w.Refused)
    assert refused.reason == "not_yours"
    incoming.on_message(w.Cancel(transfer_id=TransferId("a"), slot=granted.slot, reason="x", sender=Q), 0.1)
    assert incoming.states() == {"reserved": 1}


def test_room_is_given_in_order(incoming):
    """A large prompt at the head is not overtaken by small ones that would fit."""
    first = grant(incoming, "a", 3)
    (wait,) = answers(incoming.on_message(reserve("large", 4), 0.1), w.Wait)
    assert wait.position == 0
    (wait,) = answers(incoming.on_message(reserve("small", 1), 0.1), w.Wait)
    assert wait.position == 1
    incoming.on_message(commit("a", first.slot, 3), 0.2)
    incoming.claim(TransferId("a"), 10.0, 0.2)
    (granted,) = answers(incoming.handle(TransferId("a"), Release(), 0.3), w.Granted)
    assert granted.transfer_id == "large"


def test_a_sender_that_stops_asking_loses_its_place(incoming):
    """The queue has leases, too."""
    grant(incoming, "a", 4)
    incoming.on_message(reserve("b", 1), 0.0)
    incoming.on_message(reserve("c", 1), 1.0)
    commands = incoming.tick(2.5)
    assert [c.message.transfer_id for c in commands if isinstance(c, Answer)] == ["a", "b"]
    assert incoming.states() == {"quarantined": 1, "queued": 1}


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
def test_what_waiting_would_not_help_is_refused_at_once(incoming, changes, reason):
    """A reservation that can never be granted does not wait, and leaves nothing behind."""
    message = w.Reserve(
        **{
            **{f: getattr(reserve("a", 1), f) for f in w.Reserve.__struct_fields__},
            **changes,
        }
    )
    (refused,) = answers(incoming.on_message(message, 0.0), w.Refused)
    assert refused.reason == reason
    assert not incoming.states()


def test_a_buffer_of_less_than_two_blocks_takes_no_larger_prompt():
    """A prompt cannot stream through it. The refusal has both sizes."""
    small = IncomingTransfers(D, LAYOUT, [4096, 4096], ReceiveTimes(2.0, 0.25, claim_seconds=10.0, memory_seconds=60.0))
    (refused,) = answers(small.on_message(reserve("a", 2), 0.0), w.Refused)
    assert refused.reason == "too_large"
    assert "8192 bytes" in refused.detail
    assert "4096" in refused.detail
    assert grant(small, "b", 1)


def test_a_lapsed_lease_quarantines_the_slot(incoming):
    """The reader loses the KV at once. The slot is not reused until the sender acknowledges."""
    granted = grant(incoming, "a", 4)
    incoming.claim(TransferId("a"), 30.0, 0.0)
    commands = incoming.tick(2.0)
    assert [c.reason for c in commands if isinstance(c, Lose)] == ["lease"]
    assert answers(commands, w.Expired)
    assert incoming.bytes_by_state() == {ReceiverState.QUARANTINED: 4 * 4096}
    assert answers(incoming.on_message(reserve("b", 1), 2.1), w.Wait)
    acknowledged = incoming.on_message(w.Cancelled(transfer_id=TransferId("a"), slot=granted.slot, sender=P), 2.2)
    assert answers(acknowledged, w.Granted)[0].transfer_id == "b"


def test_a_quarantined_writer_is_reminded(incoming):
    """Expired is repeated every lease, because one may be lost."""
    grant(incoming, "a", 4)
    incoming.tick(2.0)
    assert answers(incoming.tick(4.0), w.Expired)
    assert answers(incoming.tick(6.0), w.Expired)


def test_a_sender_that_asks_for_a_quarantined_slot_is_told_to_stop(incoming):
    """The grant and the Expired were lost. After a refusal the slot would stay held."""
    granted = grant(incoming, "a", 4)
    incoming.tick(2.0)
    (expired,) = answers(incoming.on_message(reserve("a", 4), 2.1), w.Expired)
    assert expired.slot == granted.slot


def test_a_late_commit_frees_the_quarantined_slot_and_delivers_nothing(incoming):
    """It shows that the sender has stopped, but is too late for the reader."""
    granted = grant(incoming, "a", 4)
    incoming.tick(2.0)
    assert answers(incoming.on_message(commit("a", granted.slot, 4), 2.5), w.Expired)
    assert not incoming.bytes_by_state()
    assert incoming.claim(TransferId("a"), 10.0, 3.0)[0].reason == "lease"


def test_the_death_of_a_writer_frees_its_quarantined_slots(incoming):
    """Slots of other senders stay in quarantine."""
    grant(incoming, "a", 2, sender=P)
    grant(incoming, "b", 2, sender=Q)
    incoming.tick(2.0)
    assert incoming.suspects() == {P, Q}
    incoming.sender_dead(P, 2.1)
    assert incoming.bytes_by_state() == {ReceiverState.QUARANTINED: 2 * 4096}
    assert incoming.suspects() == {Q}


def test_a_reader_that_goes_away_stops_the_writer(incoming):
    """The sender gets Cancel, and the slot waits for its acknowledgement."""
    grant(incoming, "a", 2)
    incoming.claim(TransferId("a"), 10.0, 0.0)
    commands = incoming.handle(TransferId("a"), CancelRead(), 0.1)
    assert answers(commands, w.Cancel)
    assert [c.reason for c in commands if isinstance(c, Lose)] == ["reader_gone"]
    assert incoming.states() == {"quarantined": 1}


def test_an_unknown_transfer_is_waited_for_one_lease(incoming):
    """It is lost after a lease, before the reader's deadline."""
    incoming.claim(TransferId("a"), 30.0, 0.0)
    assert incoming.tick(1.9) == []
    assert incoming.tick(2.0)[0].reason == "unknown_transfer"


def test_a_known_transfer_is_waited_for_until_the_readers_deadline(incoming):
    """The reader's own deadline counts once a sender has reserved."""
    incoming.claim(TransferId("a"), 5.0, 0.0)
    granted = grant(incoming, "a", 2, now=1.0)
    for step in range(4, 20):
        now = step * 0.25
        incoming.on_message(w.Heartbeat(transfer_id=TransferId("a"), sender=P, slot=granted.slot), now)
        assert incoming.tick(now) == []
    assert [c.reason for c in incoming.tick(5.0) if isinstance(c, Lose)] == ["deadline"]


def test_committed_kv_that_is_not_claimed_expires(incoming):
    """Its request may have ended. The slot is free again long before the transfer's deadline."""
    granted = grant(incoming, "a", 2)
    incoming.on_message(commit("a", granted.slot, 2), 0.1)
    incoming.tick(10.0)
    assert incoming.states() == {"committed": 1}
    incoming.tick(10.1)
    assert not incoming.bytes_by_state()
    assert incoming.ended_total == {"unclaimed": 1}


def test_a_second_reader_is_refused(incoming):
    """A transfer has one reader, which is not disturbed."""
    incoming.claim(TransferId("a"), 10.0, 0.0)
    assert incoming.claim(TransferId("a"), 10.0, 0.0)[0].reason == "already_claimed"
    granted = grant(incoming, "a", 2)
    assert isinstance(incoming.on_message(commit("a", granted.slot, 2), 0.1)[1], Deliver)
    assert incoming.claim(TransferId("a"), 10.0, 0.2)[0].reason == "already_claimed"


def test_ends_are_forgotten_in_time(incoming):
    """The memory of ended transfers is bounded."""
    incoming.claim(TransferId("a"), 1.0, 0.0)
    incoming.tick(1.0)
    assert incoming.claim(TransferId("a"), 10.0, 1.5)[0].reason == "unknown_transfer"
    incoming.tick(100.0)
    assert incoming.claim(TransferId("a"), 110.0, 100.0) == []
