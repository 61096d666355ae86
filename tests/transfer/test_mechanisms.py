"""Every mechanism of the belt taken out, one at a time: without it the model finds what it is there for.

A search (``search/``) finds a shortest story; where it takes clocks or connections to see it, a walk (``soak``) finds
one. What is found is an invariant that does not hold, or a state from which nothing leads out.
"""

import logging
from dataclasses import replace

import pytest

from kvbelt.transfer.machine import go
from kvbelt.transfer.receive import states as r
from kvbelt.transfer.receive.driver import ReceiverDriver
from kvbelt.transfer.receive.incoming import IncomingTransfers
from kvbelt.transfer.receive.progress import Progress
from kvbelt.transfer.receive.session import ReceiverSession
from kvbelt.transfer.receive.slots import SlotAllocator
from kvbelt.transfer.receive.states import RECEIVER_TABLE, ReceiverState
from kvbelt.transfer.send import pipeline
from kvbelt.transfer.send import states as sender_states
from kvbelt.transfer.send.outgoing import OutgoingTransfers
from kvbelt.transfer.send.peers import Peers
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.transfer.send.session import SenderSession
from kvbelt.transfer.send.states import SENDER_TABLE, SenderState
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import SlotName
from tests.transfer.search import protocol, staging
from tests.transfer.search.protocol import Belts
from tests.transfer.search.runs import ONE, PARTS, TWO, WELL, belts, staged
from tests.transfer.search.staging import Prompt
from tests.transfer.search.state import SOME_TIMERS
from tests.transfer.simulation.lines import Listener
from tests.transfer.simulation.lives import Sizes
from tests.transfer.simulation.world import Fate, Route, World
from tests.transfer.soak import soak

R, S = ReceiverState, SenderState


