"""Every mechanism of the belt taken out, one at a time: without it the model finds what it is there for.

A search (``search/``) finds a shortest story; where it takes clocks or connections to see it, a walk (``soak``) finds
one. What is found is an invariant that does not hold, or a state from which nothing leads out.
"""

import logging
from dataclasses import replace

import pytest

from kvbelt.transfer import pump, sender_states
from kvbelt.transfer import receiver_states as r
from kvbelt.transfer.desk import Desk
from kvbelt.transfer.dispatch import Dispatch
from kvbelt.transfer.machine import to
from kvbelt.transfer.peers import Peers
from kvbelt.transfer.progress import Progress
from kvbelt.transfer.pump import Pump, Stopped
from kvbelt.transfer.receiver import ReceiverSession
from kvbelt.transfer.receiver_states import RECEIVER_TABLE, ReceiverState
from kvbelt.transfer.reception import Reception
from kvbelt.transfer.sender import Say, SenderSession
from kvbelt.transfer.sender_states import SENDER_TABLE, SenderState
from kvbelt.transfer.slots import SlotAllocator
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import SlotName
from tests.transfer.search import staging
from tests.transfer.search.protocol import Belts
from tests.transfer.search.runs import ONE, PARTS, TWO, WELL, belts, staged
from tests.transfer.search.staging import Prompt
from tests.transfer.search.state import SOME_TIMERS
from tests.transfer.simulation.lives import Sizes
from tests.transfer.simulation.world import Fate, Route, World
from tests.transfer.soak import soak

R, S = ReceiverState, SenderState


@pytest.fixture(autouse=True)
def quiet():
    """What drivers log of a storm is of no use."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def found(run, *arguments):
    """What a search finds."""
    with pytest.raises(AssertionError) as caught:
        run(*arguments)
    return str(caught.value)


def walked(seed=1):
    """What a walk finds."""
    return found(soak, seed, 60_000)


# What a reader sees.


def test_without_commit_before_visible_a_reader_sees_what_has_not_landed(monkeypatch):
    """KV that is delivered at the grant."""
    room = ReceiverSession._room

    def delivers(self, *arguments):
        return [*room(self, *arguments), *([self._deliver()] if self.has_reader else [])]

    monkeypatch.setattr(ReceiverSession, "_room", delivers)
    assert "is read: None instead of block 0" in found(belts, ONE)


def test_without_generations_a_late_commit_makes_nothing_visible_as_something(monkeypatch):
    """A commit of an earlier use of the slot commits a later one."""

    def named(self, region, offset, num_bytes):
        slot = original(self, region, offset, num_bytes)
        again = replace(slot, name=SlotName(slot.name.engine_id, slot.name.slot, 1))
        self._open[slot.name.slot] = again
        return again

    original = SlotAllocator._named
    monkeypatch.setattr(SlotAllocator, "_named", named)
    story = found(belts, replace(ONE, timers=SOME_TIMERS, forgets=True, claimed=False))
    assert "is read: None instead of block 0" in story
    assert "desk forgets" in story


def test_without_digests_a_write_that_lied_is_read(monkeypatch):
    """Whatever has landed counts as right."""
    verified = ReceiverSession._verified
    monkeypatch.setattr(
        ReceiverSession,
        "_verified",
        lambda self, event, part, now, *, right: verified(self, event, part, now, right=True),
    )
    story = found(belts, replace(WELL, verify="always", faults=True))
    assert "is read: None instead of block" in story
    assert "lands nothing" in story


def test_without_part_credit_a_part_is_written_over_one_that_is_read(monkeypatch):
    """The sender writes on, although nobody has said that the place is free: both machines, and the real pump."""
    monkeypatch.setattr(Belts, "credit", 3)
    assert "is read" in found(belts, PARTS)
    monkeypatch.setattr(pump, "PLACES", 3)
    assert "instead of block 0" in found(staged, staging.Bounds((Prompt("a", 3, 1),), 2, at_once=True))


def test_without_landed_parts_a_reader_takes_what_is_not_there(monkeypatch):
    """A part that is ready as soon as there is a place for it."""
    early = property(lambda self: self.taken + 1, lambda self, value: None)
    monkeypatch.setattr(Progress, "ready", early, raising=False)
    assert "is read" in found(belts, PARTS)


def test_without_telling_once_a_reader_is_told_twice(monkeypatch):
    """The reader who was given the KV is still waiting, as far as the session knows."""
    deliver = ReceiverSession._deliver

    def forgets(self):
        command = deliver(self)
        self.has_reader = True
        return command

    monkeypatch.setattr(ReceiverSession, "_deliver", forgets)
    assert "its reader was not told" in found(belts, ONE)
    monkeypatch.setattr(Desk, "validate", lambda self: None)
    monkeypatch.setitem(RECEIVER_TABLE[R.CLAIMED], r.DeadlinePassed, to(R.EXPIRED))
    assert "was told 2 times" in found(belts, replace(ONE, timers=(r.DeadlinePassed,)))


# Who may write.


def test_without_quarantine_a_slot_is_freed_under_its_writer(monkeypatch):
    """A lease that lapses frees the slot: whoever wakes up late writes into somebody else's KV."""
    over = ReceiverSession._over
    monkeypatch.setattr(
        ReceiverSession,
        "_over",
        lambda self, *arguments, dead=False: over(self, *arguments, dead=True),
    )
    monkeypatch.setitem(RECEIVER_TABLE[R.RESERVED], r.LeaseLapsed, to(R.EXPIRED))
    story = found(belts, replace(TWO, timers=SOME_TIMERS, stops=True))
    assert "t0 writes, and its slot was freed" in story


