"""Two pure sides and a hostile network between them: whatever happens, no wrong byte is ever delivered.

The model holds a receiver (a desk), several writers, and the messages and writes under way. Hypothesis lets
messages be delivered in any order, twice or never, time pass, writes land late, writers stop, wake up and die.
A slot's bytes are modelled as the name of whoever wrote each of them last. After every step the invariants are
checked; at the end the network heals, time passes, and nothing may be left over.
"""

from collections import Counter

from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbelt.transfer.desk import Desk, DeskTimes
from kvbelt.transfer.receiver import Answer, Deliver, Lose
from kvbelt.transfer.sender import BeginWriting, Outcome, Say, SenderSession, SendPlan, StopWriting
from kvbelt.transfer.sender_states import Abandon, PeerReady, Quiet, SenderState, Written
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=4096)
BUFFER_BLOCKS = 6
PIECES = 3
LEASE, BEAT, DEADLINE = 2.0, 0.25, 15.0
D = EngineId("d")


class Writing:
    """What a sender's driver does: writes in flight to a slot."""

    def __init__(self, session: SenderSession) -> None:
        self.session = session
        self.slot = None
        self.offset = 0
        self.to_post = 0
        self.in_flight = 0
        self.landed = 0
        self.stopped = False
        self.outcomes = []