@pytest.fixture(autouse=True)
def quiet():
    """Drops the log of thousands of provoked failures."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def found(run, *arguments):
    """The violation that a search finds."""
    with pytest.raises(AssertionError) as caught:
        run(*arguments)
    return str(caught.value)


def walked(seed=1):
    """The violation that a walk finds."""
    return found(soak, seed, 60_000)


# What a reader sees.


def test_without_commit_before_visible_a_reader_sees_what_has_not_landed(monkeypatch):
    """A session that delivers KV at the grant is found."""
    take_slot = ReceiverSession.take_slot

    def delivers(self, event):
        return [*take_slot(self, event), *(self.deliver(event) if self.has_consumer else [])]

    monkeypatch.setattr(ReceiverSession, "take_slot", delivers)
    assert "is read: None instead of block 0" in found(belts, ONE)


def test_without_generations_a_late_commit_makes_nothing_visible_as_something(monkeypatch):
    """A late commit of an earlier use of the slot commits the present one."""

    def named(self, region, offset, num_bytes):
        slot = original(self, region, offset, num_bytes)
        again = replace(slot, name=SlotName(slot.name.engine_id, slot.name.slot, 1))
        self._open[slot.name.slot] = again
        return again

    original = SlotAllocator._named
    monkeypatch.setattr(SlotAllocator, "_named", named)
    story = found(belts, replace(ONE, timers=SOME_TIMERS, forgets=True, claimed=False))
    assert "is read: None instead of block 0" in story
    assert "incoming forgets" in story


def test_without_digests_a_write_that_lied_is_read(monkeypatch):
    """Bytes that never landed are delivered when every digest counts as right."""
    judge = ReceiverSession.judge_slot
    monkeypatch.setattr(
        ReceiverSession, "judge_slot", lambda self, event: judge(self, r.Verified(event.part, right=True))
    )
    story = found(belts, replace(WELL, verify="always", faults=True))
    assert "is read: None instead of block" in story
    assert "lands nothing" in story


def test_without_part_credit_a_part_is_written_over_one_that_is_read(monkeypatch):
    """A sender that does not wait for PartsTaken overwrites a part: with both machines, and with the real pipeline."""
    monkeypatch.setattr(Belts, "credit", 3)
    assert "is read" in found(belts, PARTS)
    monkeypatch.setattr(pipeline, "PLACES", 3)
    assert "instead of block 0" in found(staged, staging.Bounds((Prompt("a", 3, 1),), 2, at_once=True))


def test_without_landed_parts_a_reader_takes_what_is_not_there(monkeypatch):
    """A part that is ready as soon as it has a place is read before it has landed."""
    early = property(lambda self: self.taken + 1, lambda self, value: None)
    monkeypatch.setattr(Progress, "ready", early, raising=False)
    assert "is read" in found(belts, PARTS)


def test_without_one_delivery_a_reader_is_notified_twice(monkeypatch):
    """A session that forgets its delivery delivers again."""
    deliver = ReceiverSession.deliver

    def forgets(self, event):
        commands = deliver(self, event)
        self.has_consumer = True
        return commands

    monkeypatch.setattr(ReceiverSession, "deliver", forgets)
    assert "its reader was not told" in found(belts, ONE)
    monkeypatch.setattr(protocol, "check_incoming", lambda incoming: None)
    monkeypatch.setitem(RECEIVER_TABLE[R.CLAIMED], r.DeadlinePassed, go(R.EXPIRED, "deadline_passed"))
    assert "was told 2 times" in found(belts, replace(ONE, timers=(r.DeadlinePassed,)))


# Who may write.


def test_without_quarantine_a_slot_is_freed_under_its_writer(monkeypatch):
    """A slot that is freed with the lease is still written by its sender."""
    monkeypatch.setitem(RECEIVER_TABLE[R.RESERVED], r.LeaseLapsed, go(R.EXPIRED, "lease_lapsed"))
    story = found(belts, replace(TWO, timers=SOME_TIMERS, stops=True))
    assert "t0 writes, and its slot was freed" in story


def test_without_waiting_for_writes_in_flight_a_slot_is_freed_under_them(monkeypatch):
    """A sender that acknowledges at once frees a slot that its writes still reach."""
    stop = SenderSession.stop

    def at_once(self, event):
        told = isinstance(event, wire.Expired | wire.Cancel)
        return [*stop(self, event), *(self.acknowledge(event) if told else [])]

    monkeypatch.setattr(SenderSession, "stop", at_once)
    assert "t0 writes, and its slot was freed" in found(belts, replace(ONE, timers=SOME_TIMERS))


def test_without_the_pumps_patience_a_transfer_has_stopped_while_it_writes(monkeypatch):
    """A pipeline that drops its pieces at the stop reports WritesDrained while a write is in flight."""

    def stop(self, transfer):
        transfer.load.stopped = True
        for piece in list(transfer.load.pieces):
            self.drop(transfer, piece)

    monkeypatch.setattr(WritePipeline, "stop", stop)
    story = found(staged, staging.Bounds((Prompt("a", 2),), 2, at_once=True, stops=True))
    assert "WritesDrained() of 0 while it writes" in story


def test_without_one_outcome_a_transfer_ends_twice(monkeypatch):
    """A session that decides again after its end reports two outcomes."""
    monkeypatch.setitem(SENDER_TABLE[S.STOPPING], sender_states.Abort, go(S.STOPPING, "stop"))
    assert "has ended twice" in found(belts, replace(ONE, timers=SOME_TIMERS, cancels=True))


# Nothing is held for ever.


def writing(world):
    """Let a prompt come to its first write in flight."""
    world.send(0, 0, 1, 15.0)
    world.write_blocks(0, 1)
    for _ in range(4):  # Hello, Welcome, Reserve, Granted
        world.route(0, Route.DELIVER)
    assert world.ether.flying


def a_writer_that_dies():
    """Kill a prefill worker in the middle of a prompt that has much time left."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.process(0, "kill")
        world.land(0, Fate.LAND)
        for _ in range(10):
            world.wait(0.5)


