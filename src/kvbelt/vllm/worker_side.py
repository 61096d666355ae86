"""The half of the connector that lives where the model runs: it hands blocks to the belt, and takes KV from it.

Threads: the model runner's thread calls everything that is public, and the belt's thread calls each ``on_end``.
``_lock`` guards what these write for the next report; everything else belongs to the model runner's thread.

Nothing here waits, with one exception: blocks that are taken away from a request are given up only once the belt reads
them no more. That takes microseconds, and is rare.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvbelt.belt_facts import BeltView
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import PeerOutcome, TransferOutcome
from kvbelt.transfer.send.handle import Sending
from kvbelt.vllm.background import Background
from kvbelt.vllm.compute import CpuCompute, CudaCompute
from kvbelt.vllm.held_prefixes import HeldPrefixes
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.loading import Loading
from kvbelt.vllm.step_messages import HostCopy, Send, StepCommands, StepReport, Written
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.shards import Piece, pieces_for, pieces_from, ranks_of, transfer_of

log = logging.getLogger(__name__)

#: How long a preempted request's blocks are waited for. The belt needs one turn of its thread, and one copy.
PREEMPT_SECONDS = 2.0


class SplitError(Exception):
    """Two servers have ranks between which heads or layers cannot be dealt."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A prompt whose blocks are read: they leave over the belt, or are copied to host memory, or both.

    It exists from the first step that reads its blocks until vLLM has them back.
    """

    sendings: list[Sending] = field(default_factory=list)  #: one to each rank that gets something of it
    complete: bool = False  #: every block has been handed over
    finished: bool = False  #: vLLM waits for the blocks
    blocks_free: threading.Event = field(default_factory=threading.Event)  #: the belt reads them no more
    read_by: int = 0  #: sendings that read its blocks; the belt's thread counts them down

    def cancel(self, reason: str) -> None:
        for sending in self.sendings:
            sending.cancel(reason)


class WorkerSide:
    """All transfers of one worker process. ``loading`` has what comes, ``HostWorker`` what host memory takes."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        belt: Belt,
        compute: CpuCompute | CudaCompute,
        host: HostWorker | None = None,
        held: HeldPrefixes | None = None,
        views: Background[BeltView] | None = None,
        sharing: Sequence[int] | None = None,
    ) -> None:
        """``sharing``: how many groups of layers have a layer in each row of a block; None: one."""
        self.loading = Loading(belt)
        self._belt = belt
        self._rank = belt.identity.rank
        self._held = held
        self._views = views
        self._host = host
        self._sharing = sharing or [1] * belt.identity.layout.num_layers
        self._compute = compute
        self._lock = threading.Lock()
        self._outgoing: dict[str, Outgoing] = {}
        self._step = StepCommands()
        self._written: dict[int, set[int]] = {}  # in this step, the groups of each row
        # To be reported with the next output.
        self._bad_blocks: set[int] = set()
        self._failed: set[str] = set()
        self._sent: dict[str, str] = {}
        self._peers: dict[EngineId, str] = {}

    # In the order of a step.

    def begin_step(self, commands: StepCommands) -> None:
        self._step = commands
        self._written.clear()
        if self._held is not None:
            self._held.update(commands.held, commands.gone)
        for request_id in commands.preempted:
            self._give_up(request_id)
        for send in commands.sends:
            self._begin_to_send(send)
        self.loading.obey(commands)
        for receiver in commands.warms:
            self._warm(receiver)
        if commands.steps is not None:
            self._belt.tell(commands.steps)
        for outcome in commands.outcomes:
            self._belt.tell_outcome(outcome)
        if commands.view and self._views is not None:
            self._views.begin()
        mark = self._compute.mark() if commands.copies else None
        for copy in commands.copies:
            self._copy(copy, mark)

    def layer_written(self, layer: int, group: int = 0) -> None:
        """Inside the forward pass: this layer's keys and values have been computed, or queued on the device.

        ``layer`` is its row in a block of its group's. A row goes once all groups have written it.
        """
        if not self._step.written:
            return
        written = self._written.setdefault(layer, set())
        if group not in written:
            written.add(group)
            if len(written) == self._sharing[layer]:
                self._hand_over(layer, self._compute.mark())

    def end_step(self) -> None:
        """After the forward pass, or once it is queued on the device."""
        step = self._step
        if not step.written and not step.keeps:
            return
        mark = self._compute.mark()
        for keep in step.keeps:
            self._copy(keep, mark)
        if step.written:
            # A pass that was replayed as one graph calls no hook in its layers.
            for layer, sharing in enumerate(self._sharing):
                if len(self._written.get(layer, ())) < sharing:
                    self._hand_over(layer, mark)
        for outgoing, prompt in self._written_now():
            if prompt.last:
                outgoing.complete = True
                for sending in outgoing.sendings:
                    self._compute.after(mark, sending.computed)
        self._step = StepCommands()

    def _copy(self, copy: HostCopy, mark: Any) -> None:
        assert self._host is not None, "a server without host memory was told to use it"
        if not copy.to_host:
            self._host.restore(copy)
            return
        if copy.request_id not in self._outgoing:
            self._outgoing[copy.request_id] = read_only = Outgoing()
            read_only.blocks_free.set()
        self._host.keep(copy, mark)

    def finished(self, finished_ids: set[str]) -> tuple[set[str], set[str]]:
        """After each step; vLLM has finished these requests. Returns (blocks no longer read, loads ended)."""
        for request_id in finished_ids:
            outgoing = self._outgoing.get(request_id)
            if outgoing is None:
                continue
            outgoing.finished = True
            if not outgoing.complete:
                outgoing.cancel("aborted")
        sent = {
            name
            for name, one in self._outgoing.items()
            if one.finished and one.blocks_free.is_set() and not (self._host is not None and self._host.reads(name))
        }
        for request_id in sent:
            del self._outgoing[request_id]
        loaded, bad, failed = self.loading.take_loaded()
        self._bad_blocks |= bad
        self._failed |= failed
        if self._host is not None:
            restored, bad = self._host.take_loaded()
            loaded |= restored
            self._bad_blocks |= bad
        return sent, loaded

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the loads last returned by ``finished`` that were not filled."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_failed(self) -> set[str]:
        """Of the loads last returned by ``finished`` those whose requests are to be computed from their beginning."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> StepReport:
        spoiled = self._host.take_spoiled() if self._host is not None else frozenset[int]()
        view = self._views.take() if self._views is not None else None
        with self._lock:
            sent, self._sent = self._sent, {}
            peers, self._peers = self._peers, {}
        views = {} if view is None else {self._rank: view}
        return StepReport(self.loading.take_received(), sent, spoiled, peers, views)

    def close(self) -> None:
        """Wait for the threads. The belt must have been closed."""
        self.loading.close()
        if self._views is not None:
            self._views.close()
        if self._host is not None:
            self._host.close()

    # Sending.

    def _targets(self, receiver: ReceiverAddress) -> list[tuple[Piece, ReceiverAddress]]:
        """What this rank sends to which ranks of a decode server.

        Raises:
            SplitError: the heads cannot be dealt to the ranks of both.
        """
        us, number = self._belt.identity, 1 + len(receiver.ranks)
        receivers, of_model = ranks_of(number, receiver.stages), (us.model_heads, us.layers)
        if receivers is None or not pieces_for(0, us.ranks, receivers, *of_model):
            raise SplitError(
                f"the receiver has {number} ranks in {len(receiver.stages)} pipeline stages, here are {us.ranks}, "
                f"and {us.model_heads or 'an unknown number of'} KV heads of {us.layers} layers cannot be dealt to both"
            )
        pieces = pieces_from(us.rank, us.ranks, receivers, *of_model)
        return [(piece, receiver.of_rank(piece.receiver)) for piece in pieces]

    def _warm(self, receiver: ReceiverAddress) -> None:
        reasons: list[str] = []
        targets: list[tuple[Piece, ReceiverAddress]] = []

        def on_end(outcome: PeerOutcome) -> None:
            if not outcome.ok:
                log.warning("decode server %s is not connected: %s (%s)", receiver, outcome.reason, outcome.detail)
            with self._lock:
                reasons.append(outcome.reason)
                if len(reasons) >= len(targets):
                    self._peers[receiver.engine_id] = max(reasons)

        try:
            targets = self._targets(receiver)
        except SplitError as error:
            on_end(PeerOutcome(ok=False, reason="refused_tp_size", detail=str(error)))
        for _, address in targets:
            self._belt.warm(address, on_end)

    def _begin_to_send(self, send: Send) -> None:
        request_id, outgoing = send.request_id, Outgoing()
        self._outgoing[request_id] = outgoing

        def on_end(outcome: TransferOutcome) -> None:
            if not outcome.ok:
                log.warning("the KV of request %s was not sent: %s (%s)", request_id, outcome.reason, outcome.detail)
            with self._lock:
                self._sent[request_id] = self._sent.get(request_id) or ("" if outcome.ok else outcome.reason)

        def on_blocks_free() -> None:
            outgoing.read_by -= 1
            if not outgoing.read_by:
                outgoing.blocks_free.set()

        try:
            targets = self._targets(send.handoff.receiver)
        except SplitError as error:
            outgoing.blocks_free.set()
            on_end(TransferOutcome(ok=False, reason="refused_tp_size", detail=str(error)))
            return
        outgoing.read_by = len(targets)
        if not targets:  # another rank has the same heads, and sends them
            outgoing.blocks_free.set()
        for piece, address in targets:
            transfer_id = transfer_of(send.handoff.transfer_id, piece)
            handoff = msgspec.structs.replace(send.handoff, transfer_id=transfer_id, receiver=address)
            sending = self._belt.send(handoff, send.num_tokens, on_blocks_free, on_end, send.prefix_hashes)
            outgoing.sendings.append(sending)

    def _written_now(self) -> Iterable[tuple[Outgoing, Written]]:
        for prompt in self._step.written:
            outgoing = self._outgoing.get(prompt.request_id)
            if outgoing is not None and outgoing.sendings:
                yield outgoing, prompt

    def _hand_over(self, layer: int, mark: Any) -> None:
        for outgoing, prompt in self._written_now():
            for sending in outgoing.sendings:
                sending.blocks_written(layer, prompt.first, prompt.block_ids, mark)

    def _give_up(self, request_id: str) -> None:
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is None:
            return
        outgoing.cancel("preempted")
        free = outgoing.blocks_free.wait(PREEMPT_SECONDS)
        kept = self._host is None or self._host.give_up(request_id, PREEMPT_SECONDS)
        if not free or not kept:
            # What is still read from its blocks is never committed, nor loaded from host memory.
            log.error("request %s: its blocks were read for %s s after it was preempted", request_id, PREEMPT_SECONDS)
