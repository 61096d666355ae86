"""The sending side's driver: performs what sender sessions command, and feeds back what comes of it.

Everything here runs on the belt's thread.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import zmq

from kvbelt.security.refusals import Tally
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.links import LinkTallies
from kvbelt.transfer.peers import Peer, PeerEvents, Peers
from kvbelt.transfer.plan import Run
from kvbelt.transfer.ports import Channel, PeerOutcome, TransferOutcome
from kvbelt.transfer.probing import PROBE_SECONDS, Probing, blocks_to_ask
from kvbelt.transfer.pump import BlocksFree, Broken, Landed, Load, Measured, PartDone, Pump, Report, Stopped, Target
from kvbelt.transfer.sender import (
    AbortWrites,
    BeginWriting,
    GoOn,
    Outcome,
    Say,
    SenderCommand,
    SenderSession,
    SendPlan,
    StopWriting,
)
from kvbelt.transfer.sender_states import (
    Abandon,
    PartWritten,
    PeerFailed,
    PeerReady,
    Quiet,
    SenderEvent,
    SenderState,
    WriteFailed,
    Written,
)
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.shape import SlotShape
from kvbelt.transfer.snapshot import Sum
from kvbelt.transfer.sockets import Sockets, one
from kvbelt.wire import codec
from kvbelt.wire import reservation as wire
from kvbelt.wire.about import Link
from kvbelt.wire.digest import Choice
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import Hello
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.notification import Notification, TransferDone, TransferFailed
from kvbelt.wire.notification import encode as encode_notification
from kvbelt.wire.probe import Probed

log = logging.getLogger(__name__)

#: Bytes are moved for so long before the sockets have their turn again.
STEP_SECONDS = 1e-3

#: Between two looks at writes that could not be aborted.
STUCK_SECONDS = 0.1


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
        layout: KVLayout,
        hello: Callable[[EngineId], Hello],
        settings: BeltSettings,
        sockets: Sockets,
        channel: Channel,
        pump: Pump,
        clock: Callable[[], float],
        links: LinkTallies | None = None,
    ) -> None:
        self._engine_id = engine_id
        self._layout = layout
        self._settings = settings
        self._sockets = sockets
        self._channel_name = channel.name
        self._poll_seconds = settings.poll_seconds
        self._progress_seconds = settings.progress_seconds
        self._opening_seconds = settings.opening_seconds
        self._pump = pump
        self._clock = clock
        self._links = links
        self._reservations = codec.from_receiver()
        self.peers = Peers(
            hello, settings, sockets, channel, PeerEvents(self._peer_ready, self._peer_lost, self._abort_writes)
        )
        # Exactly the sessions that have not ended. An id that is not in it is written by nobody here.
        self._open: dict[TransferId, Outgoing] = {}
        self._probe: Outgoing | None = None  # the one of them that measures a link, until its outcome is told
        self._probes = itertools.count()
        # Whoever waits for peers that are connecting; each is told once.
        self._opening_until = 0.0  # the latest peer's connection is being opened
        self._warming: dict[Peer, list[Callable[[PeerOutcome], None]]] = {}
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

    @property
    def progress_every(self) -> float:
        """How often the channel must be given a chance to work; infinity: not at all."""
        return self._progress_seconds if self._clock() < self._opening_until else float("inf")

    # What the owner asks for.

    def begin(self, address: ReceiverAddress, outgoing: Callable[[Peer], Outgoing]) -> Outgoing:
        """A transfer to ``address`` begins."""
        self._stop_probe("busy", "a transfer began meanwhile")
        now = self._clock()
        return self._begin(outgoing(self.peers.of(address, now)), now)

    def _begin(self, transfer: Outgoing, now: float) -> Outgoing:
        peer, transfer_id = transfer.peer, transfer.session.plan.transfer_id
        self._open[transfer_id] = transfer
        self._pump.add(transfer.load)
        peer.transfers.add(transfer_id)
        peer.used_at = now
        self._deadlines.set(transfer_id, transfer.session.due)
        if peer.ready:
            self._tell(transfer, PeerReady())
        return transfer

    def warm(self, address: ReceiverAddress, on_end: Callable[[PeerOutcome], None]) -> None:
        """Connect to a receiver ahead of the first transfer. A peer that is connected counts as used now."""
        now = self._clock()
        peer = self.peers.of(address, now)
        peer.used_at = now
        if peer.ready:
            on_end(PeerOutcome(ok=True, reason="", detail=""))
        else:
            self._warming.setdefault(peer, []).append(on_end)

    def probe(self, engine_id: EngineId, on_end: Callable[[Probed], None]) -> None:
        """Measure the link to a receiver that is connected, unless somebody sends. ``on_end`` comes exactly once."""
        peer = next((peer for peer in self.peers.connected() if peer.address.engine_id == engine_id), None)
        if peer is None:
            on_end(Probed(reason="not_connected", detail=f"this worker is not connected to {engine_id}"))
        elif any(transfer.session.outcome is None for transfer in self._open.values()):
            on_end(Probed(channel=self._channel_name, reason="busy", detail="transfers are under way"))
        else:
            now = self._clock()
            self._probe = self._probing(peer, on_end, now)
            self._begin(self._probe, now)

    def _probing(self, peer: Peer, on_end: Callable[[Probed], None], now: float) -> Outgoing:
        """A transfer of nothing: see probing.py."""
        layout, settings = self._layout, self._settings
        num_blocks = blocks_to_ask(layout, self._pump.piece_bytes, peer.regions[0].num_bytes)
        plan = SendPlan(
            transfer_id=TransferId(f"probe-{self._engine_id}-{next(self._probes)}"),
            sender=self._engine_id,
            receiver=peer.address.engine_id,
            num_tokens=num_blocks * layout.block_size,
            num_blocks=num_blocks,
            num_bytes=layout.slot_bytes(num_blocks),
            deadline=now + PROBE_SECONDS,
            heartbeat_seconds=settings.heartbeat_seconds,
            lease_seconds=settings.lease_seconds,
            memory_seconds=settings.memory_seconds,
        )
        probing = Probing(reads=self._pump.reads)

        def ended(outcome: TransferOutcome) -> None:
            why = probing.stopped if outcome.reason == "probed" else (outcome.reason, outcome.detail)
            on_end(probing.told(self._channel_name, *why))

        load = Load(plan.transfer_id, num_blocks * layout.num_layers, probing)
        return Outgoing(SenderSession(plan, now), load, peer, _nothing, ended, _nothing)

    def _stop_probe(self, why: str, detail: str) -> None:
        """Somebody else wants to send, or there is no room. What is in flight ends by itself."""
        if self._probe is not None and self._probe.load.probing is not None:
            self._probe.load.probing.stop(why, detail)
            self._tell(self._probe, Abandon("probed"))

    def knows(self, transfer_id: TransferId) -> bool:
        """Whether such a transfer is open."""
        return transfer_id in self._open

    def hand_over(self, transfer: Outgoing, runs: Sequence[Run]) -> None:
        """Blocks are final."""
        self._pump.hand_over(transfer.load, runs)

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
        for peer in list(self._warming):
            self._warmed(peer, PeerOutcome(ok=False, reason=reason, detail="the belt is closed"))
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
                case PartDone(part=part, digest=digest) if _writes(transfer):
                    self._tell(transfer, PartWritten(part, digest))
                case Measured() if _writes(transfer):
                    self._tell(transfer, Abandon("probed"))
                case Landed(digest=digest) if _writes(transfer):
                    self._tell(transfer, Written(digest))
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
    def look_every(self) -> float:
        """How often bytes under way are worth a look; infinity: there are none."""
        if self._pump.busy:
            return self._poll_seconds
        return STUCK_SECONDS if self._pump.stuck else float("inf")

    @property
    def num_open(self) -> int:
        """Transfers that have not ended."""
        return len(self._open)

    def states(self) -> Counter[str]:
        """Transfers by state."""
        return Counter(transfer.session.state.value for transfer in self._open.values())

    def links(self) -> list[Link]:
        """What has moved to each receiver that is connected."""
        now = self._clock()
        found = []
        for peer in self.peers.connected():
            tally = self._links.of(peer.agent) if self._links is not None and peer.agent is not None else None
            if tally is not None:
                found.append(
                    Link(
                        engine_id=peer.address.engine_id,
                        writes=tally.writes,
                        num_bytes=tally.num_bytes,
                        busy_seconds=tally.busy_until(now),
                        bytes_in_flight=tally.bytes_in_flight,
                    )
                )
        return found

    # Peers.

    def _peer_ready(self, peer: Peer) -> None:
        self._opening_until = self._clock() + self._opening_seconds
        self._warmed(peer, PeerOutcome(ok=True, reason="", detail=""))
        for transfer in self._under_way(peer):
            self._tell(transfer, PeerReady())

    def _peer_lost(self, peer: Peer, reason: str, detail: str) -> None:
        self._warmed(peer, PeerOutcome(ok=False, reason=reason, detail=detail))
        for transfer in self._under_way(peer):
            self._tell(transfer, PeerFailed(reason, detail, gone=reason == "stale_engine"))
        self._abort_writes(peer)
        if self._links is not None and peer.agent is not None:
            self._links.forget(peer.agent)

    def _warmed(self, peer: Peer, outcome: PeerOutcome) -> None:
        for on_end in self._warming.pop(peer, ()):
            on_end(outcome)

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
            if isinstance(message, wire.Wait) and transfer is self._probe:
                # Its place in the queue is somebody else's.
                self._stop_probe("receiver_full", "the decode worker has no room in its buffer")
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
                case BeginWriting(granted):
                    self._begin_writing(transfer, granted)
                case GoOn(taken):
                    self._pump.go_on(transfer.load, taken)
                case StopWriting():
                    self._pump.stop(transfer.load)
                case AbortWrites():
                    self.peers.lose(transfer.peer, "peer_lost", "writes to it do not end")
                case Outcome():
                    self._conclude(transfer, command)
        self._deadlines.set(transfer.session.plan.transfer_id, transfer.session.due)
        self._forget_if_ended(transfer)

    def _begin_writing(self, transfer: Outgoing, granted: wire.Granted) -> None:
        peer, plan = transfer.peer, transfer.session.plan
        assert peer.agent is not None
        try:
            shape = SlotShape(self._layout, plan.num_blocks, granted.first_block, granted.part_blocks)
            there = peer.regions[granted.region]
            fits = granted.region >= 0 and 0 <= granted.offset <= there.num_bytes - shape.slot_bytes
        except (ValueError, IndexError):
            fits = False
        if not fits:
            self._tell(transfer, WriteFailed("bad_grant", f"what was granted cannot be: {granted}"))
            return
        place = there.device if there.device == "cpu" else f"{there.device}:{there.device_index}"
        choice = None
        if granted.verify != "off":
            choice = Choice(plan.transfer_id, plan.num_blocks, granted.verify)
        self._pump.begin(transfer.load, Target(peer.agent, place, there.address + granted.offset, shape, choice))

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
        if transfer is self._probe:
            self._probe = None
        done = outcome.state is SenderState.DONE
        seconds = (load.last_landed or now) - load.first_write if load.first_write is not None else 0.0
        exposed = now - transfer.computed_at if transfer.computed_at is not None else 0.0
        num_bytes = load.landed_blocks * (plan.num_bytes // load.total_blocks)
        self.ended_total.add(outcome.reason)
        notification: Notification
        if load.probing is not None:
            transfer.on_end(TransferOutcome(ok=False, reason=outcome.reason, detail=outcome.detail))
            return
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
                "transfer %s to %s failed: %s: %s",
                plan.transfer_id,
                plan.receiver,
                outcome.reason,
                outcome.detail,
                extra={"transfer_id": plan.transfer_id, "reason": outcome.reason},
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


def _nothing(*_: object) -> None:
    """Of a measurement nobody is told but its owner: it has no blocks, and the proxy knows of no such transfer."""


def _writes(transfer: Outgoing | None) -> TypeGuard[Outgoing]:
    return transfer is not None and transfer.session.state is SenderState.WRITING