def a_writer_whose_last_bytes_are_late(*, cut=False):
    """Kill a sender in the middle. Its kernel sends the last bytes late."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        (there,) = world.decode.values()
        if cut:
            world.cut(0, mend=False)
        world.process(0, "kill")
        for _ in range(10):
            world.wait(0.5)
        if cut:
            world.cut(0, mend=True)
        world.wait(0.5)
        assert there.incoming.states() == {"quarantined": 1}
        world.land(0, Fate.LAND)
        world.wait(0.5)
        assert not there.incoming.states()


def test_a_dead_senders_slot_is_free_after_its_last_byte_and_not_before():
    """It is not free before its death can be known."""
    a_writer_whose_last_bytes_are_late()
    a_writer_whose_last_bytes_are_late(cut=True)


def test_without_leases_the_dead_hold_what_they_had(monkeypatch):
    """A dead sender holds its slot until the deadline."""
    a_writer_that_dies()
    monkeypatch.setattr(ReceiverSession, "renew", lambda self, event: [])
    assert "reserved" in found(a_writer_that_dies)


def test_without_reminders_a_lost_expired_holds_a_slot_for_ever(monkeypatch):
    """A slot stays quarantined when the only Expired is lost."""
    monkeypatch.setattr(ReceiverSession, "remind", lambda self, event: setattr(self, "_remind_at", float("inf")) or [])
    story = found(belts, replace(ONE, timers=SOME_TIMERS, forgets=True))
    assert "left over: {'quarantined': 1}" in story


def a_lost_end_message():
    """Lose the end message of a sender whose write has failed; then the network is well."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.land(0, Fate.FAIL)
        while world.network.under_way:
            world.route(0, Route.LOSE)
        world.heal()


def test_without_repeated_end_messages_a_lost_one_holds_a_slot_for_ever(monkeypatch):
    """A slot stays in quarantine when the only end message is lost."""
    a_lost_end_message()
    send_end = SenderSession.send_end

    def once(self, event):
        commands = send_end(self, event)
        self.state = self.outcome.state
        return commands

    monkeypatch.setattr(SenderSession, "send_end", once)
    assert "quarantined" in found(a_lost_end_message)


def a_grant_that_was_never_heard():
    """Lose a grant and the cancel after it; then the sender asks again, and loses its connection to another prompt."""
    with World(Sizes(), num_prefill=1) as world:
        world.send(0, 0, 1, 15.0)
        for _ in range(3):  # Hello, Welcome, Reserve
            world.route(0, Route.DELIVER)
        world.route(0, Route.LOSE)  # Granted
        world.claim(0, 15.0)
        world.cancel_read(0)
        world.route(0, Route.LOSE)  # Cancel
        world.wait(0.25)
        world.route(0, Route.DELIVER)  # Reserve
        world.route(0, Route.DELIVER)  # what is answered
        world.send(0, 0, 1, 15.0)
        world.write_blocks(0, 1)
        world.write_blocks(0, 1)
        all_but_the_first(world)
        world.land(0, Fate.FAIL)
        all_but_the_first(world)  # so that the second one's goodbye is heard, and the connection closed
        world.heal()


def all_but_the_first(world):
    """Deliver everything under way, except what is about the first prompt."""
    while world.network.under_way:
        lost = b"t0" in world.network.under_way[0].frame
        world.route(0, Route.LOSE if lost else Route.DELIVER)


def test_without_an_answer_to_a_repeated_reserve_a_lost_grant_holds_a_slot_for_ever(monkeypatch):
    """A slot stays quarantined when its sender is refused instead of reminded."""
    a_grant_that_was_never_heard()
    monkeypatch.setitem(RECEIVER_TABLE[R.QUARANTINED], wire.Reserve, go(R.QUARANTINED, "say_ended"))
    assert "quarantined" in found(a_grant_that_was_never_heard)


