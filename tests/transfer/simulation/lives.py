"""The processes of the world: each is one life, with a clock that stands still while it is stopped."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

from kvbelt.transfer import link_probe
from kvbelt.transfer.link_probe import LinkProbes
from kvbelt.transfer.ports import Lost, Region, TransferOutcome
from kvbelt.transfer.receive.commands import Break, Deliver, Finish, PartReady
from kvbelt.transfer.receive.driver import ReceiverDriver
from kvbelt.transfer.receive.incoming import IncomingTransfers, ReceiveTimes
from kvbelt.transfer.send.driver import SenderDriver
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import Compatibility, Hello, MemoryRegion, Welcome
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.reservation import Verify
from tests.transfer.simulation.lines import Lines, Network
from tests.transfer.simulation.memory import CELL, RECEIVE, REUSED, STAGING, Content, Ether, Memory, SimChannel, SimCopy

LEASE, BEAT, HANDSHAKE, CLAIM, MEMORY = 2.0, 0.25, 3.0, 4.0, 8.0

#: How long a sender says goodbye: longer than any network here is ill. What happens to one that gives up is in
#: docs/transfer.md.
PATIENCE = 1000.0

TIMES = SendTimes(BEAT, LEASE, PATIENCE)


@dataclass(frozen=True)
class Sizes:
    """All sizes of a world, in blocks or cells."""

    layers: int = 1
    buffer: int = 6  #: cells of the receive buffer
    overflow: int = 0
    staging: int = 4
    piece: int = 1  #: cells of a piece
    verify: Verify = "off"
    asynchronous: bool = False  #: copies take time
    reachable: bool = True  #: the liveness port

    @property
    def layout(self) -> KVLayout:
        """Tokens and blocks are the same here."""
        return KVLayout(self.layers, 1, 1, 1, "x", "x", CELL)


def settings(verify: Verify) -> BeltSettings:
    """The settings of every process."""
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
    """The parts that both kinds of process share."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        self.name = name
        self.engine_id = EngineId(f"{name}-{number}")
        self.sizes = sizes
        self.identity = BeltIdentity(self.engine_id, "both", "m", "f", sizes.layout)
        self.settings = settings(sizes.verify)
        self.memory: Memory = {}
        self.network = network
        self.lines = Lines(network, self.engine_id, name, ether, reachable=sizes.reachable)
        self.ether = ether
        ether.memories[self.engine_id] = self.memory
        self.channel = SimChannel(self.engine_id, ether, self.memory)
        self.copy = SimCopy(self.memory, sizes.asynchronous)
        self.compatibility: Compatibility = self.identity.compatibility("memory")
        self.running = True
        self.alive = True
        self.now = 0.0

    def clock(self) -> float:
        """Seconds in which the process ran."""
        return self.now

    def turn(self) -> None:
        """Take messages, look at the clock, move bytes."""
        raise NotImplementedError

    @property
    def due(self) -> float:
        """The next due time on the process's own clock."""
        raise NotImplementedError

    def die(self) -> None:
        """Drop memory, connections and copies. Writes that the kernel has taken go on."""
        self.alive = self.running = False
        self.lines.close_all()
        del self.ether.memories[self.engine_id]
        self.network.ended.add(self.engine_id)
        self.ether.flying = [
            write for write in self.ether.flying if write.channel is not self.channel or not write.reads
        ]


@dataclass(eq=False)
class Send:
    """One outgoing transfer, as its engine sees it."""

    transfer_id: TransferId
    worker: "PrefillWorker"
    outgoing: SenderSession | None
    num_blocks: int
    first_id: int  #: of its blocks in the engine's pool: they are consecutive
    deadline: float  #: on the worker's clock
    written: list[int] = field(default_factory=list)  #: blocks handed over, by layer
    computed: bool = False
    ends: list[TransferOutcome] = field(default_factory=list)
    frees: int = 0


