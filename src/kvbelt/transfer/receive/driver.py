"""The receiving side's driver, on the belt's thread: sockets, handshakes, and what ``IncomingTransfers`` commands."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from kvbelt.errors import ChannelError
from kvbelt.security.keys import fingerprint, speaks_for
from kvbelt.transfer.cut_copies import CutCopies
from kvbelt.transfer.ports import Lost, PagedCopy, ReceivedKV
from kvbelt.transfer.receive.checks import Checks
from kvbelt.transfer.receive.commands import Answer, Break, Check, Deliver, Finish, Lose, PartReady
from kvbelt.transfer.receive.deliveries import Deliveries
from kvbelt.transfer.receive.incoming import IncomingCommand, IncomingTransfers
from kvbelt.transfer.receive.states import CancelRead, FromOwner
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire import codec
from kvbelt.wire.handshake import (
    PROTOCOL_VERSION,
    Compatibility,
    Difference,
    HandshakeMessage,
    HandshakeRefused,
    Hello,
    Share,
    Welcome,
    first_difference,
    share,
)
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.reservation import Cancel, Cancelled, Expired, FromReceiver, FromSender, Refused, Reserve

log = logging.getLogger(__name__)

#: Between two checks whether the senders of quarantined slots are dead.
SUSPICION_SECONDS = 0.1

#: A receiver remembers a sender longer than a sender remembers a receiver, so a sender with a handshake stays known.
SENDER_MEMORY = 2

#: Senders known at once. Beyond it, senders without transfers are forgotten and must repeat the handshake.
MAX_SENDERS = 1024

#: Reasons of an ``Expired`` that answers a message about an unknown or ended transfer.
_STALE = frozenset({"stale_slot", "unknown_transfer"})


@dataclass(slots=True, eq=False)
class KnownSender:
    """One incarnation of a prefill worker that has had a handshake."""

    seen_at: float
    share: Share  #: what of every block it has for this process
    route: bytes | None = None  #: of its latest message on the alloc port


class ReceiverDriver:
    def __init__(  # noqa: PLR0917 -- its seams
        self,
        engine_id: EngineId,
        compatibility: Compatibility,
        welcome: Callable[[], Welcome],
        settings: BeltSettings,
        sockets: Sockets,
        incoming: IncomingTransfers,
        copy: PagedCopy,
        ask: Callable[..., object],
        clock: Callable[[], float],
    ) -> None:
        self._engine_id = engine_id
        self._compatibility = compatibility
        self._welcome = welcome  # takes the receive buffer
        self._settings = settings
        self._sockets = sockets
        copies = CutCopies(copy, compatibility.layout)
        self._checks = Checks(copies, settings.verify)
        self._clock = clock
        self._refusals = sockets.refusals
        self._handshakes = codec.handshakes(codec.MAX_HELLO_BYTES)
        self._reservations = codec.from_sender()
        self._senders: dict[EngineId, KnownSender] = {}
        # Consumers that wait for the outcome of their transfer.
        self._consumers: dict[TransferId, Callable[[ReceivedKV | Lost], None]] = {}
        self._check_at = 0.0
        self._draining = False  #: a dead sender's last bytes may still arrive
        self._opening_until = 0.0  # the channel may still open the latest sender's connection
        self.incoming = incoming
        self.deliveries = Deliveries(copies, ask, self.handle)
        host = settings.bind_host
        self._liveness = sockets.listen_for_liveness(host, settings.liveness_port)
        self._init_socket, self.init_port = sockets.bind(
            "init", host, settings.init_port, "the handshake (init) port", "pd_peer_init_port"
        )
        self._alloc_socket, self.alloc_port = sockets.bind(
            "alloc", host, settings.alloc_port, "the reservation (alloc) port", "pd_peer_alloc_port"
        )

    def claim(self, transfer_id: TransferId, deadline: float, on_arrival: Callable[[ReceivedKV | Lost], None]) -> None:
        if transfer_id in self._consumers:
            on_arrival(Lost("already_claimed", "another request waits for this transfer"))
            return
        self._consumers[transfer_id] = on_arrival
        self._perform(self.incoming.claim(transfer_id, deadline, self._clock()))

    def cancel_read(self, transfer_id: TransferId, on_arrival: Callable[[ReceivedKV | Lost], None]) -> None:
        if self._consumers.get(transfer_id) is on_arrival:
            self.handle(transfer_id, CancelRead())

    def handle(self, transfer_id: TransferId, event: FromOwner) -> None:
        self._perform(self.incoming.handle(transfer_id, event, self._clock()))

    def on_messages(self, ready: set[zmq.Socket[bytes]]) -> None:
        if self._init_socket in ready:
            self._read("init", self._init_socket, self._on_handshake)
        if self._alloc_socket in ready:
            self._read("alloc", self._alloc_socket, self._on_message)

    def _read(self, name: str, socket: zmq.Socket[bytes], on_frame: Callable[[bytes, bytes, str | None], None]) -> None:
        for frames, key, _ in self._sockets.received(socket):
            try:
                if len(frames) != 2:
                    raise codec.FrameError(f"{len(frames) - 1} frames instead of one")  # noqa: TRY301
                on_frame(frames[0], frames[1], key)
            except codec.FrameError as error:
                self._refusals.add(name, error.reason, error)
                if isinstance(error, codec.VersionError) and socket is self._init_socket:
                    ours, theirs = str(PROTOCOL_VERSION), str(error.theirs)
                    refused = HandshakeRefused(engine_id=self._engine_id, field="protocol", ours=ours, theirs=theirs)
                    Sockets.send(socket, frames[0], self._handshakes.encode(refused))

    def tick(self, now: float) -> None:
        self._perform(self.incoming.tick(now))
        for transfer_id, verdict in self._checks.ended():
            self.handle(transfer_id, verdict)
        self._liveness.work()
        suspects = self.incoming.suspects()
        if suspects and self._check_at <= now:
            self._check_at = now + SUSPICION_SECONDS
            self._draining = any(map(self._liveness.has_ended, suspects))
            for engine_id in suspects:
                if self._liveness.is_dead(engine_id):
                    log.info("prefill worker %s is dead and wrote its last byte; its slots are free", engine_id)
                    self._perform(self.incoming.sender_dead(engine_id, now))

    @property
    def due(self) -> float:
        due = self.incoming.deadlines.due
        return min(due, self._check_at) if self.incoming.suspects() else due

    @property
    def progress_every(self) -> float:
        """Seconds between two calls of ``Channel.progress``; infinity: none are needed."""
        if self._checks.under_way:
            return self._settings.poll_seconds
        if self.incoming.expects_writes or self._clock() < self._opening_until:
            return self._settings.progress_seconds
        if self.incoming.suspects():
            return self._settings.progress_seconds if self._draining else SUSPICION_SECONDS
        return float("inf")

    def close(self, reason: str) -> None:
        for transfer_id, on_arrival in list(self._consumers.items()):
            self.handle(transfer_id, CancelRead())
            if self._consumers.pop(transfer_id, None) is not None:
                on_arrival(Lost(reason, "the belt is closed"))

    def _on_handshake(self, route: bytes, frame: bytes, key: str | None) -> None:
        message = self._handshakes.decode(frame)
        if not isinstance(message, Hello):
            raise codec.FrameError(f"a {type(message).__name__} is not for a receiver")
        Sockets.send(self._init_socket, route, self._handshakes.encode(self._greet(message, key)))

    def _greet(self, hello: Hello, key: str | None) -> HandshakeMessage:
        """The answer to a Hello from the holder of ``key``."""
        here = self._engine_id

        def refuse(field: str, mine: str, theirs: str) -> HandshakeRefused:
            detail = f"prefill worker {hello.engine_id}: {field} is {mine} here and {theirs} there"
            self._refusals.add("init", f"refused_{field.rpartition('.')[2]}", detail)
            return HandshakeRefused(engine_id=here, field=field, ours=mine, theirs=theirs)

        if not _may_speak(key, hello.engine_id):
            detail = f"the holder of key {fingerprint(key or '')} claims to be prefill worker {hello.engine_id}"
            self._refusals.add("init", "another_key", detail)
            return HandshakeRefused(engine_id=here, field="key", ours=fingerprint(key or ""), theirs=hello.engine_id)
        if hello.receiver != here:
            return refuse("engine_id", here, hello.receiver)
        if hello.role not in ("prefill", "both"):
            return refuse("role", "prefill or both", hello.role)
        ours, theirs = self._compatibility, hello.compatibility
        fits = first_difference(ours, theirs) or share(ours, theirs, sends=False)
        if isinstance(fits, Difference):
            return refuse(*fits)
        try:
            welcome = self._welcome()
        except ChannelError as error:
            log.warning("no prefill worker can send KV here: %s", error)
            return refuse("memory", "not to be had", "to be sent to")
        now = self._clock()
        self._forget_senders(now)
        known = self._senders.get(hello.engine_id)
        if known is not None:
            known.seen_at, known.share = now, fits
        else:
            self._senders[hello.engine_id] = KnownSender(now, fits)
            self._opening_until = now + self._settings.opening_seconds
        token = self._liveness.token(hello.engine_id)
        return msgspec.structs.replace(welcome, liveness_port=self._liveness.port, liveness_token=token)

    def _forget_senders(self, now: float) -> None:
        busy = self.incoming.senders()
        memory = SENDER_MEMORY * self._settings.peer_idle_seconds
        for engine_id, sender in list(self._senders.items()):
            if engine_id not in busy and sender.seen_at + memory <= now:
                del self._senders[engine_id]
        too_many = len(self._senders) - MAX_SENDERS + 1
        if too_many > 0:
            idle = sorted((w.seen_at, engine_id) for engine_id, w in self._senders.items() if engine_id not in busy)
            for _, engine_id in idle[:too_many]:
                del self._senders[engine_id]

    def _on_message(self, route: bytes, frame: bytes, key: str | None) -> None:
        message: FromSender = self._reservations.decode(frame)
        if message.sender is None:
            raise codec.FrameError(f"a {type(message).__name__} without a sender")
        if not _may_speak(key, message.sender):
            self._refusals.add("alloc", "another_key", f"a {type(message).__name__} in the name of {message.sender}")
            return
        sender = self._senders.get(message.sender)
        if sender is None:
            self._refusals.add("alloc", "no_handshake", f"a {type(message).__name__} of {message.sender}")
            transfer_id = message.transfer_id
            if isinstance(message, Reserve):
                detail = f"{message.sender} has had no handshake with {self._engine_id}"
                self._send(route, Refused(transfer_id=transfer_id, reason="no_handshake", detail=detail))
            elif isinstance(message, Cancel):
                # An unknown sender has nothing here, so its end message is acknowledged: rule 4 of send/states.py.
                self._send(route, Cancelled(transfer_id=transfer_id, slot=message.slot))
            return
        sender.route = route
        sender.seen_at = self._clock()
        commands = self.incoming.on_message(message, self._clock(), sender.share)
        for command in commands:
            self._count_refusal(message, command)
        self._perform(commands)

    def _send(self, route: bytes, message: FromReceiver) -> None:
        Sockets.send(self._alloc_socket, route, self._reservations.encode(message))

    def _count_refusal(self, message: FromSender, command: IncomingCommand) -> None:
        if not isinstance(command, Answer) or command.message.transfer_id != message.transfer_id:
            return
        match command.message:
            case Refused(reason=reason, detail=detail):
                self._refusals.add("alloc", reason, f"a {type(message).__name__} of {message.sender}: {detail}")
            case Expired(reason=reason) if reason in _STALE:
                detail = f"a {type(message).__name__} of {message.sender} about {message.transfer_id}"
                self._refusals.add("alloc", reason, detail)

    def _perform(self, commands: list[IncomingCommand]) -> None:
        for command in commands:
            match command:
                case Answer(sender=engine_id, message=message):
                    sender = self._senders.get(engine_id)
                    if sender is not None and sender.route is not None:
                        self._send(sender.route, message)
                case Check():
                    verdict = self._checks.begin(command)
                    if verdict is not None:
                        self.handle(command.transfer_id, verdict)
                case Deliver():
                    self._consumers.pop(command.transfer_id)(self.deliveries.make(command))
                case PartReady() | Finish() | Break():
                    self.deliveries.notify(command)
                case Lose(transfer_id, reason, detail):
                    self._consumers.pop(transfer_id)(Lost(reason, detail))


def _may_speak(key: str | None, engine_id: EngineId) -> bool:
    """Whether a peer may use an engine's name. Without keys (None) every peer may."""
    return key is None or speaks_for(key, engine_id)