def test_without_waiting_for_writes_in_flight_a_slot_is_freed_under_them(monkeypatch):
    """A sender that acknowledges at once, although its writes may still land."""
    stopped = SenderSession._stopped_by_receiver

    def at_once(self, message, *arguments):
        return [*stopped(self, message, *arguments), Say(self._cancelled(message.slot))]

    monkeypatch.setattr(SenderSession, "_stopped_by_receiver", at_once)
    assert "t0 writes, and its slot was freed" in found(belts, replace(ONE, timers=SOME_TIMERS))


def test_without_the_pumps_patience_a_transfer_has_stopped_while_it_writes(monkeypatch):
    """Staging and slot are given back, and the write is still in flight."""

    def stop(self, load):
        load.stopped = True
        for piece in list(load.pieces):
            self._drop(load, piece)

    monkeypatch.setattr(Pump, "stop", stop)
    story = found(staged, staging.Bounds((Prompt("a", 2),), 2, at_once=True, stops=True))
    assert f"{Stopped.__name__}(transfer_id='0') while it writes" in story


def test_without_one_outcome_a_transfer_ends_twice(monkeypatch):
    """What comes after the end is another end."""
    end = SenderSession._end

    def again(self, *arguments):
        self.outcome = None
        return end(self, *arguments)

    monkeypatch.setattr(SenderSession, "_end", again)
    monkeypatch.setitem(SENDER_TABLE[S.STOPPING], sender_states.Abandon, to(S.STOPPING, S.LEAVING))
    assert "has ended twice" in found(belts, replace(ONE, timers=SOME_TIMERS, cancels=True))


# Nothing is held for ever.


def writing(world):
    """A prompt gets as far as its first write in flight."""
    world.send(0, 0, 1, 15.0)
    world.write_blocks(0, 1)
    for _ in range(4):  # Hello, Welcome, Reserve, Granted
        world.route(0, Route.DELIVER)
    assert world.ether.flying


def a_writer_that_dies():
    """It is killed in the middle, and its prompt had much time left."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.process(0, "kill")
        for _ in range(10):
            world.wait(0.5)


def test_without_leases_the_dead_hold_what_they_had(monkeypatch):
    """Until the deadline, however far it is."""
    a_writer_that_dies()
    monkeypatch.setattr(ReceiverSession, "_renew", lambda self, now: None)
    assert "reserved" in found(a_writer_that_dies)


def test_without_reminders_a_lost_word_holds_a_slot_for_ever(monkeypatch):
    """The receiver says once that the lease has lapsed, and nobody hears it."""
    monkeypatch.setattr(ReceiverSession, "_remind", lambda self, now: setattr(self, "_remind_at", float("inf")) or [])
    story = found(belts, replace(ONE, timers=SOME_TIMERS, forgets=True))
    assert "left over: {'quarantined': 1}" in story


def a_lost_farewell():
    """A write fails, so the connection is given up; what the sender says at last is lost; then all is well."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.land(0, Fate.FAIL)
        while world.network.under_way:
            world.route(0, Route.LOSE)
        world.heal()


