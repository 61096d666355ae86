"""The half of the connector that lives in vLLM's scheduler: what to send, what to load, which blocks.

Pure: values in, values out, no vLLM, no threads, time injected.

A request with a ``PrefillHandoff`` is **outgoing**: with every step that computes a part of its prompt the worker
is told which blocks that step completes. Blocks cached from earlier prompts go along with the first.

A request with a ``DecodeHandoff`` is **incoming**: everything but its last token is promised as loadable (on the fast
path that is exactly the prefill worker's prompt; on the re-derive path the last token is computed here in order
to sample after it). If it does not come, vLLM is told that the blocks are invalid, and computes them.

States of an incoming request::

    NEW ──▶ CLAIMED ──▶ LOADING ──▶ OVER        OVER: nothing more is expected of the belt
     │         └──────────────────────▶           (all blocks were cached here, or the deadline has passed)
     └─▶ FOLLOWS                                another request of this server loads the same transfer (n > 1)
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import msgspec

from kvbelt.vllm.handoff import BadHandoff, Describe, parse
from kvbelt.vllm.orders import Claim, Load, News, Orders, Send, Written
from kvbelt.wire.handoff import DecodeHandoff, HandoffState, PrefillHandoff
from kvbelt.wire.ids import TransferId

log = logging.getLogger(__name__)


class OutgoingState(Enum):
    """Of a prompt whose KV leaves."""

    WAITING = auto()  #: not yet scheduled; the worker knows nothing of it
    SENDING = auto()
    ABANDONED = auto()  #: preempted: the worker has stopped, and knows it no more


class IncomingState(Enum):
    """Of a prompt whose KV comes."""

    NEW = auto()
    CLAIMED = auto()
    LOADING = auto()
    FOLLOWS = auto()
    OVER = auto()


@dataclass(slots=True, eq=False)
class Outgoing:
    """One prompt that is sent."""

    handoff: PrefillHandoff
    num_tokens: int
    deadline: float
    state: OutgoingState = OutgoingState.WAITING
    block_ids: list[int] = field(default_factory=list)
    announced: int = 0  #: blocks of ``block_ids`` that the worker was told of
    failure: str = ""


@dataclass(slots=True, eq=False)
class Incoming:
    """One prompt that is loaded."""

    handoff: DecodeHandoff
    num_tokens: int  #: of the prompt as this server has it
    deadline: float
    state: IncomingState = IncomingState.NEW
    outcome: str | None = None  #: None: not known; empty: received; else why not


@dataclass(frozen=True, slots=True)
class ScheduledPrompt:
    """What one step does with one request."""

    request_id: str
    new_block_ids: Sequence[int]
    num_computed_tokens: int  #: before the step
    num_scheduled_tokens: int


class SchedulerSide:
    """All requests of one vLLM server that have ``kv_transfer_params``."""

    def __init__(self, block_size: int, describe: Callable[[], dict[str, Any]], clock: Callable[[], float]) -> None:
        self._block_size = block_size
        self._describe = describe
        self._clock = clock
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[str, Incoming] = {}
        # Who loads a transfer. Invariant: that request is in _incoming.
        self._loader_of: dict[TransferId, str] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._loads: list[Load] = []
        self._drops: list[str] = []

    @property
    def num_requests(self) -> int:
        """Requests that have parameters and have not finished."""
        return len(self._outgoing) + len(self._incoming) + len(self._answers)

    def on_new_request(self, request_id: str, params: Mapping[str, Any] | None, num_tokens: int) -> None:
        """A request has come, with a prompt of so many tokens."""
        if not params:
            return
        match parse(params, request_id):
            case PrefillHandoff() as handoff:
                deadline = self._clock() + handoff.deadline_seconds
                self._outgoing[request_id] = Outgoing(handoff, num_tokens, deadline)
            case DecodeHandoff() as handoff:
                incoming = Incoming(handoff, num_tokens, self._clock() + handoff.deadline_seconds)
                if self._loader_of.setdefault(handoff.transfer_id, request_id) != request_id:
                    incoming.state = IncomingState.FOLLOWS
                self._incoming[request_id] = incoming
            case Describe():
                self._answers[request_id] = self._describe()
            case BadHandoff(detail):
                log.warning("request %s is computed without a transfer: %s", request_id, detail)
                self._answers[request_id] = {"state": "failed", "reason": "bad_handoff", "detail": detail}

    def loadable_tokens(self, request_id: str, num_computed_tokens: int) -> int | None:
        """How many tokens after the computed ones can be loaded; None: ask again. Changes nothing."""
        incoming = self._incoming.get(request_id)
        if incoming is None:
            return 0
        if incoming.state is IncomingState.FOLLOWS:
            loader = self._incoming.get(TransferId(self._loader_of.get(incoming.handoff.transfer_id, "")))
            # What the other loads, this one finds in the prefix cache.
            waits = loader is not None and loader.state is not IncomingState.OVER
            return None if waits and incoming.deadline > self._clock() else 0
        if incoming.state not in (IncomingState.NEW, IncomingState.CLAIMED) or incoming.deadline <= self._clock():
            return 0
        return max(incoming.num_tokens - 1 - num_computed_tokens, 0)

    def on_allocated(self, request_id: str, block_ids: Sequence[int], num_loaded_tokens: int) -> None:
        """The request has its blocks; so many tokens are to be loaded into them."""
        incoming = self._incoming.get(request_id)
        if incoming is None or incoming.state not in (IncomingState.NEW, IncomingState.CLAIMED):
            return
        if num_loaded_tokens == 0:
            # Cached here, or too late.
            if incoming.state is IncomingState.CLAIMED:
                self._drops.append(request_id)
            incoming.outcome = "cached" if incoming.deadline > self._clock() else "deadline"
            incoming.state = IncomingState.OVER
            return
        num_tokens = incoming.num_tokens - 1
        first = (num_tokens - num_loaded_tokens) // self._block_size
        end = -(-num_tokens // self._block_size)
        self._loads.append(Load(request_id, first, tuple(block_ids[first:end]), num_tokens))

    def orders(self, scheduled: Iterable[ScheduledPrompt], preempted: Iterable[str]) -> Orders:
        """What the worker must know for the step that has just been scheduled."""
        stopped = tuple(request_id for request_id in preempted if self._abandon(request_id))
        sends: list[Send] = []
        written: list[Written] = []
        for prompt in scheduled:
            outgoing = self._outgoing.get(prompt.request_id)
            if outgoing is None or outgoing.state is OutgoingState.ABANDONED:
                continue
            if outgoing.state is OutgoingState.WAITING:
                outgoing.state = OutgoingState.SENDING
                remaining = max(outgoing.deadline - self._clock(), 0.001)
                handoff = msgspec.structs.replace(outgoing.handoff, deadline_seconds=remaining)
                sends.append(Send(prompt.request_id, handoff, outgoing.num_tokens))
            outgoing.block_ids.extend(prompt.new_block_ids)
            completed = self._completed(prompt, outgoing)
            if completed is not None:
                written.append(completed)
        claims = self._claims()
        orders = Orders(stopped, tuple(sends), tuple(written), claims, tuple(self._loads), tuple(self._drops))
        for load in self._loads:
            self._incoming[load.request_id].state = IncomingState.LOADING
        self._loads.clear()
        self._drops.clear()
        return orders

    def _completed(self, prompt: ScheduledPrompt, outgoing: Outgoing) -> Written | None:
        num_tokens = min(prompt.num_computed_tokens + prompt.num_scheduled_tokens, outgoing.num_tokens)
        last = num_tokens == outgoing.num_tokens
        num_blocks = -(-num_tokens // self._block_size) if last else num_tokens // self._block_size
        first, outgoing.announced = outgoing.announced, num_blocks
        if first == num_blocks:
            # Nothing yet, or a later step of a request whose prompt is complete.
            return None
        return Written(prompt.request_id, first, tuple(outgoing.block_ids[first:num_blocks]), last)

    def _claims(self) -> tuple[Claim, ...]:
        claims: list[Claim] = []
        for request_id, incoming in self._incoming.items():
            if incoming.state is not IncomingState.NEW:
                continue
            incoming.state = IncomingState.CLAIMED
            remaining = max(incoming.deadline - self._clock(), 0.001)
            handoff = msgspec.structs.replace(incoming.handoff, deadline_seconds=remaining)
            claims.append(Claim(request_id, handoff))
        return tuple(claims)

    def _abandon(self, request_id: str) -> bool:
        outgoing = self._outgoing.get(request_id)
        if outgoing is None or outgoing.state is not OutgoingState.SENDING:
            return False
        # Its blocks are gone. The decode worker is told, and computes the prompt itself.
        outgoing.state = OutgoingState.ABANDONED
        outgoing.failure = "preempted"
        return True

    def on_news(self, news: News, finished_loading: Iterable[str]) -> None:
        """What came back with a step's output."""
        for request_id, reason in news.sent.items():
            if reason and request_id in self._outgoing:
                self._outgoing[request_id].failure = reason
        for request_id, reason in news.received.items():
            if request_id in self._incoming:
                self._incoming[request_id].outcome = reason
        for request_id in finished_loading:
            if request_id in self._incoming:
                self._incoming[request_id].state = IncomingState.OVER

    def on_finished(self, request_id: str) -> tuple[bool, dict[str, Any] | None]:
        """The request is over: (its blocks are still read, what the answer's ``kv_transfer_params`` say)."""
        if (answer := self._answers.pop(request_id, None)) is not None:
            return False, answer
        if (outgoing := self._outgoing.pop(request_id, None)) is not None:
            # An aborted one too: the worker cancels it, and says when it reads no more.
            held = outgoing.state is OutgoingState.SENDING
            state = HandoffState(
                outgoing.handoff.transfer_id, "failed" if outgoing.failure else "open", outgoing.failure or None
            )
            return held, msgspec.to_builtins(state)
        if (incoming := self._incoming.pop(request_id, None)) is not None:
            return False, self._finish(request_id, incoming)
        return False, None

    def _finish(self, request_id: str, incoming: Incoming) -> dict[str, Any]:
        if incoming.state in (IncomingState.CLAIMED, IncomingState.LOADING):
            self._drops.append(request_id)
        transfer_id = incoming.handoff.transfer_id
        if self._loader_of.get(transfer_id) == request_id:
            del self._loader_of[transfer_id]
        answer: dict[str, Any] = {"transfer_id": transfer_id}
        if incoming.outcome is not None:
            answer["kv"] = "recomputed" if incoming.outcome not in ("", "cached") else "received"
            answer["reason"] = incoming.outcome or None
        return answer
