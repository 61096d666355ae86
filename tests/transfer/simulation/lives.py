"""The processes of the world: each is one life, with a clock that stands still while it is stopped."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

from kvbelt.transfer import probing
from kvbelt.transfer import reception as reception_module
from kvbelt.transfer.desk import Desk, DeskTimes
from kvbelt.transfer.dispatch import Dispatch, Outgoing
from kvbelt.transfer.ports import Lost, Region, TransferOutcome
from kvbelt.transfer.pump import Load, Pump
from kvbelt.transfer.receiver_commands import Break, Deliver, Finish, PartReady
from kvbelt.transfer.reception import Reception
from kvbelt.transfer.sender import SenderSession, SendPlan
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.digest import Verify
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import Compatibility, Hello, MemoryRegion, ProcessIdentity, Welcome
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from tests.transfer.simulation.lines import Lines, Network
from tests.transfer.simulation.memory import CELL, RECEIVE, REUSED, STAGING, Content, Ether, Memory, SimChannel, SimCopy

LEASE, BEAT, HANDSHAKE, CLAIM, MEMORY = 2.0, 0.25, 3.0, 4.0, 8.0

#: How long a sender says goodbye: longer than any network here is ill. What happens to one that gives up is in
#: docs/transfer.md.
PATIENCE = 1000.0


@dataclass(frozen=True)
class Sizes:
    """How large everything is; in blocks or cells."""

    layers: int = 1
    buffer: int = 6  #: cells of the receive buffer
    overflow: int = 0
    staging: int = 4
    piece: int = 1  #: cells of a piece
    verify: Verify = "off"
    asynchronous: bool = False  #: copies take time
    one_machine: bool = True  #: who is dead can be seen

    @property
    def layout(self) -> KVLayout:
        """Tokens and blocks are the same here."""
        return KVLayout(self.layers, 1, 1, 1, "x", "x", CELL)


def settings(verify: Verify) -> BeltSettings:
    """Of every process."""
    return BeltSettings(
        lease_seconds=LEASE,
        heartbeat_seconds=BEAT,
        claim_seconds=CLAIM,
        handshake_seconds=HANDSHAKE,
        memory_seconds=MEMORY,
        peer_idle_seconds=20.0,
        notification_endpoint="tcp://proxy:7500",
        verify=verify,
    )


class Life:
    """What both kinds of process have."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        self.name = name
        self.engine_id = EngineId(f"{name}-{number}")
        self.sizes = sizes
        self.identity = BeltIdentity(self.engine_id, "both", "m", "f", sizes.layout, worker=name)
        self.settings = settings(sizes.verify)
        self.process = ProcessIdentity("boot" if sizes.one_machine else name, "pids", number + 1, number + 1)
        self.memory: Memory = {}
        self.lines = Lines(network, self.engine_id, name)
        self.ether = ether
        ether.memories[self.engine_id] = self.memory
        self.channel = SimChannel(self.engine_id, ether, self.memory)
        self.copy = SimCopy(self.memory, sizes.asynchronous)
        self.compatibility: Compatibility = self.identity.compatibility("memory")
        self.running = True
        self.alive = True
        self.now = 0.0

    def clock(self) -> float:
        """Seconds of its own attention."""
        return self.now

    def turn(self) -> None:
        """Hear what has come, look at the clock, move bytes."""
        raise NotImplementedError

    @property
    def due(self) -> float:
        """On its own clock."""
        raise NotImplementedError

    def die(self) -> None:
        """Its memory, its connections, its copies and its writes are gone."""
        self.alive = self.running = False
        self.lines.close_all()
        del self.ether.memories[self.engine_id]
        self.ether.flying = [write for write in self.ether.flying if write.channel is not self.channel]