class Belts(RuleBasedStateMachine):
    """The model."""

    @initialize()
    def start(self):
        """Nothing has happened yet."""
        self.now = 0.0
        self.desk = Desk(
            D,
            LAYOUT,
            BUFFER_BLOCKS * LAYOUT.block_bytes,
            DeskTimes(LEASE, BEAT, claim_seconds=60.0, memory_seconds=60.0),
        )
        self.to_desk, self.to_senders = [], []
        self.senders: dict[TransferId, Writing] = {}
        self.lives = Counter()  # how often a worker was killed
        self.awake: dict[EngineId, bool] = {}  # engine -> running; absent: dead
        self.memory = [None] * BUFFER_BLOCKS  # who wrote each block last
        self.told = Counter()
        self.claimed = set()
        self.held = {}  # delivered and not released: transfer -> (slot, blocks)
        self.next = 0

    def engine(self, worker):
        """The id of this life of a prefill worker."""
        return EngineId(f"{worker}-{self.lives[worker]}")

    # The drivers.

    def on_desk(self, commands):
        """Do what the desk commands."""
        for command in commands:
            match command:
                case Answer(writer=writer, message=message):
                    self.to_senders.append((writer, message))
                case Deliver(transfer_id=transfer_id, slot=slot, num_blocks=num_blocks):
                    self.told[transfer_id] += 1
                    self.held[transfer_id] = (slot, num_blocks)
                case Lose(transfer_id=transfer_id):
                    self.told[transfer_id] += 1

    def on_sender(self, writing, commands):
        """Do what a sender's session commands."""
        for command in commands:
            match command:
                case Say(message=message):
                    self.to_desk.append(message)
                case BeginWriting(slot=slot, offset=offset):
                    writing.slot, writing.offset = slot, offset // LAYOUT.block_bytes
                    writing.to_post = PIECES
                case StopWriting():
                    writing.stopped, writing.to_post = True, 0
                    if not writing.in_flight and writing.session.state is SenderState.STOPPING:
                        self.on_sender(writing, writing.session.handle(Quiet(), self.now))
                case Outcome():
                    writing.outcomes.append(command)

    def running(self, writing):
        """Whether the writer's process can act."""
        return self.awake.get(writing.session.plan.sender, False)

    # What may happen.

    @rule(blocks=strategies.integers(1, BUFFER_BLOCKS), engine=strategies.sampled_from(["p1", "p2"]))
    def send(self, blocks, engine):
        """A prefill worker begins a transfer."""
        engine = self.engine(engine)
        if not self.awake.setdefault(engine, True) or len(self.senders) > 8:
            return
        transfer_id = TransferId(f"t{self.next}")
        self.next += 1
        plan = SendPlan(
            transfer_id, engine, D, blocks, blocks, LAYOUT.slot_bytes(blocks), self.now + DEADLINE, BEAT, LEASE
        )
        writing = self.senders[transfer_id] = Writing(SenderSession(plan, self.now))
        self.on_sender(writing, writing.session.handle(PeerReady(), self.now))

    @precondition(lambda self: self.senders)
    @rule(data=strategies.data())
    def claim(self, data):
        """A decode worker wants one of the transfers."""
        transfer_id = data.draw(strategies.sampled_from(sorted(self.senders)))
        if transfer_id not in self.claimed:
            self.claimed.add(transfer_id)
            self.on_desk(self.desk.claim(transfer_id, self.now + DEADLINE, self.now))

    @precondition(lambda self: self.claimed)
    @rule(data=strategies.data())
    def unclaim(self, data):
        """... and wants it no more."""
        self.on_desk(self.desk.unclaim(data.draw(strategies.sampled_from(sorted(self.claimed))), self.now))

    @precondition(lambda self: self.held)
    @rule(data=strategies.data())
    def read(self, data):
        """A reader reads: every block must be what the transfer's own writer wrote."""
        transfer_id = data.draw(strategies.sampled_from(sorted(self.held)))
        self.check_bytes(transfer_id)
        del self.held[transfer_id]
        self.on_desk(self.desk.release(transfer_id, self.now))

    @precondition(lambda self: self.to_desk)
    @rule(data=strategies.data(), fate=strategies.sampled_from(["deliver", "deliver", "deliver", "repeat", "lose"]))
    def network_to_desk(self, data, fate):
        """Any message under way, in any order, may arrive, arrive twice, or be lost."""
        index = data.draw(strategies.integers(0, len(self.to_desk) - 1))
        message = self.to_desk[index] if fate == "repeat" else self.to_desk.pop(index)
        if fate != "lose":
            self.on_desk(self.desk.hear(message, self.now))

    @precondition(lambda self: self.to_senders)
    @rule(data=strategies.data(), fate=strategies.sampled_from(["deliver", "deliver", "deliver", "repeat", "lose"]))
    def network_to_sender(self, data, fate):
        """Likewise the other way; a stopped process hears nothing, a dead one never."""
        index = data.draw(strategies.integers(0, len(self.to_senders) - 1))
        if not self.awake.get(self.to_senders[index][0], True):
            return
        engine, message = self.to_senders[index] if fate == "repeat" else self.to_senders.pop(index)
        if fate != "lose":
            self.hear(engine, message)

    @rule()
    def network_is_well(self):
        """Everything under way arrives, in order: so that a few steps reach the states that matter."""
        for _ in range(20):
            messages, self.to_desk = self.to_desk, []
            for message in messages:
                self.on_desk(self.desk.hear(message, self.now))
            answers, self.to_senders = self.to_senders, []
            for engine, message in answers:
                if self.awake.get(engine, True):
                    self.hear(engine, message)
                else:
                    self.to_senders.append((engine, message))

    @rule(blocks=strategies.integers(1, 3), engine=strategies.sampled_from(["p1", "p2"]))
    def send_and_write(self, blocks, engine):
        """A transfer begins, and gets as far as its first write in flight."""
        self.send(blocks, engine)
        self.network_is_well()
        for writing in self.senders.values():
            if writing.to_post and self.running(writing) and not writing.in_flight:
                writing.to_post -= 1
                writing.in_flight += 1

    def hear(self, engine, message):
        """A sender's driver receives a message."""
        writing = self.senders.get(message.transfer_id)
        if engine in self.awake and writing is not None:
            self.on_sender(writing, writing.session.handle(message, self.now))

    @precondition(lambda self: any(w.to_post for w in self.senders.values()))
    @rule(data=strategies.data())
    def post(self, data):
        """A running writer posts a write."""
        ready = [w for w in self.senders.values() if w.to_post and self.running(w)]
        if ready:
            writing = data.draw(strategies.sampled_from(ready))
            writing.to_post -= 1
            writing.in_flight += 1

    @precondition(lambda self: any(w.in_flight for w in self.senders.values()))
    @rule(data=strategies.data())
    def land(self, data):
        """A write lands: also a stopped process's, for a network card does not stop with it."""
        flying = [w for w in self.senders.values() if w.in_flight and w.session.plan.sender in self.awake]
        if flying:
            self.one_lands(data.draw(strategies.sampled_from(flying)))

    def one_lands(self, writing):
        """Bytes change. A whole slot belongs to one writer: whoever writes, writes all of it with its name."""
        writing.in_flight -= 1
        writing.landed += 1
        session = writing.session
        for block in range(writing.offset, writing.offset + session.plan.num_blocks):
            self.memory[block] = session.plan.transfer_id
        if not self.running(writing):
            return
        self.report(writing)

    def report(self, writing):
        """A running driver sees how its writes are."""
        session = writing.session
        if session.state is SenderState.WRITING and writing.landed == PIECES:
            self.on_sender(writing, session.handle(Written(), self.now))
        elif session.state is SenderState.STOPPING and not writing.in_flight:
            self.on_sender(writing, session.handle(Quiet(), self.now))

    @precondition(lambda self: self.senders)
    @rule(data=strategies.data())
    def cancel(self, data):
        """A prefill worker's request is aborted."""
        writing = self.senders[data.draw(strategies.sampled_from(sorted(self.senders)))]
        if self.running(writing):
            self.on_sender(writing, writing.session.handle(Abandon("cancelled"), self.now))

    @rule(engine=strategies.sampled_from(["p1", "p2"]), what=strategies.sampled_from(["stop", "wake", "wake", "kill"]))
    def process(self, engine, what):
        """SIGSTOP, SIGCONT, kill -9 and a new start."""
        worker, engine = engine, self.engine(engine)
        if engine not in self.awake:
            return
        if what == "stop":
            self.awake[engine] = False
        elif what == "wake":
            self.awake[engine] = True
            for writing in list(self.senders.values()):
                if writing.session.plan.sender == engine:
                    self.report(writing)
        else:
            # A dead process writes nothing any more; what it had said may still arrive.
            del self.awake[engine]
            self.lives[worker] += 1
            for transfer_id in [t for t, x in self.senders.items() if x.session.plan.sender == engine]:
                del self.senders[transfer_id]

    @rule(seconds=strategies.sampled_from([0.01, 0.3, 1.0, 2.5, 20.0]))
    def wait(self, seconds):
        """Time passes."""
        self.now += seconds
        self.tick()

    def tick(self):
        """Everybody who runs looks at the clock."""
        self.on_desk(self.desk.tick(self.now))
        for engine in self.desk.suspects():
            if engine not in self.awake:
                self.on_desk(self.desk.writer_dead(engine, self.now))
        for writing in list(self.senders.values()):
            if self.running(writing):
                self.on_sender(writing, writing.session.tick(self.now))

    # What must hold.

    def check_bytes(self, transfer_id):
        """The slot holds what this transfer's writer wrote, and nothing else."""
        slot, num_blocks = self.held[transfer_id]
        first = slot.offset // LAYOUT.block_bytes
        assert self.memory[first : first + num_blocks] == [transfer_id] * num_blocks

    @invariant()
    def delivered_bytes_are_right(self):
        """Rule 1 and 5: what a reader holds is whole, and nobody writes into it."""
        for transfer_id in getattr(self, "held", {}):
            self.check_bytes(transfer_id)

    @invariant()
    def nobody_shares_a_slot(self):
        """Blocks that a live writer may still write belong to no other open slot."""
        if not hasattr(self, "desk"):
            return
        self.desk.validate()
        owners = Counter()
        for slot, blocks in ((r.slot, r.reservation.num_blocks) for r in self.desk._live.values() if r.slot):
            owners.update(range(slot.offset // 4096, slot.offset // 4096 + blocks))
        assert all(count == 1 for count in owners.values())
        for writing in self.senders.values():
            if writing.in_flight:
                record = self.desk._live.get(writing.session.plan.transfer_id)
                assert record is not None, writing.session.story()
                assert record.slot is not None, record.story()
                assert record.slot.name == writing.slot

    @invariant()
    def ends_are_told_once(self):
        """Rule 4: exactly one end on each side."""
        for transfer_id in getattr(self, "told", ()):
            assert self.told[transfer_id] == 1
        for writing in getattr(self, "senders", {}).values():
            assert len(writing.outcomes) <= 1
            assert (len(writing.outcomes) == 1) == (
                writing.session.ended or writing.session.state is SenderState.STOPPING
            )

    def teardown(self):
        """The network heals, stopped processes wake up, time passes: nothing is left over."""
        if not hasattr(self, "desk"):
            return
        for engine in list(self.awake):
            self.awake[engine] = True
        for transfer_id in list(self.held):
            self.read_all(transfer_id)
        for _ in range(200):
            self.now += BEAT
            self.tick()
            for writing in list(self.senders.values()):
                while writing.to_post or writing.in_flight:
                    writing.in_flight, writing.to_post = writing.in_flight + writing.to_post, 0
                    self.one_lands(writing)
                self.report(writing)
            while self.to_desk or self.to_senders:
                if self.to_desk:
                    self.on_desk(self.desk.hear(self.to_desk.pop(0), self.now))
                if self.to_senders:
                    self.hear(*self.to_senders.pop(0))
            for transfer_id in list(self.held):
                self.read_all(transfer_id)
        assert not self.desk.states(), self.desk.states()
        assert not self.desk.bytes_by_state()
        assert self.desk._slots._arena.used_bytes == 0
        assert all(writing.session.ended for writing in self.senders.values())
        assert set(self.told) == self.claimed

    def read_all(self, transfer_id):
        """Read and release."""
        self.check_bytes(transfer_id)
        del self.held[transfer_id]
        self.on_desk(self.desk.release(transfer_id, self.now))


TestBelts = Belts.TestCase
TestBelts.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