def test_without_an_answer_about_what_is_unknown_a_ghost_holds_a_slot_for_ever(monkeypatch):
    """A slot that is granted to a late copy of a reservation stays held."""
    monkeypatch.setattr(OutgoingTransfers, "unknown", lambda self, peer, message: None)
    assert "quarantined" in walked()


def test_without_aborts_a_write_that_never_ends_holds_everything(monkeypatch):
    """A write that never ends holds the staging here and the slot there."""
    abort = SenderSession.abort_writes
    monkeypatch.setattr(SenderSession, "abort_writes", lambda self, event: abort(self, event) and [])
    assert "left over" in found(belts, replace(ONE, timers=SOME_TIMERS, lands=False))


def test_without_looking_for_the_dead_their_slots_are_held(monkeypatch):
    """A dead process never acknowledges, so its slot stays quarantined."""
    monkeypatch.setattr(IncomingTransfers, "suspects", lambda self: set())
    assert "quarantined" in walked()


def test_without_waiting_for_the_last_bytes_a_dead_sender_writes_into_anothers_slot(monkeypatch):
    """Its kernel still sends bytes that it had taken."""
    monkeypatch.setattr(Listener, "is_dead", Listener.has_ended)
    assert "goes to what belongs to" in found(a_writer_whose_last_bytes_are_late)


def test_if_an_address_were_proof_two_workers_at_one_address_would_lose_their_slots(monkeypatch):
    """Workers on two hosts may listen at the same address."""
    greet = ReceiverDriver._greet

    def by_name(self, hello, key):
        if hello.engine_id not in self._senders:
            for before in list(self._senders):
                self._perform(self.incoming.sender_dead(before, self._clock()))
        return greet(self, hello, key)

    monkeypatch.setattr(ReceiverDriver, "_greet", by_name)
    assert "goes to what belongs to" in walked()


# Nothing is lost with a message.


def one_message_lost():
    """Lose each packet of a prompt once, from handshake to commit."""
    for lost in range(8):
        with World(Sizes(), num_prefill=1) as world:
            world.send(0, 0, 1, 15.0)
            world.claim(0, 15.0)
            world.write_blocks(0, 1)
            (reader,) = world.readers
            passed = 0
            while not reader.arrivals:
                if world.network.under_way:
                    world.route(0, Route.LOSE if passed == lost else Route.DELIVER)
                    passed += 1
                else:
                    world.land(0, Fate.LAND)
                    world.wait(0.1)
            assert reader.finished, f"packet {lost} was lost, and so was the prompt: {reader.arrivals}"


def test_without_repeating_a_lost_message_loses_a_prompt(monkeypatch):
    """A prompt is lost with one packet when requests are not repeated."""
    one_message_lost()
    beat = SenderSession.handle

    def mute(self, event, now):
        commands = beat(self, event, now)
        return [] if isinstance(event, sender_states.BeatDue) else commands

    monkeypatch.setattr(SenderSession, "handle", mute)
    assert "and so was the prompt" in found(one_message_lost)


# Nobody waits for ever.


def test_without_the_senders_deadline_a_transfer_goes_on_after_it(monkeypatch):
    """A transfer waits for a full receiver beyond its deadline."""
    timers = SenderSession.timers

    def without(self):
        asks = self.state in (S.RESERVING, S.WAITING)
        return [timer for timer in timers(self) if not asks or timer[1] is sender_states.BeatDue]

    monkeypatch.setattr(SenderSession, "timers", without)
    assert "after its deadline it is" in walked()


def test_without_the_readers_deadline_a_request_waits_on(monkeypatch):
    """A consumer waits beyond its own deadline while its prefill worker's is later."""
    expect = ReceiverSession.expect

    def patient(self, event):
        return expect(self, r.Claim(event.deadline + 100.0, event.until + 100.0))

    monkeypatch.setattr(ReceiverSession, "expect", patient)
    assert "was not told by its deadline" in walked()