@dataclass(eq=False)
class Send:
    """One outgoing transfer, as its engine sees it."""

    transfer_id: TransferId
    worker: "PrefillWorker"
    outgoing: Outgoing | None
    num_blocks: int
    first_id: int  #: of its blocks in the engine's pool: they are consecutive
    deadline: float  #: on the worker's clock
    written: list[int] = field(default_factory=list)  #: blocks handed over, by layer
    computed: bool = False
    ends: list[TransferOutcome] = field(default_factory=list)
    frees: int = 0


class PrefillWorker(Life):
    """One life of a prefill worker: the real Dispatch, Peers, sessions and Pump."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        super().__init__(name, number, sizes, network, ether)
        region = Region(STAGING, sizes.staging * CELL, "cpu")
        self.pump = Pump(self.channel, self.copy, region, sizes.layout, sizes.piece * CELL)
        self.dispatch = Dispatch(
            self.engine_id,
            sizes.layout,
            self.hello,
            replace(self.settings, memory_seconds=PATIENCE),
            self.lines,
            self.channel,
            self.pump,
            self.clock,
        )
        self.channel.measures = self._measures
        self.sends: dict[TransferId, Send] = {}
        self._next_block = 0

    def _measures(self, address: int) -> TransferId | None:
        for load in self.pump._loads.values():
            if load.probing is not None and any(STAGING + piece.offset == address for piece in load.pieces):
                return load.transfer_id
        return None

    def hello(self, receiver: EngineId) -> Hello:
        """Who this is."""
        return Hello(self.engine_id, receiver, self.name, "prefill", self.process, self.compatibility)

    def send(
        self, transfer_id: TransferId, to: ReceiverAddress, num_blocks: int, seconds: float, prefix: bytes
    ) -> Send:
        """As ``Belt.send`` does it."""
        layout = self.sizes.layout
        plan = SendPlan(
            transfer_id=transfer_id,
            sender=self.engine_id,
            receiver=to.engine_id,
            num_tokens=num_blocks,
            num_blocks=num_blocks,
            num_bytes=layout.slot_bytes(num_blocks),
            deadline=self.now + seconds,
            heartbeat_seconds=BEAT,
            lease_seconds=LEASE,
            memory_seconds=PATIENCE,
            prefix=prefix,
        )
        first_id, self._next_block = self._next_block, self._next_block + num_blocks
        send = Send(transfer_id, self, None, num_blocks, first_id, plan.deadline, [0] * layout.num_layers)
        for layer in range(layout.num_layers):
            for block in range(num_blocks):
                self.copy.pool[layer, first_id + block] = Content(transfer_id, layer, block)

        def blocks_free() -> None:
            send.frees += 1
            for layer in range(layout.num_layers):
                for block in range(num_blocks):
                    self.copy.pool[layer, first_id + block] = REUSED

        send.outgoing = self.dispatch.begin(
            to,
            lambda peer: Outgoing(
                SenderSession(plan, self.now),
                Load(transfer_id, num_blocks * layout.num_layers),
                peer,
                blocks_free,
                send.ends.append,
                lambda reason: None,
            ),
        )
        self.sends[transfer_id] = send
        return send

    def turn(self) -> None:
        """As the driver's."""
        self.dispatch.hear(self.lines.ready())
        self.dispatch.tick(self.now)
        self.dispatch.step()

    @property
    def due(self) -> float:
        """When it wants to look again."""
        return self.dispatch.due


@dataclass(eq=False)
class Reader:
    """One request on a decode worker that wants a transfer's KV."""

    transfer_id: TransferId
    worker: "DecodeWorker"
    deadline: float  #: on the worker's clock
    arrivals: list["Reader | Lost"] = field(default_factory=list)
    delivery: Deliver | None = None
    ready: int = 0  #: of parts: so many may be taken out
    taken: int = 0
    finished: bool = False
    broken: str | None = None
    released: bool = False

    def __call__(self, arrival: "Reader | Lost") -> None:
        """It is told."""
        self.arrivals.append(arrival)

    @property
    def holds(self) -> bool:
        """Whether it has something in its hands."""
        return self.delivery is not None and not self.released


