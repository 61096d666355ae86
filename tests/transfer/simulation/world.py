"""Everything together, and what may happen: one method an event. Each ends with the invariants.

An event names what it is about by a number (``pick``), so that its chooser (``walk``, hypothesis) needs to know
nothing of the world. An event that is not possible at the moment does nothing.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from typing import Self, TypeVar

from kvbelt.transfer.receive.states import PartTaken, Release
from kvbelt.transfer.send.plan import Run
from kvbelt.wire.ids import TransferId
from kvbelt.wire.probe import ProbeResult
from tests.transfer.simulation import invariants
from tests.transfer.simulation.lines import Network, Packet
from tests.transfer.simulation.lives import (
    BEAT,
    DecodeWorker,
    Life,
    PrefillWorker,
    Reader,
    Send,
    Sizes,
    measurements_are_short,
)
from tests.transfer.simulation.memory import Content, Ether, Fate, Write

ThingT = TypeVar("ThingT")

#: Rounds of a beat in which everything must be over once the network is well: the longest deadline, a lease to be
#: declared silent, another to abort, a claim's patience, and some.
HEALING_ROUNDS = 200


class Route(StrEnum):
    """The network's treatment of a packet."""

    DELIVER = "deliver"
    REPEAT = "repeat"  # delivered now, and still under way
    LOSE = "lose"


def pick(things: Sequence[ThingT], number: int) -> ThingT | None:
    """One of them; None if there is none."""
    return things[number % len(things)] if things else None