def test_without_repeated_farewells_a_lost_one_holds_a_slot_for_ever(monkeypatch):
    """The connection is gone by the time the receiver asks."""
    a_lost_farewell()
    leave = SenderSession._leave

    def once(self, event, now):
        commands = leave(self, event, now)
        self.state = self.outcome.state
        return commands

    monkeypatch.setattr(SenderSession, "_leave", once)
    assert "quarantined" in found(a_lost_farewell)


def a_grant_that_was_never_heard():
    """... nor that it is over; the writer asks again, and then its connection is given up for another prompt's sake."""
    with World(Sizes(), num_prefill=1) as world:
        world.send(0, 0, 1, 15.0)
        for _ in range(3):  # Hello, Welcome, Reserve
            world.route(0, Route.DELIVER)
        world.route(0, Route.LOSE)  # Granted
        world.claim(0, 15.0)
        world.unclaim(0)
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
    """Everything under way arrives, but what is about the first prompt."""
    while world.network.under_way:
        lost = b"t0" in world.network.under_way[0].frame
        world.route(0, Route.LOSE if lost else Route.DELIVER)


def test_without_a_word_to_who_asks_again_a_lost_grant_holds_a_slot_for_ever(monkeypatch):
    """A refusal is no reason to say goodbye."""
    a_grant_that_was_never_heard()
    reserve = ReceiverSession._reserve

    def refuses(self, message, now):
        if self.state is R.QUARANTINED:
            return [self._refused(message, "ended", "")]
        return reserve(self, message, now)

    monkeypatch.setattr(ReceiverSession, "_reserve", refuses)
    assert "quarantined" in found(a_grant_that_was_never_heard)


def test_without_an_answer_about_what_is_unknown_a_ghost_holds_a_slot_for_ever(monkeypatch):
    """A reservation that arrives for a second time, when all is over, is granted."""
    on_message = Dispatch._on_message

    def known_only(self, peer, message):
        if message.transfer_id in self._open:
            on_message(self, peer, message)

    monkeypatch.setattr(Dispatch, "_on_message", known_only)
    assert "quarantined" in walked()


def test_without_aborts_a_write_that_never_ends_holds_everything(monkeypatch):
    """The sender waits for it, and the receiver for the sender."""
    monkeypatch.setitem(SENDER_TABLE[S.STOPPING], sender_states.StopOverdue, to(S.STOPPING))
    handle = SenderSession.handle

    def patient(self, event, now):
        commands = handle(self, event, now)
        return [] if isinstance(event, sender_states.StopOverdue) else commands

    monkeypatch.setattr(SenderSession, "handle", patient)
    assert "left over" in found(belts, replace(ONE, timers=SOME_TIMERS, lands=False))


def test_without_looking_for_the_dead_their_slots_are_held(monkeypatch):
    """A process that is gone never acknowledges."""
    monkeypatch.setattr(Desk, "suspects", lambda self: set())
    assert "quarantined" in walked()


# Nothing is lost with a message.


def one_message_lost():
    """Of the packets of one prompt, handshake to commit, every single one is lost once."""
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
    """Whoever waits for an answer asks again."""
    one_message_lost()
    beat = SenderSession.handle

    def mute(self, event, now):
        commands = beat(self, event, now)
        return [] if isinstance(event, sender_states.BeatDue) else commands

    monkeypatch.setattr(SenderSession, "handle", mute)
    assert "and so was the prompt" in found(one_message_lost)


# Nobody waits for ever.


def test_without_the_senders_deadline_a_transfer_goes_on_after_it(monkeypatch):
    """Nothing else would end the wait for a full receiver."""
    monkeypatch.setitem(SENDER_TABLE[S.WAITING], sender_states.DeadlinePassed, to(S.WAITING))
    late = SenderSession._what_is_due
    due = SenderSession.due

    def without(self, now):
        asks = self.state in (S.RESERVING, S.WAITING)
        return sender_states.BeatDue() if asks else late(self, now)

    monkeypatch.setattr(SenderSession, "_what_is_due", without)
    monkeypatch.setattr(
        SenderSession,
        "due",
        property(lambda self: self._beat_at if self.state in (S.RESERVING, S.WAITING) else due.fget(self)),
    )
    assert "after its deadline it is" in walked()


