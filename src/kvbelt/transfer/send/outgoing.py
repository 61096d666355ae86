"""The sending side as a whole: every outgoing transfer of one process. Pure: no sockets, no memory, no clock."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from kvbelt.security.refusals import Tally
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.ports import TransferOutcome
from kvbelt.transfer.send.load import Target
from kvbelt.transfer.send.peer import Peer
from kvbelt.transfer.send.session import (
    AbortWrites,
    BeginWriting,
    ContinueWriting,
    Outcome,
    Send,
    SenderCommand,
    SenderSession,
    StopWriting,
)
from kvbelt.transfer.send.states import BlocksFree, PeerFailed, PeerReady, Report, SenderEvent, SenderState, WriteFailed
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.digest import Choice
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.load import Sum
from kvbelt.wire.notification import Notification, TransferDone, TransferFailed


class Conclude(Struct, frozen=True):
    """Tell the owner, and the proxy where there is something to tell it."""

    outcome: TransferOutcome
    notification: Notification | None


class LosePeer(Struct, frozen=True):
    reason: str
    detail: str


class Forget(Struct, frozen=True):
    """The transfer is over, and its blocks are free."""


#: A ``Target`` says where to write from now on.
Command = Send | Target | ContinueWriting | StopWriting | BlocksFree | Conclude | LosePeer | Forget
Todo = tuple[SenderSession, Command]
Commands = list[Todo]


class OutgoingTransfers:
    def __init__(self, engine_id: EngineId, channel: str) -> None:
        self._engine_id = engine_id
        self._channel = channel
        # Exactly the transfers that have not ended. One that is not in it is not written by this process.
        self._open: dict[TransferId, SenderSession] = {}
        self.deadlines: Deadlines[TransferId] = Deadlines()
        self.ended_total = Tally()
        self.bytes_total = 0
        self.write_seconds = Sum()
        self.exposed_seconds = Sum()

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._open

    def __iter__(self) -> Iterator[SenderSession]:
        return iter(list(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)

    def states(self) -> Counter[str]:
        return Counter(transfer.state.value for transfer in self._open.values())

    def begin(self, transfer: SenderSession, peer: Peer, now: float) -> Commands:
        self._open[transfer.transfer_id] = transfer
        transfer.peer = peer
        peer.transfers.add(transfer.transfer_id)
        peer.used_at = now
        if peer.ready:
            return self.handle(transfer, PeerReady(), now)
        return self._done(transfer, [], now)

    def handle(self, transfer: SenderSession, event: SenderEvent, now: float) -> Commands:
        """Something has happened to a transfer; nothing follows if it has ended by now."""
        if self._open.get(transfer.transfer_id) is not transfer:
            return []
        return self._done(transfer, transfer.handle(event, now), now)

    def on_report(self, transfer: SenderSession, report: Report, now: float) -> Commands:
        if isinstance(report, BlocksFree):
            return [(transfer, report), *self._done(transfer, [], now)]
        was_open = self._open.get(transfer.transfer_id) is transfer
        commands = self.handle(transfer, report, now)
        if was_open and isinstance(report, WriteFailed) and report.peer:
            commands.append((transfer, LosePeer("peer_lost", f"a write to it failed: {report.detail}")))
        return commands

    def on_message(self, peer: Peer, message: wire.FromReceiver, now: float) -> Commands:
        transfer = self._find(peer, message)
        if transfer is None:
            return []
        commands = self.handle(transfer, message, now)
        if isinstance(message, wire.Refused) and message.reason in {"no_handshake", "stale_engine"}:
            commands.append((transfer, LosePeer(message.reason, message.detail)))
        return commands

    def unknown(self, peer: Peer, message: wire.FromReceiver) -> wire.Cancelled | None:
        """The answer to a message about an unknown transfer: this process does not write it."""
        if self._find(peer, message) is None and isinstance(message, wire.Granted | wire.Expired | wire.Cancel):
            return wire.Cancelled(transfer_id=message.transfer_id, slot=message.slot, sender=self._engine_id)
        return None

    def _find(self, peer: Peer, message: wire.FromReceiver) -> SenderSession | None:
        transfer = self._open.get(message.transfer_id)
        # By engine, not by connection: after a reconnect the receiver may answer on either.
        known = transfer is not None and transfer.peer is not None and transfer.peer.is_of(peer.address)
        return transfer if known else None

    def on_peer(self, peer: Peer, event: PeerReady | PeerFailed, now: float) -> Iterator[Todo]:
        # One after another: what follows for one may end another.
        for transfer in self.of(peer):
            if not transfer.ended:  # those that have ended only wait for their blocks to be free
                yield from self.handle(transfer, event, now)

    def of(self, peer: Peer) -> list[SenderSession]:
        return [self._open[transfer_id] for transfer_id in sorted(peer.transfers)]

    def tick(self, now: float) -> Iterator[Todo]:
        for transfer_id in self.deadlines.pop_due(now):
            transfer = self._open.get(transfer_id)
            if transfer is not None:
                yield from self._done(transfer, transfer.tick(now), now)

    def _done(self, transfer: SenderSession, asked: list[SenderCommand], now: float) -> Commands:
        """Judge grants and count ends; hand on the rest."""
        commands: Commands = []
        for command in asked:
            match command:
                case BeginWriting(granted):
                    target = self._target(transfer, granted)
                    if target is not None:
                        commands.append((transfer, target))
                    else:
                        failed = WriteFailed("bad_grant", f"what was granted cannot be: {granted}")
                        commands += self.handle(transfer, failed, now)
                case Outcome():
                    commands.append((transfer, self._conclude(transfer, command, now)))
                case AbortWrites():
                    commands.append((transfer, LosePeer("peer_lost", "writes to it do not end")))
                case _:
                    commands.append((transfer, command))
        self.deadlines.set(transfer.transfer_id, transfer.due)
        # A transfer ends before its blocks are free when a gather is still reading them.
        if transfer.ended and transfer.load.blocks_free and self._open.pop(transfer.transfer_id, None) is not None:
            assert transfer.peer is not None  # set when it began
            transfer.peer.transfers.discard(transfer.transfer_id)
            transfer.peer.used_at = now
            commands.append((transfer, Forget()))
        return commands

    def _target(self, transfer: SenderSession, granted: wire.Granted) -> Target | None:
        """Where the bytes go; None: what was granted cannot be."""
        peer = transfer.peer
        assert peer is not None
        assert peer.agent is not None  # it was asked for a slot
        try:
            layout, heads, per_block, layers = transfer.share
            first, part_blocks = granted.first_block, granted.part_blocks
            shape = SlotShape(layout, transfer.num_blocks, first, part_blocks, heads, per_block, layers)
            there = peer.regions[granted.region]
        except (ValueError, IndexError):
            return None
        if granted.region < 0 or not 0 <= granted.offset <= there.num_bytes - shape.slot_bytes:
            return None
        place = there.device if there.device == "cpu" else f"{there.device}:{there.device_index}"
        verified = granted.verify != "off"
        choice = Choice(transfer.transfer_id, transfer.num_blocks, granted.verify) if verified else None
        return Target(peer.agent, place, there.address + granted.offset, shape, choice)

    def _conclude(self, transfer: SenderSession, outcome: Outcome, now: float) -> Conclude:
        load = transfer.load
        done = outcome.state is SenderState.DONE
        told = TransferOutcome(
            ok=done,
            reason=outcome.reason,
            detail=outcome.detail,
            num_bytes=sum(part.landed_blocks for part in load.parts) * transfer.share.layout.block_bytes,
            num_writes=load.num_writes,
            seconds=(load.last_landed or now) - load.first_write if load.first_write is not None else 0.0,
            exposed_seconds=now - transfer.computed_at if transfer.computed_at is not None else 0.0,
        )
        self.ended_total.add(outcome.reason)
        if transfer.measures:
            return Conclude(told, None)
        if done:
            self.bytes_total += told.num_bytes
            self.write_seconds = self.write_seconds.plus(told.seconds)
            self.exposed_seconds = self.exposed_seconds.plus(told.exposed_seconds)
        return Conclude(told, self._notification(transfer, told))

    def _notification(self, transfer: SenderSession, outcome: TransferOutcome) -> Notification:
        about: dict[str, Any] = {
            "transfer_id": transfer.transfer_id,
            "sender": transfer.sender,
            "receiver": transfer.receiver,
            "num_bytes": outcome.num_bytes,
            "seconds": outcome.seconds,
        }
        if not outcome.ok:
            return TransferFailed(**about, reason=outcome.reason)
        return TransferDone(
            **about,
            channel=self._channel,
            num_tokens=transfer.num_tokens,
            num_writes=outcome.num_writes,
            exposed_seconds=outcome.exposed_seconds,
        )
