"""The receiving side's driver: performs what the desk commands, greets peers, looks after dead ones, compares digests.

Everything here runs on the belt's thread.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from kvbelt.security.keys import fingerprint, speaks_for
from kvbelt.transfer.checks import Checks, Verdict
from kvbelt.transfer.deliveries import Deliveries
from kvbelt.transfer.desk import Desk, DeskCommand
from kvbelt.transfer.fencing import is_dead, same_machine
from kvbelt.transfer.ports import Lost, PagedCopy, ReceivedKV
from kvbelt.transfer.receiver_commands import Answer, Break, Check, Deliver, Finish, Lose, PartReady
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire import codec
from kvbelt.wire.handshake import (
    PROTOCOL_VERSION,
    HandshakeMessage,
    HandshakeRefused,
    Hello,
    ProcessIdentity,
    Welcome,
    first_difference,
)
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.reservation import Cancel, Cancelled, Expired, FromSender, Refused, Reserve

log = logging.getLogger(__name__)

#: Between two looks at whether a suspected writer is dead, and at the channel for a quarantined one.
SUSPICION_SECONDS = 0.1

#: A receiver remembers a writer for longer than a writer remembers a receiver: who is greeted stays known.
WRITER_MEMORY = 2

#: Writers known at once. Beyond it those that have nothing here are forgotten first, and greet again.
MAX_WRITERS = 1024

#: What an ``Expired`` says that answers a message about something that never was, or is no more.
_STALE = frozenset({"stale_slot", "unknown_transfer"})


@dataclass(slots=True, eq=False)
class Writer:
    """One life of one prefill worker."""

    worker: str
    process: ProcessIdentity
    key: str | None  #: its public key, as the gate has seen it; None: no keys are asked for
    seen_at: float
    route: bytes | None = None  #: of its latest message on the alloc port


class Reception:
    """All incoming transfers of one process."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        welcome: Welcome,
        here: ProcessIdentity,
        settings: BeltSettings,
        sockets: Sockets,
        desk: Desk,
        copy: PagedCopy,
        ask: Callable[[Callable[[], None]], object],
        clock: Callable[[], float],
    ) -> None:
        self._welcome = welcome
        self._here = here
        self._settings = settings
        self._sockets = sockets
        self._checks = Checks(copy, settings.verify)
        self._clock = clock
        self._refusals = sockets.refusals
        self._handshakes = codec.handshakes(codec.MAX_HELLO_BYTES)
        self._reservations = codec.from_sender()
        self._writers: dict[EngineId, Writer] = {}
        # One callback for every reader that was not told yet.
        self._readers: dict[TransferId, Callable[[ReceivedKV | Lost], None]] = {}
        self._look_at = 0.0
        self._opening_until = 0.0  # the latest writer's connection is being opened
        self.desk = desk
        self.deliveries = Deliveries(copy, ask, taken=self.part_taken, released=self.release)
        host = settings.bind_host
        self._init_socket, self.init_port = sockets.bind(
            "init", host, settings.init_port, "the handshake (init) port", "pd_peer_init_port"
        )
        self._alloc_socket, self.alloc_port = sockets.bind(
            "alloc", host, settings.alloc_port, "the reservation (alloc) port", "pd_peer_alloc_port"
        )

    # What the owner asks for.

    def claim(self, transfer_id: TransferId, deadline: float, on_arrival: Callable[[ReceivedKV | Lost], None]) -> None:
        """Somebody wants this transfer's KV."""
        if transfer_id in self._readers:
            on_arrival(Lost("already_claimed", "another request waits for this transfer"))
            return
        self._readers[transfer_id] = on_arrival
        self._perform(self.desk.claim(transfer_id, deadline, self._clock()))

    def unclaim(self, transfer_id: TransferId, on_arrival: Callable[[ReceivedKV | Lost], None]) -> None:
        """... and wants it no more."""
        if self._readers.get(transfer_id) is on_arrival:
            self._perform(self.desk.unclaim(transfer_id, self._clock()))

    def part_taken(self, transfer_id: TransferId) -> None:
        """The next part of it has been read."""
        self._perform(self.desk.part_taken(transfer_id, self._clock()))

    def release(self, transfer_id: TransferId) -> None:
        """It has been read, or nobody reads on."""
        self._perform(self.desk.release(transfer_id, self._clock()))

    # What happens.

    def hear(self, ready: set[zmq.Socket[bytes]]) -> None:
        """Messages have arrived on these sockets; those of others are left alone."""
        if self._init_socket in ready:
            self._read("init", self._init_socket, self._on_handshake)
        if self._alloc_socket in ready:
            self._read("alloc", self._alloc_socket, self._on_message)

    def _read(self, name: str, socket: zmq.Socket[bytes], on_frame: Callable[[bytes, bytes, str | None], None]) -> None:
        for frames, key in self._sockets.received(socket):
            try:
                if len(frames) != 2:
                    raise codec.FrameError(f"{len(frames) - 1} frames instead of one")  # noqa: TRY301
                on_frame(frames[0], frames[1], key)
            except codec.VersionError as error:
                self._refusals.add(name, error.reason, error)
                self._refuse_version(socket, frames[0], error)
            except codec.FrameError as error:
                self._refusals.add(name, error.reason, error)

    def tick(self, now: float) -> None:
        """Let time pass."""
        self._perform(self.desk.tick(now))
        for verdict in self._checks.ended():
            self._take(verdict)
        suspects = self.desk.suspects()
        if suspects and self._look_at <= now:
            self._look_at = now + SUSPICION_SECONDS
            for engine_id in suspects:
                writer = self._writers.get(engine_id)
                if writer is not None and is_dead(writer.process, self._here):
                    log.info("prefill worker %s (pid %d) is dead; its slots are free", engine_id, writer.process.pid)
                    self._perform(self.desk.writer_dead(engine_id, now))

    @property
    def due(self) -> float:
        """When ``tick`` has something to do."""
        return min(self.desk.due, self._look_at) if self.desk.suspects() else self.desk.due

    @property
    def progress_every(self) -> float:
        """How often the channel must be given a chance to work; infinity: not at all."""
        if self._checks.under_way:
            return self._settings.poll_seconds
        if self.desk.expects_writes or self._clock() < self._opening_until:
            return self._settings.progress_seconds
        return SUSPICION_SECONDS if self.desk.suspects() else float("inf")

    def close(self, reason: str) -> None:
        """Nothing comes any more."""
        for transfer_id, on_arrival in list(self._readers.items()):
            self._perform(self.desk.unclaim(transfer_id, self._clock()))
            if self._readers.pop(transfer_id, None) is not None:
                on_arrival(Lost(reason, "the belt is closed"))

    # How.

    def _on_handshake(self, route: bytes, frame: bytes, key: str | None) -> None:
        message = self._handshakes.decode(frame)
        if not isinstance(message, Hello):
            raise codec.FrameError(f"a {type(message).__name__} is not for a receiver")
        Sockets.say(self._init_socket, route, self._handshakes.encode(self._greet(message, key)))

    def _greet(self, hello: Hello, key: str | None) -> HandshakeMessage:
        """Judge a Hello of whoever holds ``key``."""
        ours = self._welcome

        def refuse(field: str, mine: str, theirs: str) -> HandshakeRefused:
            detail = f"prefill worker {hello.engine_id}: {field} is {mine} here and {theirs} there"
            self._refusals.add("init", f"refused_{field.rpartition('.')[2]}", detail)
            return HandshakeRefused(engine_id=ours.engine_id, field=field, ours=mine, theirs=theirs)

        if not _may_speak(key, hello.engine_id):
            detail = f"whoever holds key {fingerprint(key or '')} says to be prefill worker {hello.engine_id}"
            self._refusals.add("init", "another_key", detail)
            return HandshakeRefused(
                engine_id=ours.engine_id, field="key", ours=fingerprint(key or ""), theirs=hello.engine_id
            )
        if hello.receiver != ours.engine_id:
            return refuse("engine_id", ours.engine_id, hello.receiver)
        if hello.role not in ("prefill", "both"):
            return refuse("role", "prefill or both", hello.role)
        difference = first_difference(ours.compatibility, hello.compatibility)
        if difference is not None:
            return refuse(*difference)
        now = self._clock()
        self._forget_writers(now)
        known = self._writers.get(hello.engine_id)
        if known is not None:
            known.seen_at = now
            return ours
        for engine_id, writer in list(self._writers.items()):
            # On one machine a name proves nothing that the process table would not show better.
            again = writer.worker and writer.worker == hello.worker and writer.key == key
            if again and not same_machine(writer.process, self._here):
                log.info("prefill worker %s is %s now; its old slots are free", hello.worker, hello.engine_id)
                self._perform(self.desk.writer_dead(engine_id, now))
                del self._writers[engine_id]
        self._writers[hello.engine_id] = Writer(hello.worker, hello.process, key, now)
        self._opening_until = now + self._settings.opening_seconds
        return ours

    def _forget_writers(self, now: float) -> None:
        busy = self.desk.writers()
        memory = WRITER_MEMORY * self._settings.peer_idle_seconds
        for engine_id, writer in list(self._writers.items()):
            if engine_id not in busy and writer.seen_at + memory <= now:
                del self._writers[engine_id]
        too_many = len(self._writers) - MAX_WRITERS + 1
        if too_many > 0:
            idle = sorted((w.seen_at, engine_id) for engine_id, w in self._writers.items() if engine_id not in busy)
            for _, engine_id in idle[:too_many]:
                del self._writers[engine_id]

    def _on_message(self, route: bytes, frame: bytes, key: str | None) -> None:
        message: FromSender = self._reservations.decode(frame)
        if message.sender is None:
            raise codec.FrameError(f"a {type(message).__name__} without a sender")
        if not _may_speak(key, message.sender):
            self._refusals.add("alloc", "another_key", f"a {type(message).__name__} in the name of {message.sender}")
            return
        writer = self._writers.get(message.sender)
        if writer is None:
            self._refusals.add("alloc", "no_handshake", f"a {type(message).__name__} of {message.sender}")
            if isinstance(message, Reserve):
                refused = Refused(
                    transfer_id=message.transfer_id,
                    reason="no_handshake",
                    detail=f"{message.sender} has not said hello to {self._welcome.engine_id}",
                )
                Sockets.say(self._alloc_socket, route, self._reservations.encode(refused))
            elif isinstance(message, Cancel):
                # Who is not known has nothing here, and may go: rule 4 of sender_states.py.
                known = Cancelled(transfer_id=message.transfer_id, slot=message.slot)
                Sockets.say(self._alloc_socket, route, self._reservations.encode(known))
            return
        writer.route = route
        writer.seen_at = self._clock()
        commands = self.desk.hear(message, self._clock())
        for command in commands:
            self._count_refusal(message, command)
        self._perform(commands)

    def _count_refusal(self, message: FromSender, command: DeskCommand) -> None:
        """Count what this message gets for an answer, where that is no."""
        if not isinstance(command, Answer) or command.message.transfer_id != message.transfer_id:
            return
        match command.message:
            case Refused(reason=reason, detail=detail):
                self._refusals.add("alloc", reason, f"a {type(message).__name__} of {message.sender}: {detail}")
            case Expired(reason=reason) if reason in _STALE:
                detail = f"a {type(message).__name__} of {message.sender} about {message.transfer_id}"
                self._refusals.add("alloc", reason, detail)

    def _refuse_version(self, socket: zmq.Socket[bytes], route: bytes, error: codec.VersionError) -> None:
        if socket is self._init_socket:
            refused = HandshakeRefused(
                engine_id=self._welcome.engine_id,
                field="protocol",
                ours=str(PROTOCOL_VERSION),
                theirs=str(error.theirs),
            )
            Sockets.say(socket, route, self._handshakes.encode(refused))

    def _perform(self, commands: list[DeskCommand]) -> None:
        for command in commands:
            match command:
                case Answer(writer=engine_id, message=message):
                    writer = self._writers.get(engine_id)
                    if writer is not None and writer.route is not None:
                        Sockets.say(self._alloc_socket, writer.route, self._reservations.encode(message))
                case Check():
                    verdict = self._checks.begin(command)
                    if verdict is not None:
                        self._take(verdict)
                case Deliver():
                    self._readers.pop(command.transfer_id)(self.deliveries.make(command))
                case PartReady() | Finish() | Break():
                    self.deliveries.tell(command)
                case Lose(transfer_id, reason, detail):
                    self._readers.pop(transfer_id)(Lost(reason, detail))

    def _take(self, verdict: Verdict) -> None:
        transfer_id, part, right = verdict
        self._perform(self.desk.verified(transfer_id, part, self._clock(), right=right))


def _may_speak(key: str | None, engine_id: EngineId) -> bool:
    """Whether a peer may speak in an engine's name. Where no keys are asked for (None) anybody may."""
    return key is None or speaks_for(key, engine_id)