class Hands:
    """``Deliveries`` without threads: readers take out what is ready when the schedule says so."""

    def __init__(self, worker: "DecodeWorker") -> None:
        self._worker = worker

    def make(self, delivery: Deliver) -> Reader:
        """What a reader gets: itself."""
        reader = self._worker.waiting[delivery.transfer_id]
        reader.delivery = delivery
        if not delivery.shape.in_parts:
            reader.ready, reader.finished = 1, True
        return reader

    def tell(self, command: PartReady | Finish | Break) -> None:
        """Something has become of a prompt in parts."""
        reader = self._worker.waiting.get(command.transfer_id)
        if reader is None or reader.released:
            return
        match command:
            case PartReady(part=part):
                assert part == reader.ready, "parts come in order, each once"
                reader.ready += 1
            case Finish():
                assert not reader.finished
                assert reader.broken is None
                reader.finished = True
            case Break(reason=reason):
                assert not reader.finished
                assert reader.broken is None
                reader.broken = reason


class DecodeWorker(Life):
    """One life of a decode worker: the real Reception, Desk, sessions and Checks."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        super().__init__(name, number, sizes, network, ether)
        #: Blocks of a prompt that the engine says to have, by the prompt's first hash.
        self.held: dict[bytes, int] = {}
        times = DeskTimes(LEASE, BEAT, CLAIM, MEMORY)
        cells = [size for size in (sizes.buffer, sizes.overflow) if size]
        self.desk = Desk(
            self.engine_id, sizes.layout, [size * CELL for size in cells], times, sizes.verify, self.blocks_held
        )
        welcome = Welcome(
            engine_id=self.engine_id,
            compatibility=self.compatibility,
            agent_metadata=self.engine_id.encode(),
            regions=tuple(MemoryRegion(RECEIVE[number], size * CELL, "cpu", 0) for number, size in enumerate(cells)),
        )
        self.reception = Reception(
            welcome, self.process, self.settings, self.lines, self.desk, self.copy, self.do, self.clock
        )
        self.reception.deliveries = Hands(self)
        #: The reader of each transfer that was claimed here: the one who waits or holds, or the last one.
        self.waiting: dict[TransferId, Reader] = {}
        self.address = ReceiverAddress(self.engine_id, name, self.reception.init_port, self.reception.alloc_port)

    @staticmethod
    def do(call) -> None:
        """There is one thread."""
        call()

    def blocks_held(self, hashes: Sequence[bytes]) -> int:
        """As the schedule has decided."""
        return self.held.get(hashes[0], 0) if hashes else 0

    def claim(self, transfer_id: TransferId, seconds: float) -> Reader:
        """A request asks for KV."""
        reader = Reader(transfer_id, self, self.now + seconds)
        before = self.waiting.get(transfer_id)
        if before is None or (before.arrivals and not before.holds):
            self.waiting[transfer_id] = reader
        self.reception.claim(transfer_id, reader.deadline, reader)
        return reader

    def turn(self) -> None:
        """As the driver's."""
        self.reception.hear(self.lines.ready())
        self.reception.tick(self.now)

    @property
    def due(self) -> float:
        """When it wants to look again."""
        return self.reception.due


@contextlib.contextmanager
def deaths_are_seen(dead) -> Iterator[None]:
    """The process table is the world's: ``dead(process)``, for those on the same machine."""

    def is_dead(process: ProcessIdentity, here: ProcessIdentity) -> bool:
        return process.boot_id == here.boot_id and dead(process)

    with mock.patch.object(reception_module, "is_dead", is_dead):
        yield


@contextlib.contextmanager
def measurements_are_short() -> Iterator[None]:
    """Nobody waits for an operation: the schedule ends it. Of each kind there are few."""
    short = {"SPIN_SECONDS": 0.0, "SMALL_ROUNDS": 1, "LARGE_ROUNDS": 1}
    with contextlib.ExitStack() as stack:
        for name, value in short.items():
            stack.enter_context(mock.patch.object(probing, name, value))
        yield
