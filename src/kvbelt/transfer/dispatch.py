"""The sending side's driver: performs what sender sessions command, and feeds back what comes of it.

Everything here runs on the belt's thread.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from kvbelt.security.refusals import Tally
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.peers import Peer, PeerEvents, Peers
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
from kvbelt.transfer.sockets import Sockets, one
from kvbelt.wire import codec
from kvbelt.wire import reservation as wire
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import Hello
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
        engine_id: EngineId,
        hello: Callable[[EngineId], Hello],
        settings: BeltSettings,
        sockets: Sockets,
        channel: Channel,
        pump: Pump,
        clock: Callable[[], float],
    ) -> None:
        self._engine_id = engine_id
        self._sockets = sockets
        self._channel_name = channel.name
        self._pump = pump
        self._clock = clock
        self._reservations = codec.from_receiver()
        self.peers = Peers(
            hello, settings, sockets, channel, PeerEvents(self._peer_ready, self._peer_lost, self._abort_writes)
        )
        # Exactly the sessions that have not ended. An id that is not in it is written by nobody here.
        self._open: dict[TransferId, Outgoing] = {}
        self._deadlines: Deadlines[TransferId] = Deadlines()
        self._proxy = (
            sockets.connect(zmq.PUSH, settings.notification_endpoint, settings.proxy_key)
            if settings.notification_endpoint
            else None
        )
        self.ended_total = Tally()
        self.bytes_total = 0
        self.write_seconds = Sum()
        self.exposed_seconds = Sum()

    # What the owner asks for.

    def begin(self, address: ReceiverAddress, outgoing: Callable[[Peer], Outgoing]) -> Outgoing:
        """A transfer to ``address`` begins."""
        now = self._clock()
        peer = self.peers.of(address, now)
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

    def hand_over(self, transfer: Outgoing, runs: Sequence[Run]) -> None:
        """Blocks are final."""
        if not transfer.load.stopped:
            transfer.load.pending.extend(runs)
            transfer.load.handed_blocks += sum(len(run.block_ids) for run in runs)

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

    def hear(self, ready: set[zmq.Socket[bytes]]) -> None:
        """Frames have arrived on these sockets; those of others are left alone."""
        self.peers.hear(ready)
        for socket in ready:
            peer = self.peers.at_alloc_socket(socket)
            if peer is None:
                continue
            for frames, _ in self._sockets.received(socket):
                try:
                    self._on_message(peer, self._reservations.decode(one(frames)))
                except codec.FrameError as error:
                    self._sockets.refusals.add("alloc", error.reason, f"{peer.address.engine_id}: {error}")

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
                        self.peers.lose(transfer.peer, "peer_lost", f"a write to it failed: {detail}")
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
        self.peers.tick(now)

    @property
    def due(self) -> float:
        """When ``tick`` has something to do."""
        return min(self._deadlines.due, self.peers.due)

    @property
    def busy(self) -> bool:
        """Whether bytes are under way."""
        return self._pump.busy

    @property
    def num_open(self) -> int:
        """Transfers that have not ended."""
        return len(self._open)

    def states(self) -> Counter[str]:
        """Transfers by state."""
        return Counter(transfer.session.state.value for transfer in self._open.values())

    # Peers.

    def _peer_ready(self, peer: Peer) -> None:
        for transfer in self._under_way(peer):
            self._tell(transfer, PeerReady())

    def _peer_lost(self, peer: Peer, reason: str, detail: str) -> None:
        for transfer in self._under_way(peer):
            self._tell(transfer, PeerFailed(reason, detail))
        self._abort_writes(peer)

    def _under_way(self, peer: Peer) -> list[Outgoing]:
        """Its transfers, without those that have ended and only wait for their blocks to be free."""
        open_ones = [self._open[transfer_id] for transfer_id in sorted(peer.transfers)]
        return [transfer for transfer in open_ones if not transfer.session.ended]

    def _abort_writes(self, peer: Peer) -> None:
        for transfer_id in peer.transfers:
            self._pump.abort(self._open[transfer_id].load)

    # Sessions.

    def _on_message(self, peer: Peer, message: wire.FromReceiver) -> None:
        transfer = self._open.get(message.transfer_id)
        # By engine, not by connection: after a reconnect the receiver may answer on either.
        if transfer is not None and transfer.peer.is_of(peer.address):
            self._tell(transfer, message)
            if isinstance(message, wire.Refused) and message.reason in {"no_handshake", "stale_engine"}:
                self.peers.lose(peer, message.reason, message.detail)
        elif isinstance(message, wire.Granted | wire.Expired | wire.Cancel):
            # Rule 5 of wire/reservation.py: what is not known here is not written here.
            answer = wire.Cancelled(
                transfer_id=message.transfer_id,
                slot=message.slot,
                sender=self._engine_id,
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
                    self.peers.lose(transfer.peer, "peer_lost", "writes to it do not end")
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
            self.peers.close_if_done(transfer.peer)

    def _conclude(self, transfer: Outgoing, outcome: Outcome) -> None:
        """Tell the owner and the proxy."""
        now = self._clock()
        load, plan = transfer.load, transfer.session.plan
        done = outcome.state is SenderState.DONE
        seconds = (load.last_landed or now) - load.first_write if load.first_write is not None else 0.0
        exposed = now - transfer.computed_at if transfer.computed_at is not None else 0.0
        num_bytes = load.landed_blocks * (plan.num_bytes // load.total_blocks)
        self.ended_total.add(outcome.reason)
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
                channel=self._channel_name,
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
