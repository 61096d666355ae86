"""The sending side's driver: performs what sender sessions command, and feeds back what comes of it.

Everything here runs on the belt's thread.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from kvbelt.errors import ChannelError
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.peers import Peer
from kvbelt.transfer.plan import Run
from kvbelt.transfer.ports import Channel, TransferOutcome
from kvbelt.transfer.pump import BlocksFree, Broken, Landed, Load, Pump, Report, Stopped, Target
from kvbelt.transfer.sender import AbortWrites, BeginWriting, Outcome, Say, SenderCommand, SenderSession, StopWriting
from kvbelt.transfer.sender_states import (
    Abandon,
    PeerFailed,
    PeerReady,
    Quiet,
    SenderEvent,
    SenderState,
    WriteFailed,
    Written,
)
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.snapshot import Sum
from kvbelt.transfer.sockets import Sockets, endpoint
from kvbelt.wire import codec
from kvbelt.wire import reservation as wire
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import HandshakeRefused, Hello, Welcome, first_difference
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import Notification, TransferDone, TransferFailed
from kvbelt.wire.notification import encode as encode_notification

log = logging.getLogger(__name__)

#: Bytes are moved for so long before the sockets have their turn again.
STEP_SECONDS = 1e-3


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer, with its session, its bytes and its owner's callbacks."""

    session: SenderSession
    load: Load
    peer: Peer
    on_blocks_free: Callable[[], None]
    on_end: Callable[[TransferOutcome], None]
    on_failure: Callable[[str], None]
    computed_at: float | None = None
    ended_at: float | None = None
    told: bool = False  #: on_blocks_free was called