class World:
    """Prefill workers, decode workers and the network between them."""

    def __init__(self, sizes: Sizes, num_prefill: int = 2, num_decode: int = 1) -> None:
        self.sizes = sizes
        self.network = Network()
        self.ether = Ether()
        self.now = 0.0
        self.numbers = itertools.count()
        self.names = itertools.count()
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.sends: dict[TransferId, Send] = {}  #: of workers that live, until they are over and checked
        self.readers: list[Reader] = []  #: of workers that live, until they have nothing in their hands
        self.claimed: set[TransferId] = set()
        self.warmings: list[PrefillWorker] = []  #: of whom was asked to connect ahead
        self.warmed: list[PrefillWorker] = []  #: of whom told what came of it
        self.probing: list[PrefillWorker] = []  #: of whom was asked to measure a link
        self.probed: list[PrefillWorker] = []  #: of whom told what came of it
        self.events: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()  #: transfers, by how they ended on each side
        self.memo = invariants.Memo()
        self._patches = ExitStack()
        self._patches.enter_context(measurements_are_short())
        for number in range(num_prefill):
            self._born_prefill(f"p{number}")
        for number in range(num_decode):
            self._born_decode(f"d{number}")

    def close(self) -> None:
        """Restore the length of measurements."""
        self._patches.close()

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()

    # Lives.

    def _born_prefill(self, name: str) -> None:
        worker = self.prefill[name] = PrefillWorker(name, next(self.numbers), self.sizes, self.network, self.ether)
        worker.now = self.now

    def _born_decode(self, name: str) -> None:
        worker = self.decode[name] = DecodeWorker(name, next(self.numbers), self.sizes, self.network, self.ether)
        worker.now = self.now

    def lives(self) -> list[Life]:
        """All living processes."""
        return [*self.prefill.values(), *self.decode.values()]

    def process(self, number: int, what: str) -> None:
        """SIGSTOP, SIGCONT, or kill -9 and a new start."""
        life = pick(self.lives(), number)
        assert life is not None
        if what == "stop":
            life.running = False
        elif what == "wake":
            life.running = True
            life.turn()
        else:
            self._kill(life)
        self._happened(what)

    def cut(self, number: int, *, mend: bool) -> None:
        """The host of a prefill worker is cut off: nothing leaves it or reaches it, and no connection ends."""
        name = pick(list(self.prefill), number)
        assert name is not None
        if mend:
            self.network.cut.discard(name)
        else:
            self.network.cut.add(name)
        self._happened("mend" if mend else "cut")

    def _kill(self, life: Life) -> None:
        life.die()
        self.memo.died(life, self.lives())
        if isinstance(life, PrefillWorker):
            for send in life.sends.values():
                self.sends.pop(send.transfer_id, None)
                self.ended["sender died"] += not send.ends
            self._born_prefill(life.name)
        else:
            self.readers = [reader for reader in self.readers if reader.worker is not life]
            self._born_decode(life.name)

    # Engines and readers.

    def send(self, number: int, to: int, blocks: int, seconds: float, reused: int = 0) -> None:
        """A prompt begins on a prefill worker; the decode worker has ``reused`` of its blocks already."""
        worker, there = pick(list(self.prefill.values()), number), pick(list(self.decode.values()), to)
        assert worker is not None
        assert there is not None
        if worker.running:
            transfer_id = TransferId(f"t{next(self.names)}")
            prefix = transfer_id.encode().ljust(16, b".") * min(reused, blocks)
            if prefix:
                there.held[prefix[:16]] = reused
            self.sends[transfer_id] = worker.send(transfer_id, there.address, blocks, seconds, prefix)
            worker.turn()
        self._happened("send")

    def _open_sends(self) -> list[Send]:
        return [send for send in self.sends.values() if send.worker.running and not send.computed]

    def warm(self, number: int, to: int) -> None:
        """Let a prefill worker connect before its first prompt."""
        worker, there = pick(list(self.prefill.values()), number), pick(list(self.decode.values()), to)
        assert worker is not None
        assert there is not None
        if worker.running:
            asked, told = self.warmings, self.warmed
            asked.append(worker)
            worker.sender.warm(there.address, lambda outcome: told.append(worker))
            worker.turn()
        self._happened("warm")

    def probe(self, number: int, to: int) -> None:
        """Let a prefill worker measure its link to a decode worker."""
        worker, there = pick(list(self.prefill.values()), number), pick(list(self.decode.values()), to)
        assert worker is not None
        assert there is not None
        if worker.running:
            told = self.probed

            def on_end(probed: ProbeResult) -> None:
                told.append(worker)
                self.ended[f"probed: {probed.reason or 'measured'}"] += 1

            self.probing.append(worker)
            worker.probes.begin(there.engine_id, on_end)
            worker.turn()
        self._happened("probe")

    def write_blocks(self, number: int, count: int) -> None:
        """An engine has computed the next blocks of a layer."""
        send = pick(self._open_sends(), number)
        if send is not None:
            self._write_blocks(send, count)
            send.worker.turn()
        self._happened("blocks")

    def _write_blocks(self, send: Send, count: int) -> None:
        layer = min(range(len(send.written)), key=send.written.__getitem__)
        first = send.written[layer]
        count = min(count, send.num_blocks - first)
        if count:
            ids = tuple(range(send.first_id + first, send.first_id + first + count))
            send.written[layer] += count
            send.worker.pipeline.hand_over(send.outgoing, [Run(layer, first, ids)])
        if min(send.written) == send.num_blocks:
            send.computed = True
            send.worker.pipeline.computed(send.outgoing, send.worker.now)

    def forget_blocks(self, number: int) -> None:
        """Let an engine report a prompt as complete although it is not."""
        send = pick(self._open_sends(), number)
        if send is not None:
            send.computed = True
            send.worker.pipeline.computed(send.outgoing, send.worker.now)
            send.worker.turn()
        self._happened("incomplete")

    def cancel(self, number: int) -> None:
        """A prefill worker's request is aborted."""
        send = pick([send for send in self.sends.values() if send.worker.running], number)
        if send is not None:
            send.computed = True
            send.worker.sender.abort(send.outgoing, "aborted")
            send.worker.turn()
        self._happened("cancel")

    def claim(self, number: int, seconds: float, *, again: bool = False) -> None:
        """A decode worker's request asks for a transfer, which may be unknown; ``again``: not the first request."""
        sends = list(self.sends.values())
        if not again:
            sends = [send for send in sends if send.transfer_id not in self.claimed]
        send = pick(sends, number)
        if send is not None and send.outgoing is not None:
            engine = send.outgoing.receiver
            there = next((worker for worker in self.decode.values() if worker.engine_id == engine), None)
            if there is not None and there.running:
                self.claimed.add(send.transfer_id)
                self.readers.append(there.claim(send.transfer_id, seconds))
        self._happened("claim")

    def cancel_read(self, number: int) -> None:
        """End a request that waits."""
        reader = pick([reader for reader in self.readers if reader.worker.running and not reader.arrivals], number)
        if reader is not None:
            reader.worker.receiver.cancel_read(reader.transfer_id, reader)
        self._happened("cancel_read")

    def _holding(self) -> list[Reader]:
        return [reader for reader in self.readers if reader.worker.running and reader.holds]

    def read(self, number: int) -> None:
        """Let a reader take what is ready, and release it when it has everything."""
        reader = pick(self._holding(), number)
        if reader is not None:
            self._read(reader)
        self._happened("read")

    def _read(self, reader: Reader) -> None:
        assert reader.delivery is not None
        receiver, shape = reader.worker.receiver, reader.delivery.shape
        if reader.broken is None and reader.taken < reader.ready:
            invariants.part_is_right(self, reader, reader.taken)
            reader.taken += 1
            if shape.in_parts:
                receiver.handle(reader.transfer_id, PartTaken())
        if reader.broken is not None or (reader.finished and reader.taken == shape.num_parts):
            self.ended["read" if reader.broken is None else "broken"] += 1
            self._let_go(reader)

    def let_go(self, number: int) -> None:
        """Let a reader release its KV in the middle."""
        reader = pick(self._holding(), number)
        if reader is not None:
            self._let_go(reader)
        self._happened("let go")

    def _let_go(self, reader: Reader) -> None:
        reader.released = True
        reader.worker.receiver.handle(reader.transfer_id, Release())

    # The network and memory.

    def route(self, number: int, how: Route) -> None:
        """A packet arrives, arrives twice, or is lost."""
        under_way = self.network.under_way
        if under_way:
            index = number % len(under_way)
            packet = under_way[index] if how is Route.REPEAT else under_way.pop(index)
            lost = how is Route.LOSE or self.network.is_cut(packet.sender)
            if not lost and self.network.deliver(packet):
                self._hear(packet)
        self._happened(how)

    def _hear(self, packet: Packet) -> None:
        for life in self.lives():
            if packet.to in life.lines.own:
                if packet.route is not None:
                    self.memo.heard(life, packet.speaker)
                if life.running:
                    life.turn()
                return

    def land(self, number: int, fate: Fate, *, stuck: bool = False) -> None:
        """A write in flight ends; those posted from now on can be aborted, or cannot.

        A stopped worker's lands, too, and so does a dead one's: its kernel had taken it.
        """
        write = pick([write for write in self.ether.flying if not self.network.is_cut(write.channel.agent)], number)
        if write is not None:
            self._land(write, fate)
        for worker in self.prefill.values():
            worker.channel.stick = stuck
        self._happened(fate)

    def _land(self, write: Write, fate: Fate) -> None:
        write.end(fate)
        worker = next((life for life in self.prefill.values() if life.channel is write.channel), None)
        if worker is not None and worker.running:
            worker.turn()

    def finish_copy(self, number: int) -> None:
        """End a gather or a digest."""
        copies = [(life, copy) for life in self.lives() if life.running for copy in life.copy.under_way]
        chosen = pick(copies, number)
        if chosen is not None:
            self._finish(*chosen)
        self._happened("copy")

    def _finish(self, life: Life, copy) -> None:
        life.copy.under_way.remove(copy)
        copy.end()
        life.turn()

    # Time.

    def wait(self, seconds: float) -> None:
        """Let time pass for running processes, each up to its own next turn."""
        self._wait(seconds)
        self._happened("wait")

    def _wait(self, seconds: float) -> None:
        left = seconds
        while left > 0:
            running = [life for life in self.lives() if life.running]
            step = min([left, *(max(life.due - life.now, 0.001) for life in running)])
            left -= step
            self.now += step
            for life in running:
                life.now += step
            for life in running:
                if life.due <= life.now:
                    life.turn()

    def _happened(self, what: str) -> None:
        self.events[what] += 1
        invariants.check(self)
        self._forget()

    def _forget(self) -> None:
        """Drop transfers that have ended and were found right."""
        for transfer_id, send in list(self.sends.items()):
            if send.ends and send.frees and transfer_id not in send.worker.sender.transfers:
                self.ended[f"sent: {send.outgoing.state}"] += 1
                del self.sends[transfer_id]
        for reader in list(self.readers):
            if reader.arrivals and not reader.holds:
                if reader.delivery is None:
                    self.ended[f"lost: {reader.arrivals[0].reason}"] += 1
                self.readers.remove(reader)

    # The end.

    def heal(self, stay_stopped: Sequence[Life] = ()) -> None:
        """Repair the network, wake most stopped workers, and let engines and readers work."""
        self.network.cut.clear()
        for life in self.lives():
            if life not in stay_stopped and not life.running:
                life.running = True
                life.turn()
        for worker in self.prefill.values():
            worker.channel.stick = False
        for _ in range(HEALING_ROUNDS):
            self._everything_arrives(stay_stopped)
            if self._is_quiet(stay_stopped):
                break
            self._wait(BEAT)
            self._happened("heal")
        invariants.nothing_is_left(self, stay_stopped)

    def _everything_arrives(self, stay_stopped: Sequence[Life]) -> None:
        for _ in range(1000):
            moved = False
            packets, self.network.under_way = self.network.under_way, []
            for packet in packets:
                moved = True
                if self.network.deliver(packet):
                    self._hear(packet)
            for write in list(self.ether.flying):
                moved = True
                self._land(write, Fate.LAND)
            for life in self.lives():
                for copy in list(life.copy.under_way) if life.running else ():
                    moved = True
                    self._finish(life, copy)
            for send in self._open_sends():
                moved = True
                self._write_blocks(send, send.num_blocks)
                send.worker.turn()
            for reader in self._holding():
                if reader.taken < reader.ready or reader.finished or reader.broken is not None:
                    moved = True
                    self._read(reader)
            if not moved:
                return
            invariants.check(self)
        raise AssertionError("a thousand rounds, and it still goes on without time passing")

    def _is_quiet(self, stay_stopped: Sequence[Life]) -> bool:
        return not invariants.what_is_left(self, stay_stopped)

    def works(self) -> None:
        """Send a prompt from every prefill worker to every decode worker."""
        if not self.sizes.reachable and self.memo.silent:
            return  # the slots of the dead are kept, and may be all there are
        for number, to in itertools.product(range(len(self.prefill)), range(len(self.decode))):
            reason = self._one_prompt(number, to)
            if reason == "no_handshake":
                # Who was stopped for so long that it was forgotten learns it from a refusal, and says hello again.
                reason = self._one_prompt(number, to)
            assert reason == "done", reason

    def _one_prompt(self, number: int, to: int) -> str:
        fits = self.sizes.buffer // self.sizes.layers
        self.send(number, to, fits + 1 if fits > 1 else fits, 10.0)
        (send,) = self.sends.values()
        self.claim(0, 10.0)
        (reader,) = self.readers
        self.heal()
        assert reader.finished == send.ends[0].ok
        return send.ends[0].reason


__all__ = ["Content", "Fate", "Route", "Sizes", "World"]
