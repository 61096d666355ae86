"""The sending side's driver, on the belt's thread: performs what ``OutgoingTransfers`` commands, and reports to it."""

import logging
from collections.abc import Callable, Iterable

import zmq

from kvbelt.errors import ChannelError
from kvbelt.transfer.calls import call_back
from kvbelt.transfer.ports import Channel, PeerOutcome, TransferOutcome
from kvbelt.transfer.send.load import Target
from kvbelt.transfer.send.outgoing import Conclude, Forget, LosePeer, OutgoingTransfers, Todo
from kvbelt.transfer.send.peer import Peer
from kvbelt.transfer.send.peers import Change, Peers
from kvbelt.transfer.send.pipeline import WritePipeline
from kvbelt.transfer.send.session import ContinueWriting, Outcome, Send, SenderSession, StopWriting
from kvbelt.transfer.send.states import Abort, BlocksFree, PeerFailed, PeerReady, SenderState
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.sockets import Sockets
from kvbelt.wire.about import LinkTotals
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import Hello
from kvbelt.wire.ids import EngineId
from kvbelt.wire.notification import encode as encode_notification

log = logging.getLogger(__name__)

#: Longest time of moving bytes before the sockets are served again.
STEP_SECONDS = 1e-3

#: Seconds between two polls of writes that could not be aborted.
STUCK_SECONDS = 0.1


def refuse(transfer: SenderSession, reason: str, detail: str) -> None:
    """End a transfer that has not begun. From any thread."""
    transfer.load.stopped = True
    transfer.outcome = Outcome(SenderState.FAILED, reason, detail)
    call_back(transfer.on_blocks_free)
    call_back(transfer.on_end, TransferOutcome(ok=False, reason=reason, detail=detail))