class PrefillWorker(Life):
    """One life of a prefill worker: the real SenderDriver, Peers, sessions and WritePipeline."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        super().__init__(name, number, sizes, network, ether)
        region = Region(STAGING, sizes.staging * CELL, "cpu")
        self.pipeline = WritePipeline(self.channel, self.copy, region, sizes.layout, sizes.piece * CELL)
        self.sender = SenderDriver(
            self.engine_id,
            self.hello,
            replace(self.settings, memory_seconds=PATIENCE),
            self.lines,
            self.channel,
            self.pipeline,
            self.clock,
        )
        self.probes = LinkProbes(self.engine_id, sizes.layout, TIMES, self.channel, self.sender)
        self.channel.measures = self._measures
        self.sends: dict[TransferId, Send] = {}
        self._next_block = 0

    def _measures(self, address: int) -> TransferId | None:
        for transfer in self.pipeline._transfers.values():
            if transfer.measures and any(STAGING + piece.offset == address for piece in transfer.load.pieces):
                return transfer.transfer_id
        return None

    def hello(self, receiver: EngineId) -> Hello:
        """The Hello of this incarnation."""
        return Hello(self.engine_id, receiver, "prefill", self.compatibility)

    def send(
        self, transfer_id: TransferId, to: ReceiverAddress, num_blocks: int, seconds: float, prefix: bytes
    ) -> Send:
        """As ``Belt.send`` does it."""
        layout = self.sizes.layout
        first_id, self._next_block = self._next_block, self._next_block + num_blocks
        send = Send(transfer_id, self, None, num_blocks, first_id, self.now + seconds, [0] * layout.num_layers)
        for layer in range(layout.num_layers):
            for block in range(num_blocks):
                self.copy.pool[layer, first_id + block] = Content(transfer_id, layer, block)

        def blocks_free() -> None:
            send.frees += 1
            for layer in range(layout.num_layers):
                for block in range(num_blocks):
                    self.copy.pool[layer, first_id + block] = REUSED

        send.outgoing = SenderSession(
            transfer_id,
            self.engine_id,
            to.engine_id,
            num_blocks,
            layout,
            send.deadline,
            TIMES,
            self.now,
            prefix,
            blocks_free,
            send.ends.append,
        )
        self.sender.begin(send.outgoing, to)
        self.sends[transfer_id] = send
        return send

    def turn(self) -> None:
        """One turn of the driver."""
        self.sender.on_messages(self.lines.ready())
        self.sender.tick(self.now)
        while self.probes.step() | self.sender.step():
            pass

    @property
    def due(self) -> float:
        """The time at which the driver wants its next turn."""
        return self.sender.due


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
        """Take the arrival."""
        self.arrivals.append(arrival)

    @property
    def holds(self) -> bool:
        """Whether it holds KV."""
        return self.delivery is not None and not self.released


class Hands:
    """``Deliveries`` without threads: readers take out what is ready when the schedule says so."""

    def __init__(self, worker: "DecodeWorker") -> None:
        self._worker = worker

    def make(self, delivery: Deliver) -> Reader:
        """The reader itself, which takes the place of received KV."""
        reader = self._worker.waiting[delivery.transfer_id]
        reader.delivery = delivery
        if not delivery.shape.in_parts:
            reader.ready, reader.finished = 1, True
        return reader

    def notify(self, command: PartReady | Finish | Break) -> None:
        """A prompt in parts has changed."""
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
    """One life of a decode worker: the real ReceiverDriver, IncomingTransfers, sessions and Checks."""

    def __init__(self, name: str, number: int, sizes: Sizes, network: Network, ether: Ether) -> None:
        super().__init__(name, number, sizes, network, ether)
        #: Blocks of a prompt that the engine says to have, by the prompt's first hash.
        self.held: dict[bytes, int] = {}
        times = ReceiveTimes(LEASE, BEAT, CLAIM, MEMORY)
        cells = [size for size in (sizes.buffer, sizes.overflow) if size]
        self.incoming = IncomingTransfers(
            self.engine_id, sizes.layout, [size * CELL for size in cells], times, sizes.verify, self.blocks_held
        )
        welcome = Welcome(
            engine_id=self.engine_id,
            compatibility=self.compatibility,
            agent_metadata=self.engine_id.encode(),
            regions=tuple(MemoryRegion(RECEIVE[number], size * CELL, "cpu", 0) for number, size in enumerate(cells)),
        )
        who = self.engine_id, self.compatibility
        self.receiver = ReceiverDriver(
            *who, lambda: welcome, self.settings, self.lines, self.incoming, self.copy, self.do, self.clock
        )
        self.receiver.deliveries = Hands(self)
        #: The reader of each transfer that was claimed here: the one who waits or holds, or the last one.
        self.waiting: dict[TransferId, Reader] = {}
        self.address = ReceiverAddress(self.engine_id, name, self.receiver.init_port, self.receiver.alloc_port)

    @staticmethod
    def do(call) -> None:
        """Call at once, because there is one thread."""
        call()

    def blocks_held(self, hashes: Sequence[bytes]) -> int:
        """The number that the schedule has decided."""
        return self.held.get(hashes[0], 0) if hashes else 0

    def claim(self, transfer_id: TransferId, seconds: float) -> Reader:
        """Let a request ask for KV."""
        reader = Reader(transfer_id, self, self.now + seconds)
        before = self.waiting.get(transfer_id)
        if before is None or (before.arrivals and not before.holds):
            self.waiting[transfer_id] = reader
        self.receiver.claim(transfer_id, reader.deadline, reader)
        return reader

    def turn(self) -> None:
        """One turn of the driver."""
        self.receiver.on_messages(self.lines.ready())
        self.receiver.tick(self.now)

    @property
    def due(self) -> float:
        """The time at which the driver wants its next turn."""
        return self.receiver.due


@contextlib.contextmanager
def measurements_are_short() -> Iterator[None]:
    """The schedule ends each operation, and there are few operations of each kind."""
    short = {"SPIN_SECONDS": 0.0, "SMALL_ROUNDS": 1, "LARGE_ROUNDS": 1}
    with contextlib.ExitStack() as stack:
        for name, value in short.items():
            stack.enter_context(mock.patch.object(link_probe, name, value))
        yield