def test_without_a_queue_small_prompts_overtake(monkeypatch):
    """A small prompt that fits is granted a slot before an earlier large one."""
    give_room = IncomingTransfers._give_room

    def all_that_fit(self, now):
        commands = give_room(self, now)
        for transfer in list(self._queue):
            self._queue.move_to_end(transfer, last=False)
            commands += give_room(self, now)
        return commands

    monkeypatch.setattr(IncomingTransfers, "_give_room", all_that_fit)
    assert "has overtaken" in walked() or "was reordered" in walked()


def test_without_a_share_a_silent_peer_takes_all_the_staging(monkeypatch):
    """A peer that takes nothing gets all the staging, and transfers to others stop."""
    init = WritePipeline.__init__

    def everything(self, *arguments):
        init(self, *arguments)
        self._share = self.buffer.num_bytes

    monkeypatch.setattr(WritePipeline, "__init__", everything)
    bounds = staging.Bounds((Prompt("a", 2), Prompt("b", 3)), 2, silent=frozenset("b"), at_once=True)
    assert "no way out" in found(staged, bounds)


def test_without_smaller_pieces_the_gaps_a_silent_peer_leaves_are_lost(monkeypatch):
    """A transfer stops although half of the staging is free, because no full piece fits."""
    monkeypatch.setattr(WritePipeline, "_gap", lambda self, num_blocks, block_bytes: (None, num_blocks))
    prompts = (Prompt("a", 1), Prompt("a", 2), Prompt("b", 1), Prompt("b", 1))
    bounds = staging.Bounds(prompts, 4, piece=2, silent=frozenset("b"), at_once=True)
    assert "no way out" in found(staged, bounds)


def test_without_taking_staging_last_two_prompts_in_parts_stop_each_other(monkeypatch):
    """Two transfers in parts stop each other when staging is taken before the place in the slot is free."""

    class Hoarding(WritePipeline):
        def _advance(self, transfer, now):
            load = transfer.load
            progressed = self._gather(load)
            for piece in list(load.pieces):
                if piece.write is None:
                    # The last part is gathered first, and there is no place for it yet.
                    if piece.part < load.taken + 2:
                        self._post(load, piece, now)
                    continue
                progressed |= self._reap(transfer, piece, now)
            return progressed

        def _gather(self, load):
            load.parts.reverse()
            try:
                return super()._gather(load)
            finally:
                load.parts.reverse()
                for piece in load.pieces:
                    piece.part = piece.runs[0].first

    monkeypatch.setattr(staging, "WritePipeline", Hoarding)
    monkeypatch.setattr(pipeline, "PLACES", 3)
    prompts = (Prompt("a", 3, 1), Prompt("b", 3, 1))
    assert "no way out" in found(staged, staging.Bounds(prompts, 2, at_once=True))


def a_connection_that_was_lost():
    """Fail a write, then send the next prompt to the same decode worker."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.land(0, Fate.FAIL)
        world.heal()
        world.works()


def test_without_forgetting_a_lost_peer_nothing_is_sent_to_it_any_more(monkeypatch):
    """No prompt reaches a decode worker whose lost connection is kept."""
    a_connection_that_was_lost()
    forget = Peers.forget

    def remembers(self, peer):
        forgotten = forget(self, peer)
        self._peers.setdefault(peer.address.engine_id, peer)
        return forgotten

    monkeypatch.setattr(Peers, "forget", remembers)
    monkeypatch.setattr(Peers, "close_if_done", lambda self, peer: None)
    assert "deadline" in found(a_connection_that_was_lost)


def test_without_acknowledged_end_messages_they_go_on(monkeypatch):
    """A sender repeats its end message for ever if a receiver that does not know it gives no answer."""
    on_message = ReceiverDriver._on_message

    def silent(self, route, frame, key):
        message = self._reservations.decode(frame)
        if isinstance(message, wire.Cancel) and message.sender not in self._senders:
            return
        on_message(self, route, frame, key)

    monkeypatch.setattr(ReceiverDriver, "_on_message", silent)
    assert "leaving" in walked()
