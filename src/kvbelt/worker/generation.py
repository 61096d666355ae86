"""One client request inside a worker: from token ids to the outputs of all its choices.

A request with P prompts and ``n`` choices is P·n sequences in the engine. On a prefill worker each prompt
is one outgoing transfer; on a decode worker each prompt waits for one incoming transfer first, and computes
the prompt itself if that does not come: the answer is the same, only its way differs.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbelt.engine.api import FinishReason, GenerationRequest, InvalidRequestError, Output, SamplingParams
from kvbelt.errors import RequestError
from kvbelt.telemetry import get_logger
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Lost, ReceivedKV, Sending, TransferOutcome
from kvbelt.wire.handoff import DecodeHandoff, HandoffState, PrefillHandoff, prompt_transfer_id
from kvbelt.wire.ids import TransferId
from kvbelt.worker.kv_seam import IncomingTransfer, OutgoingTransfer
from kvbelt.worker.prompts import Prompt
from kvbelt.worker.requests import Handoff

log = get_logger(__name__)


class SubmitsSequences(Protocol):
    """What a generation needs of an engine."""

    def submit(self, request: GenerationRequest) -> None:
        """Take a sequence. Raises InvalidRequestError."""

    def abort(self, request_id: str) -> None:
        """End a sequence now; unknown ids are ignored."""


@dataclass(frozen=True, slots=True)
class KVFate:
    """What became of the KV that a decode request was promised."""

    received: bool
    reason: str  #: why not, low cardinality; ``""`` if received
    waited_seconds: float


class Generation:
    """Runs the sequences of one request. Make it, ``start`` it, read ``outputs``, and ``cancel`` it in any case."""

    def __init__(
        self,
        engine: SubmitsSequences,
        belt: Belt | None,
        *,
        request_id: str,
        prompts: Sequence[Prompt],
        samplings: Sequence[SamplingParams],
        handoff: Handoff | None,
    ) -> None:
        """``samplings`` has one entry a choice; prompts and choices multiply."""
        self._engine = engine
        self._belt = belt
        # A client may repeat its request ids; the engine's must differ.
        self._name = f"{request_id}:{uuid.uuid4().hex[:8]}"
        self._request_id = request_id
        self._prompts = prompts
        self._samplings = samplings
        self._handoff = handoff
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._open: set[int] = set()  #: choices submitted and not finished
        self._outgoing: list[OutgoingTransfer] = []
        self._refused: str | None = None
        self.kv_fate: KVFate | None = None

    async def start(self) -> None:
        """Wait for promised KV, then submit every sequence.

        Raises:
            RequestError: 400, the engine can never serve it.
        """
        incoming: list[ReceivedKV | Lost | None] = [None] * len(self._prompts)
        if isinstance(self._handoff, DecodeHandoff):
            incoming = list(await self._receive(self._handoff))
        n = len(self._samplings)
        seams = [IncomingTransfer(kv, n) if kv is not None and not isinstance(kv, Lost) else None for kv in incoming]
        submitted = 0
        try:
            for number, prompt in enumerate(self._prompts):
                for choice, sampling in enumerate(self._samplings):
                    index = number * n + choice
                    outgoing = self._send(number, prompt) if choice == 0 else None
                    try:
                        self._engine.submit(
                            GenerationRequest(
                                request_id=f"{self._name}/{index}",
                                prompt_token_ids=prompt.token_ids,
                                sampling=sampling,
                                on_output=self._receiver_of(index),
                                incoming=seams[number],
                                outgoing=outgoing,
                                prefix=prompt.prefix,
                            )
                        )
                    except InvalidRequestError as error:
                        raise RequestError(str(error), param=error.param) from error
                    submitted += 1
                    self._open.add(index)
        finally:
            for index in range(submitted, len(self._prompts) * n):
                if (seam := seams[index // n]) is not None:
                    seam.release()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Every output of every choice, as they come, each with its choice's index.

        Raises:
            RequestError: 500, the engine failed; 503, the worker is stopping.
        """
        while self._open:
            index, output = await self._queue.get()
            if output.finish_reason is not None:
                self._open.discard(index)
            if output.finish_reason is FinishReason.ERROR:
                raise RequestError(f"the engine failed: {output.error}", status=500, kind="internal_error")
            if output.finish_reason is FinishReason.ABORT:
                raise RequestError("the worker is stopping; try again", status=503, kind="unavailable")
            yield index, output

    def cancel(self) -> None:
        """End what is still running. Harmless after the end."""
        for index in self._open:
            self._engine.abort(f"{self._name}/{index}")
        self._open.clear()

    def handoff_state(self) -> HandoffState | None:
        """For a prefill worker's answer: what became of the transfer so far."""
        if not isinstance(self._handoff, PrefillHandoff):
            return None
        reason = self._refused or next((o.failure for o in self._outgoing if o.failure), None)
        if reason is not None:
            return HandoffState(transfer_id=self._handoff.transfer_id, state="failed", reason=reason)
        return HandoffState(transfer_id=self._handoff.transfer_id, state="open")

    def _receiver_of(self, index: int) -> "_OutputSink":
        return _OutputSink(self._loop, self._queue, index)

    def _send(self, number: int, prompt: Prompt) -> OutgoingTransfer | None:
        if not isinstance(self._handoff, PrefillHandoff):
            return None
        if self._belt is None:
            self._refused = "no_belt"
            return None
        belt, given = self._belt, self._handoff
        transfer_id = prompt_transfer_id(given.transfer_id, number)
        deadline = time.monotonic() + given.deadline_seconds
        # The block of the last token is not worth asking for: whoever decodes computes that token again.
        shareable = (len(prompt.token_ids) - 1) // belt.identity.layout.block_size

        def ended(outcome: TransferOutcome) -> None:
            (log.info if outcome.ok else log.warning)(
                "transfer sent" if outcome.ok else "transfer failed",
                request_id=self._request_id,
                transfer_id=transfer_id,
                reason=outcome.reason,
                detail=outcome.detail,
                bytes=outcome.num_bytes,
                writes=outcome.num_writes,
                ms=round(outcome.seconds * 1e3, 2),
                exposed_ms=round(outcome.exposed_seconds * 1e3, 2),
            )

        def begin(on_blocks_free: Callable[[], None]) -> Sending:
            handoff = PrefillHandoff(transfer_id, given.receiver, deadline - time.monotonic())
            hashes = prompt.prefix.hashes[:shareable]
            return belt.send(handoff, len(prompt.token_ids), on_blocks_free, ended, hashes)

        outgoing = OutgoingTransfer(begin)
        self._outgoing.append(outgoing)
        return outgoing

    async def _receive(self, handoff: DecodeHandoff) -> Sequence[ReceivedKV | Lost]:
        started = time.monotonic()
        if self._belt is None:
            self.kv_fate = KVFate(False, "no_belt", 0.0)
            return [Lost("no_belt", "this worker has no belt")] * len(self._prompts)
        waits = [
            asyncio.ensure_future(
                receive_one(self._belt, prompt_transfer_id(handoff.transfer_id, number), handoff.deadline_seconds)
            )
            for number in range(len(self._prompts))
        ]
        try:
            arrived = await asyncio.gather(*waits)
        except asyncio.CancelledError:
            for wait in waits:
                if wait.done() and not wait.cancelled() and not isinstance(kv := wait.result(), Lost):
                    kv.release()
            raise
        lost = [kv for kv in arrived if isinstance(kv, Lost)]
        for kv in lost:
            log.warning(
                "kv lost, computing the prompt here",
                request_id=self._request_id,
                transfer_id=handoff.transfer_id,
                reason=kv.reason,
                detail=kv.detail,
            )
        self.kv_fate = KVFate(not lost, lost[0].reason if lost else "", time.monotonic() - started)
        return arrived


