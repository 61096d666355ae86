"""One client request in a worker: from token ids to the outputs of all its choices.

A request with P prompts and ``n`` choices is P·n sequences in the engine. On a prefill worker each prompt is one
outgoing transfer. On a decode worker each prompt first waits for one incoming transfer; if that does not come, the
worker computes the prompt itself, and the answer is the same.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from kvbelt.engine.api import FinishReason, GenerationRequest, InvalidRequestError, Output, SamplingParams
from kvbelt.engine.engine import Engine
from kvbelt.engine.grammar import Matcher
from kvbelt.errors import RequestError
from kvbelt.telemetry import get_logger
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Lost, ReceivedKV, TransferOutcome
from kvbelt.transfer.send.handle import Sending
from kvbelt.wire.handoff import DecodeHandoff, Handoff, HandoffState, PrefillHandoff, prompt_transfer_id
from kvbelt.worker.callbacks import answer_of
from kvbelt.worker.engine_adapter import IncomingTransfer, OutgoingTransfer
from kvbelt.worker.prompts import Prompt

log = get_logger(__name__)

_SUBMITTED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class KVOutcome:
    """What became of the KV that a decode request waited for."""

    received: bool
    reason: str  #: why not, low cardinality; ``""`` if received
    waited_seconds: float


class Generation:
    """Runs the sequences of one request. ``start`` it, read ``outputs``, and call ``cancel`` in any case."""

    def __init__(
        self,
        engine: Engine,
        belt: Belt | None,
        *,
        request_id: str,
        prompts: Sequence[Prompt],
        samplings: Sequence[SamplingParams],
        handoff: Handoff | None,
        itl_seconds: float | None,
        grammar: Matcher | None = None,
    ) -> None:
        """``samplings`` has one entry a choice; prompts and choices multiply. Each answer follows the grammar."""
        self._grammar = grammar
        self._engine = engine
        self._belt = belt
        # A client may repeat its request ids; the engine's must differ.
        self._name = f"{request_id}:{uuid.uuid4().hex[:8]}"
        self._request_id = request_id
        self._prompts = prompts
        self._samplings = samplings
        self._handoff = handoff
        self._itl_seconds = itl_seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._grammars: list[Matcher] = []  #: of each choice, if the answer has a form
        self._open: set[int] = set()  #: choices submitted and not finished
        self._outgoing: list[OutgoingTransfer] = []
        self._refused: str | None = None
        self.kv_outcome: KVOutcome | None = None

    async def start(self) -> None:
        """Wait for promised KV, then submit every sequence. Raises RequestError 400: the engine can never serve it."""
        incoming: list[ReceivedKV | Lost | None] = [None] * len(self._prompts)
        if isinstance(self._handoff, DecodeHandoff):
            incoming = list(await self._receive(self._handoff))
        n = len(self._samplings)
        loads = [IncomingTransfer(kv, n) if kv is not None and not isinstance(kv, Lost) else None for kv in incoming]
        submitted = 0
        try:
            for number, prompt in enumerate(self._prompts):
                for choice, sampling in enumerate(self._samplings):
                    index = number * n + choice
                    outgoing = self._send(number, prompt) if choice == 0 else None
                    if self._grammar is not None:
                        self._grammars.append(self._grammar.copy())
                    try:
                        self._engine.submit(
                            GenerationRequest(
                                request_id=f"{self._name}/{index}",
                                prompt_token_ids=prompt.token_ids,
                                sampling=sampling,
                                on_output=partial(_deliver, self._loop, self._queue, index),
                                incoming=loads[number],
                                outgoing=outgoing,
                                prefix=prompt.prefix,
                                itl_seconds=self._itl_seconds,
                                grammar=self._grammars[index] if self._grammars else None,
                                turn=submitted // _SUBMITTED_AT_ONCE,
                            )
                        )
                    except InvalidRequestError as error:
                        raise RequestError(str(error), param=error.param) from error
                    submitted += 1
                    self._open.add(index)
                    if submitted % _SUBMITTED_AT_ONCE == 0:  # a request of a thousand must not hold up the others
                        await asyncio.sleep(0)
        finally:
            for index in range(submitted, len(self._prompts) * n):
                if (load := loads[index // n]) is not None:
                    load.release()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs as they arrive, with their choice's index.

        Raises RequestError: 400, the form costs too much; 500, the engine failed; 503, it is stopping.
        """
        while self._open:
            index, output = await self._queue.get()
            if output.finish_reason is not None:
                self._open.discard(index)
            if output.finish_reason is FinishReason.ERROR:
                if self._grammars and self._grammars[index].is_given_up:
                    raise RequestError("the form of the answer costs too much to follow; ask for a simpler one")
                raise RequestError(f"the engine failed: {output.error}", status=500, kind="internal_error")
            if output.finish_reason is FinishReason.ABORT:
                raise RequestError("the worker is stopping; try again", status=503, kind="unavailable")
            yield index, output

    def cancel(self) -> None:
        """End what still runs. Idempotent."""
        for index in self._open:
            self._engine.abort(f"{self._name}/{index}")
        self._open.clear()

    def handoff_state(self) -> HandoffState | None:
        """The transfer so far, for a prefill worker's answer."""
        if not isinstance(self._handoff, PrefillHandoff):
            return None
        reason = self._refused or next((o.failure for o in self._outgoing if o.failure), None)
        if reason is not None:
            return HandoffState(transfer_id=self._handoff.transfer_id, state="failed", reason=reason)
        return HandoffState(transfer_id=self._handoff.transfer_id, state="open")

    def _send(self, number: int, prompt: Prompt) -> OutgoingTransfer | None:
        if not isinstance(self._handoff, PrefillHandoff):
            return None
        if self._belt is None:
            self._refused = "no_belt"
            return None
        belt, given = self._belt, self._handoff
        transfer_id = prompt_transfer_id(given.transfer_id, number)
        deadline = time.monotonic() + given.deadline_seconds
        # The block of the last token need not be asked for: the decode worker computes that token again.
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
            self.kv_outcome = KVOutcome(False, "no_belt", 0.0)
            return [Lost("no_belt", "this worker has no belt")] * len(self._prompts)
        ids = [prompt_transfer_id(handoff.transfer_id, number) for number in range(len(self._prompts))]
        asks = [partial(self._belt.receive, name, handoff.deadline_seconds) for name in ids]
        waits = [asyncio.ensure_future(answer_of(ask, _release)) for ask in asks]
        try:
            arrived = await asyncio.gather(*waits)
        except asyncio.CancelledError:
            for wait in waits:
                if wait.done() and not wait.cancelled():
                    _release(wait.result())
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
        self.kv_outcome = KVOutcome(not lost, lost[0].reason if lost else "", time.monotonic() - started)
        return arrived


def _release(kv: ReceivedKV | Lost) -> None:
    if not isinstance(kv, Lost):
        kv.release()


def _deliver(
    loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[tuple[int, Output]]", index: int, output: Output
) -> None:
    """Engine's thread: hand an output of one choice to the request's queue on the event loop."""
    with suppress(RuntimeError):  # the loop has closed: the process is ending
        loop.call_soon_threadsafe(queue.put_nowait, (index, output))