class SenderDriver:
    def __init__(  # noqa: PLR0917 -- its seams
        self,
        engine_id: EngineId,
        hello: Callable[[EngineId], Hello],
        settings: BeltSettings,
        sockets: Sockets,
        channel: Channel,
        pipeline: WritePipeline,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self.now = clock
        self.pipeline = pipeline
        self.transfers = OutgoingTransfers(engine_id, channel.name)
        self.peers = Peers(hello, settings, sockets, channel)
        self._opening_until = 0.0  # the latest peer's connection is being opened
        # Called once each, when the peer is connected or lost.
        self._warming: dict[Peer, list[Callable[[PeerOutcome], None]]] = {}
        self._proxy = (
            sockets.connect(zmq.PUSH, settings.notification_endpoint, settings.proxy_key)
            if settings.notification_endpoint
            else None
        )

    def begin(self, transfer: SenderSession, address: ReceiverAddress) -> None:
        problem = self._problem(address)
        if problem is None and transfer.transfer_id in self.transfers:
            problem = "duplicate_transfer", f"transfer {transfer.transfer_id} is already under way"
        if problem is not None:
            refuse(transfer, *problem)
        else:
            self.begin_to(transfer, self._peer_at(address))

    def begin_to(self, transfer: SenderSession, peer: Peer) -> None:
        self.pipeline.add(transfer)
        self._perform(self.transfers.begin(transfer, peer, self.now()))

    def abort(self, transfer: SenderSession, reason: str) -> None:
        self._perform(self.transfers.handle(transfer, Abort(reason), self.now()))

    def abort_all(self, reason: str) -> None:
        for peer in list(self._warming):
            self._warmed(peer, PeerOutcome(ok=False, reason=reason, detail="the belt is closed"))
        for transfer in self.transfers:
            self.abort(transfer, reason)

    def warm(self, address: ReceiverAddress, on_end: Callable[[PeerOutcome], None]) -> None:
        problem = self._problem(address)
        if problem is not None:
            call_back(on_end, PeerOutcome(False, *problem))
            return
        peer = self._peer_at(address)
        peer.used_at = self.now()
        self._warming.setdefault(peer, []).append(on_end)
        if peer.ready:
            self._warmed(peer, PeerOutcome(ok=True, reason="", detail=""))

    def _problem(self, address: ReceiverAddress) -> tuple[str, str] | None:
        """Why nothing can be sent to an address: reason and detail. Takes the send buffer."""
        problem = self.peers.distrust(address)
        if problem is None:
            try:
                self.pipeline.buffer.take()
            except ChannelError as error:
                return "no_memory", str(error)
        return problem

    def _peer_at(self, address: ReceiverAddress) -> Peer:
        for other in self.peers.replaced_by(address):
            # A new incarnation at an address proves the old one over: what is held for it is freed at once.
            self._lose(other, "stale_engine", f"{address.engine_id} has taken its place")
        return self.peers.at(address, self.now())

    def on_messages(self, ready: set[zmq.Socket[bytes]]) -> None:
        for change in self.peers.on_handshakes(ready):
            self._on_change(change)
        for peer, message in self.peers.messages(ready):
            unknown = self.transfers.unknown(peer, message)
            if unknown is not None:
                self.peers.send(peer, unknown)
            else:
                self._perform(self.transfers.on_message(peer, message, self.now()))

    def step(self) -> bool:
        """Move bytes for a while. True: there is more to do at once."""
        until = self.now() + STEP_SECONDS
        while True:
            now = self.now()
            reports, more = self.pipeline.step(now)
            for transfer, report in reports:
                self._perform(self.transfers.on_report(transfer, report, now))
            if not more or now >= until:
                return more

    def tick(self, now: float) -> None:
        self._perform(self.transfers.tick(now))
        for change in self.peers.tick(now):
            self._on_change(change)

    @property
    def due(self) -> float:
        return min(self.transfers.deadlines.due, self.peers.due)

    @property
    def look_every(self) -> float:
        if self.pipeline.busy:
            return self._settings.poll_seconds
        return STUCK_SECONDS if self.pipeline.stuck else float("inf")

    @property
    def progress_every(self) -> float:
        return self._settings.progress_seconds if self.now() < self._opening_until else float("inf")

    def links(self) -> list[LinkTotals]:
        links, now = self.pipeline.links, self.now()
        found = []
        for peer in self.peers.connected():
            tally = links.of(peer.agent) if links is not None and peer.agent is not None else None
            if tally is not None:
                busy = tally.busy_until(now)
                engine_id = peer.address.engine_id
                found.append(LinkTotals(engine_id, tally.writes, tally.num_bytes, busy, tally.bytes_in_flight))
        return found

    def _on_change(self, change: Change) -> None:
        if change.lost is not None:
            self._lose(change.peer, *change.lost)
            return
        now = self.now()
        self._opening_until = now + self._settings.opening_seconds
        self._warmed(change.peer, PeerOutcome(ok=True, reason="", detail=""))
        self._perform(self.transfers.on_peer(change.peer, PeerReady(), now))

    def _lose(self, peer: Peer, reason: str, detail: str) -> None:
        if not self.peers.forget(peer):
            return
        self._warmed(peer, PeerOutcome(ok=False, reason=reason, detail=detail))
        lost = PeerFailed(reason, detail, gone=reason == "stale_engine")
        self._perform(self.transfers.on_peer(peer, lost, self.now()))
        self._abort_writes(peer)
        if peer.agent is not None:
            if self.pipeline.links is not None:
                self.pipeline.links.forget(peer.agent)
            self.peers.disconnect(peer)
            self._abort_writes(peer)  # the channel has closed its connection: what it held can be aborted now
        self.peers.close_if_done(peer)

    def _abort_writes(self, peer: Peer) -> None:
        for transfer in self.transfers.of(peer):
            self.pipeline.abort(transfer)

    def _warmed(self, peer: Peer, outcome: PeerOutcome) -> None:
        for on_end in self._warming.pop(peer, ()):
            call_back(on_end, outcome)

    def _perform(self, commands: Iterable[Todo]) -> None:
        for transfer, command in commands:
            peer = transfer.peer
            assert peer is not None  # set when it began
            match command:
                case Send(message):
                    self.peers.send(peer, message)
                case Target():
                    self.pipeline.begin(transfer, command)
                case ContinueWriting(taken):
                    self.pipeline.parts_taken(transfer, taken)
                case StopWriting():
                    self.pipeline.stop(transfer)
                case BlocksFree():
                    call_back(transfer.on_blocks_free)
                case Conclude():
                    self._conclude(transfer, command)
                case LosePeer(reason, detail):
                    self._lose(peer, reason, detail)
                case Forget():
                    self.peers.close_if_done(peer)

    def _conclude(self, transfer: SenderSession, command: Conclude) -> None:
        outcome = command.outcome
        if not outcome.ok and not transfer.measures:
            about = {"transfer_id": transfer.transfer_id, "reason": outcome.reason}
            what = transfer.transfer_id, transfer.receiver, outcome.reason, outcome.detail
            log.warning("transfer %s to %s failed: %s: %s", *what, extra=about)
        if self._proxy is not None and command.notification is not None:
            Sockets.send(self._proxy, encode_notification(command.notification))
        call_back(transfer.on_end, outcome)