class Dispatch:
    """All outgoing transfers of one process."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        hello: Callable[[EngineId], Hello],
        settings: BeltSettings,
        sockets: Sockets,
        channel: Channel,
        pump: Pump,
        clock: Callable[[], float],
    ) -> None:
        self._hello = hello
        self._settings = settings
        self._sockets = sockets
        self._channel = channel
        self._pump = pump
        self._clock = clock
        self._handshakes = codec.handshakes()
        self._reservations = codec.from_receiver()
        self._peers: dict[EngineId, Peer] = {}
        self._by_socket: dict[zmq.Socket[bytes], Peer] = {}
        # Exactly the sessions that have not ended. An id that is not in it is written by nobody here.
        self._open: dict[TransferId, Outgoing] = {}
        self._deadlines: Deadlines[TransferId] = Deadlines()
        self._proxy = (
            sockets.connect(zmq.PUSH, settings.notification_endpoint) if settings.notification_endpoint else None
        )
        self.ended_total: Counter[str] = Counter()
        self.bytes_total = 0
        self.write_seconds = Sum()
        self.exposed_seconds = Sum()

    # What the owner asks for.

    def begin(self, address: ReceiverAddress, outgoing: Callable[[Peer], Outgoing]) -> Outgoing:
        """A transfer to ``address`` begins."""
        now = self._clock()
        peer = self._peer(address, now)
        transfer = outgoing(peer)
        transfer_id = transfer.session.plan.transfer_id
        self._open[transfer_id] = transfer
        self._pump.add(transfer.load)
        peer.transfers.add(transfer_id)
        peer.used_at = now
        self._deadlines.set(transfer_id, transfer.session.due)
        if peer.ready:
            self._tell(transfer, PeerReady())
        return transfer

    def knows(self, transfer_id: TransferId) -> bool:
        """Whether such a transfer is open."""
        return transfer_id in self._open

    def hand_over(self, transfer: Outgoing, run: Run) -> None:
        """Blocks are final."""
        if not transfer.load.stopped:
            transfer.load.pending.append(run)
            transfer.load.handed_blocks += len(run.block_ids)

    def computed(self, transfer: Outgoing, at: float) -> None:
        """Every block was handed over."""
        transfer.load.computed = True
        transfer.computed_at = at

    def abandon(self, transfer: Outgoing, reason: str) -> None:
        """The owner wants it no more."""
        if transfer.session.plan.transfer_id in self._open:
            self._tell(transfer, Abandon(reason))

    def abandon_all(self, reason: str) -> None:
        """The process ends."""
        for transfer in list(self._open.values()):
            self._tell(transfer, Abandon(reason))

    # What happens.

    def hear(self, ready: set[zmq.Socket[bytes]], ignored: Counter[str]) -> None:
        """Frames have arrived on these sockets; those of others are left alone."""
        for socket in ready:
            peer = self._by_socket.get(socket)
            if peer is None:
                continue
            for frames in self._sockets.frames(socket):
                try:
                    if socket is peer.init_socket:
                        self._on_handshake(peer, self._handshakes.decode(frames[-1]))
                    else:
                        self._on_message(peer, self._reservations.decode(frames[-1]))
                except codec.VersionError as error:
                    self._lose(peer, "refused_protocol", str(error))
                except codec.FrameError as error:
                    ignored["malformed"] += 1
                    log.warning("ignored a frame of %s: %s", peer.address.engine_id, error)

    def step(self) -> bool:
        """Move bytes for a while. True: there is more to do at once."""
        until = self._clock() + STEP_SECONDS
        while True:
            now = self._clock()
            reports, more = self._pump.step(now)
            self._take_in(reports)
            if not more or now >= until:
                return more

    def _take_in(self, reports: list[Report]) -> None:
        for report in reports:
            transfer = self._open.get(report.transfer_id)
            match report:
                case BlocksFree() if transfer is not None and not transfer.told:
                    transfer.told = True
                    transfer.on_blocks_free()
                case Landed() if transfer is not None and transfer.session.state is SenderState.WRITING:
                    self._tell(transfer, Written())
                case Broken(reason=reason, detail=detail, peer=peer) if transfer is not None:
                    if peer:
                        self._tell(transfer, WriteFailed(reason, detail))
                        self._lose(transfer.peer, "peer_lost", f"a write to it failed: {detail}")
                    elif transfer.session.state is SenderState.WRITING:
                        self._tell(transfer, WriteFailed(reason, detail))
                case Stopped() if transfer is not None and transfer.session.state is SenderState.STOPPING:
                    self._tell(transfer, Quiet())
            if transfer is not None:
                self._forget_if_ended(transfer)

    def tick(self, now: float) -> None:
        """Let time pass."""
        for transfer_id in self._deadlines.pop_due(now):
            transfer = self._open.get(transfer_id)
            if transfer is not None:
                self._perform(transfer, transfer.session.tick(now))
        for peer in list(self._peers.values()):
            if peer.due <= now:
                self._greet(peer, now)
            elif peer.ready and not peer.transfers and peer.used_at + self._settings.peer_idle_seconds <= now:
                self._lose(peer, "idle", "unused for long")

    @property
    def due(self) -> float:
        """When ``tick`` has something to do."""
        due = self._deadlines.due
        for peer in self._peers.values():
            due = min(due, peer.due)
            if peer.ready and not peer.transfers:
                due = min(due, peer.used_at + self._settings.peer_idle_seconds)
        return due

    @property
    def busy(self) -> bool:
        """Whether bytes are under way."""
        return self._pump.busy

    @property
    def num_open(self) -> int:
        """Transfers that have not ended."""
        return len(self._open)

    @property
    def num_peers(self) -> int:
        """Receivers connected to."""
        return sum(peer.ready for peer in self._peers.values())

    def states(self) -> Counter[str]:
        """Transfers by state."""
        return Counter(transfer.session.state.value for transfer in self._open.values())

    # Peers.

    def _peer(self, address: ReceiverAddress, now: float) -> Peer:
        peer = self._peers.get(address.engine_id)
        if peer is not None and peer.address == address:
            return peer
        for other in list(self._peers.values()):
            # A new life at an address proves the old one over: what is held for it is freed at once.
            if (other.address.host, other.address.init_port) == (address.host, address.init_port):
                self._lose(other, "stale_engine", f"{address.engine_id} has taken its place")
        peer = Peer(
            address=address,
            init_socket=self._sockets.connect(zmq.DEALER, endpoint(address.host, address.init_port)),
            alloc_socket=self._sockets.connect(zmq.DEALER, endpoint(address.host, address.alloc_port)),
            hello_at=now,
            give_up_at=now + self._settings.handshake_seconds,
            used_at=now,
        )
        self._peers[address.engine_id] = peer
        self._by_socket[peer.init_socket] = self._by_socket[peer.alloc_socket] = peer
        self._greet(peer, now)
        return peer

    def _greet(self, peer: Peer, now: float) -> None:
        if peer.give_up_at <= now:
            detail = (
                f"no answer from {peer.address.host} port {peer.address.init_port} "
                f"within {self._settings.handshake_seconds:g} s"
            )
            self._lose(peer, "peer_unreachable", detail)
            return
        peer.hello_at = now + self._settings.heartbeat_seconds
        Sockets.say(peer.init_socket, self._handshakes.encode(self._hello(peer.address.engine_id)))

    def _on_handshake(self, peer: Peer, message: Hello | Welcome | HandshakeRefused) -> None:
        if peer.ready or peer.lost:
            return
        match message:
            case HandshakeRefused(field="engine_id", ours=ours):
                self._lose(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {ours} now")
            case HandshakeRefused(field=field, ours=theirs, theirs=ours):
                field = field if field.isascii() and len(field) <= 64 else "unknown"
                self._lose(
                    peer,
                    f"refused_{field.rpartition('.')[2]}",
                    f"the decode worker refuses the handshake: {field} is {ours} here and {theirs} there",
                )
            case Welcome(engine_id=engine_id) if engine_id != peer.address.engine_id:
                self._lose(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {engine_id} now")
            case Welcome():
                self._welcomed(peer, message)

    def _welcomed(self, peer: Peer, message: Welcome) -> None:
        ours = self._hello(peer.address.engine_id).compatibility
        difference = first_difference(ours, message.compatibility)
        if difference is not None:
            self._lose(peer, f"refused_{difference.field.rpartition('.')[2]}", str(difference))
            return
        try:
            peer.agent = self._channel.add_peer(message.agent_metadata)
        except ChannelError as error:
            self._lose(peer, "channel", f"the channel cannot reach {peer.address.engine_id}: {error}")
            return
        peer.region = message.region
        for transfer_id in sorted(peer.transfers):
            self._tell(self._open[transfer_id], PeerReady())

    def _lose(self, peer: Peer, reason: str, detail: str) -> None:
        """Forget a peer, and tell its transfers."""
        if peer.lost:
            return
        peer.lost = True
        if self._peers.get(peer.address.engine_id) is peer:
            del self._peers[peer.address.engine_id]
        transfers = [self._open[transfer_id] for transfer_id in sorted(peer.transfers)]
        for transfer in transfers:
            self._tell(transfer, PeerFailed(reason, detail))
        for transfer in transfers:
            self._pump.abort(transfer.load)
        if peer.agent is not None:
            # Without a connection nothing is in flight on it.
            try:
                self._channel.remove_peer(peer.agent)
            except ChannelError as error:
                log.warning("the channel cannot forget %s: %s", peer.address.engine_id, error)
        for transfer in transfers:
            self._pump.abort(transfer.load)
        self._close_if_done(peer)

    def _close_if_done(self, peer: Peer) -> None:
        if peer.lost and not peer.transfers:
            for socket in (peer.init_socket, peer.alloc_socket):
                self._by_socket.pop(socket, None)
                self._sockets.close(socket)

    # Sessions.

    def _on_message(self, peer: Peer, message: wire.FromReceiver) -> None:
        transfer = self._open.get(message.transfer_id)
        # By engine, not by connection: after a reconnect the receiver may answer on either.
        if transfer is not None and transfer.peer.address.engine_id == peer.address.engine_id:
            self._tell(transfer, message)
            if isinstance(message, wire.Refused) and message.reason in {"no_handshake", "stale_engine"}:
                self._lose(peer, message.reason, message.detail)
        elif isinstance(message, wire.Granted | wire.Expired | wire.Cancel):
            # Rule 5 of wire/reservation.py: what is not known here is not written here.
            answer = wire.Cancelled(
                transfer_id=message.transfer_id,
                slot=message.slot,
                sender=self._hello(peer.address.engine_id).engine_id,
            )
            Sockets.say(peer.alloc_socket, self._reservations.encode(answer))

    def _tell(self, transfer: Outgoing, event: SenderEvent) -> None:
        self._perform(transfer, transfer.session.handle(event, self._clock()))

    def _perform(self, transfer: Outgoing, commands: list[SenderCommand]) -> None:
        for command in commands:
            match command:
                case Say(message):
                    Sockets.say(transfer.peer.alloc_socket, self._reservations.encode(message))
                case BeginWriting(offset=offset):
                    self._begin_writing(transfer, offset)
                case StopWriting():
                    self._pump.stop(transfer.load)
                case AbortWrites():
                    self._lose(transfer.peer, "peer_lost", "writes to it do not end")
                case Outcome():
                    self._conclude(transfer, command)
        self._deadlines.set(transfer.session.plan.transfer_id, transfer.session.due)
        self._forget_if_ended(transfer)

    def _begin_writing(self, transfer: Outgoing, offset: int) -> None:
        peer = transfer.peer
        assert peer.agent is not None
        assert peer.region is not None
        if not 0 <= offset <= peer.region.num_bytes - transfer.session.plan.num_bytes:
            detail = f"a slot at {offset} of {transfer.session.plan.num_bytes} bytes in {peer.region.num_bytes}"
            self._tell(transfer, WriteFailed("bad_grant", detail))
            return
        there = peer.region
        place = there.device if there.device == "cpu" else f"{there.device}:{there.device_index}"
        transfer.load.target = Target(peer.agent, place, there.address + offset)

    def _forget_if_ended(self, transfer: Outgoing) -> None:
        plan = transfer.session.plan
        if not transfer.session.ended or not transfer.load.stopped or not transfer.told:
            # A session ends before its blocks are free when a gather is still reading them.
            return
        if self._open.pop(plan.transfer_id, None) is not None:
            transfer.peer.transfers.discard(plan.transfer_id)
            transfer.peer.used_at = self._clock()
            self._close_if_done(transfer.peer)

    def _conclude(self, transfer: Outgoing, outcome: Outcome) -> None:
        """Tell the owner and the proxy."""
        now = self._clock()
        load, plan = transfer.load, transfer.session.plan
        done = outcome.state is SenderState.DONE
        seconds = (load.last_landed or now) - load.first_write if load.first_write is not None else 0.0
        exposed = now - transfer.computed_at if transfer.computed_at is not None else 0.0
        num_bytes = load.landed_blocks * (plan.num_bytes // load.total_blocks)
        self.ended_total[outcome.reason] += 1
        notification: Notification
        if done:
            self.bytes_total += num_bytes
            self.write_seconds = self.write_seconds.plus(seconds)
            self.exposed_seconds = self.exposed_seconds.plus(exposed)
            notification = TransferDone(
                transfer_id=plan.transfer_id,
                sender=plan.sender,
                receiver=plan.receiver,
                num_bytes=num_bytes,
                seconds=seconds,
                channel=self._channel.name,
                num_tokens=plan.num_tokens,
                num_writes=load.num_writes,
                exposed_seconds=exposed,
            )
        else:
            log.warning(
                "transfer %s to %s failed: %s: %s", plan.transfer_id, plan.receiver, outcome.reason, outcome.detail
            )
            notification = TransferFailed(
                transfer_id=plan.transfer_id,
                sender=plan.sender,
                receiver=plan.receiver,
                num_bytes=num_bytes,
                seconds=seconds,
                reason=outcome.reason,
            )
            transfer.on_failure(outcome.reason)
        if self._proxy is not None:
            Sockets.say(self._proxy, encode_notification(notification))
        transfer.on_end(
            TransferOutcome(
                ok=done,
                reason=outcome.reason,
                detail=outcome.detail,
                num_bytes=num_bytes,
                num_writes=load.num_writes,
                seconds=seconds,
                exposed_seconds=exposed,
            )
        )