def test_without_the_readers_deadline_a_request_waits_on(monkeypatch):
    """For a transfer that its prefill worker has more time for than the request."""
    claim = ReceiverSession._claim

    def patient(self, event):
        return claim(self, replace(event, deadline=event.deadline + 100.0, until=event.until + 100.0))

    monkeypatch.setattr(ReceiverSession, "_claim", patient)
    assert "was not told by its deadline" in walked()


def test_without_a_queue_small_prompts_overtake(monkeypatch):
    """Whoever fits first is served first: a large one may never be."""
    give_room = Desk._give_room

    def whoever_fits(self, now):
        commands = give_room(self, now)
        for transfer in list(self._queue):
            self._queue.move_to_end(transfer, last=False)
            commands += give_room(self, now)
        return commands

    monkeypatch.setattr(Desk, "_give_room", whoever_fits)
    assert "has overtaken" in walked() or "was reordered" in walked()


def test_without_a_share_a_silent_peer_takes_all_the_staging(monkeypatch):
    """... and nothing is sent to anybody any more."""
    init = Pump.__init__

    def everything(self, *arguments):
        init(self, *arguments)
        self._share = self._region.num_bytes

    monkeypatch.setattr(Pump, "__init__", everything)
    bounds = staging.Bounds((Prompt("a", 2), Prompt("b", 3)), 2, silent=frozenset("b"), at_once=True)
    assert "no way out" in found(staged, bounds)


def test_without_smaller_pieces_the_gaps_a_silent_peer_leaves_are_lost(monkeypatch):
    """Half of the staging is free, and no piece fits."""
    monkeypatch.setattr(Pump, "_gap", lambda self, num_blocks: (None, num_blocks))
    prompts = (Prompt("a", 1), Prompt("a", 2), Prompt("b", 1), Prompt("b", 1))
    bounds = staging.Bounds(prompts, 4, piece=2, silent=frozenset("b"), at_once=True)
    assert "no way out" in found(staged, bounds)


def test_without_taking_staging_last_two_prompts_in_parts_stop_each_other(monkeypatch):
    """Who holds staging and waits for a place in the slot waits for a reader, who waits for the next part."""

    class Hoarding(Pump):
        def _advance(self, load, now, reports):
            progressed = self._gather(load)
            for piece in list(load.pieces):
                if piece.write is None:
                    # The last part is gathered first, and there is no place for it yet.
                    if piece.part < load.taken + 2:
                        self._post(load, piece, now)
                    continue
                progressed |= self._reap(load, piece, now)
            return progressed

        def _gather(self, load):
            load.parts.reverse()
            try:
                return super()._gather(load)
            finally:
                load.parts.reverse()
                for piece in load.pieces:
                    piece.part = piece.runs[0].first

    monkeypatch.setattr(staging, "Pump", Hoarding)
    monkeypatch.setattr(pump, "PLACES", 3)
    prompts = (Prompt("a", 3, 1), Prompt("b", 3, 1))
    assert "no way out" in found(staged, staging.Bounds(prompts, 2, at_once=True))


def a_connection_that_was_lost():
    """A write fails, and the next prompt goes to the same decode worker."""
    with World(Sizes(), num_prefill=1) as world:
        writing(world)
        world.land(0, Fate.FAIL)
        world.heal()
        world.works()


def test_without_forgetting_a_lost_peer_nothing_is_sent_to_it_any_more(monkeypatch):
    """What is lost is connected to afresh."""
    a_connection_that_was_lost()
    lose = Peers.lose

    def remembers(self, peer, reason, detail):
        lose(self, peer, reason, detail)
        self._peers.setdefault(peer.address.engine_id, peer)

    monkeypatch.setattr(Peers, "lose", remembers)
    assert "warming" in found(a_connection_that_was_lost)


def test_without_acknowledged_farewells_they_go_on(monkeypatch):
    """Who is not known, and says goodbye, is told that it may go."""
    on_message = Reception._on_message

    def silent(self, route, frame, key):
        message = self._reservations.decode(frame)
        if isinstance(message, wire.Cancel) and message.sender not in self._writers:
            return
        on_message(self, route, frame, key)

    monkeypatch.setattr(Reception, "_on_message", silent)
    assert "leaving" in walked()