class _OutputSink:
    """Takes one choice's outputs from the engine's thread to the request's queue on the event loop."""

    __slots__ = ("_index", "_loop", "_queue")

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[tuple[int, Output]]", index: int) -> None:
        self._loop, self._queue, self._index = loop, queue, index

    def __call__(self, output: Output) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (self._index, output))
        except RuntimeError:  # the loop has closed: the process is ending and nobody waits for this
            return


async def receive_one(belt: Belt, transfer_id: TransferId, deadline_seconds: float) -> ReceivedKV | Lost:
    """Wait for one transfer. Cancelling the wait gives the slot back."""
    loop = asyncio.get_running_loop()
    arrival: asyncio.Future[ReceivedKV | Lost] = loop.create_future()

    def deliver(kv: ReceivedKV | Lost) -> None:
        if not arrival.done():
            arrival.set_result(kv)
        elif not isinstance(kv, Lost):
            kv.release()

    def on_arrival(kv: ReceivedKV | Lost) -> None:
        loop.call_soon_threadsafe(deliver, kv)

    cancel = belt.receive(transfer_id, deadline_seconds, on_arrival)
    try:
        return await arrival
    except asyncio.CancelledError:
        cancel()
        if arrival.done() and not arrival.cancelled() and not isinstance(kv := arrival.result(), Lost):
            kv.release()
        raise
