"""The half of the connector that lives in vLLM's scheduler: what to send, what to load, which blocks.

Pure: values in, values out, no vLLM, no threads, time injected. (But for ``worker``, where there is one to ask.)

A request with a ``PrefillHandoff`` is **outgoing**: with every step that computes a part of its prompt the worker
is told which blocks that step completes. Blocks cached from earlier prompts go along with the first.

A request with a ``DecodeHandoff`` is **incoming**: everything but its last token is promised as loadable (on the fast
path that is exactly the prefill worker's prompt; on the re-derive path the last token is computed here in order
to sample after it). If it does not come, vLLM is told that the blocks are invalid, and computes them.

Every other request may find blocks in host memory, and leave some there (``host_scheduler``), whatever its parameters.
What a decode server's prefix cache holds is told to its workers (``held_prefixes``), and need not come again.

Where the only worker lives in the scheduler's process, KV is claimed when its request comes, and what is whole then is
loaded **at once**: before the forward pass of the step that the request is first scheduled with, which computes its
last token. Loaded beside the running batch, it would be reported with the next step, and scheduled with the one after
the next (vLLM schedules ahead of the device). The running batch waits for that copy; so it is one a step, and what
has not come yet, or comes with others, is loaded beside the batch.

States of an incoming request::

    NEW ──▶ CLAIMED ──▶ LOADING ──▶ OVER        OVER: nothing more is expected of the belt
     │         └──────────────────────▶           (all blocks were cached here, or the deadline has passed)
     └─▶ FOLLOWS                                another request of this server loads the same transfer (n > 1)
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

import msgspec

from kvbelt.transfer.ports import ReceivedKV
from kvbelt.vllm.about import BeltLook
from kvbelt.vllm.handoff import BadHandoff, Describe, Warm, parse
from kvbelt.vllm.held_prefixes import PrefixLedger
from kvbelt.vllm.host_scheduler import HostScheduler
from kvbelt.vllm.orders import Claim, Load, News, Orders, ScheduledPrompt, Send, Written
from kvbelt.wire.block_hash import block_hashes
from kvbelt.wire.handoff import DecodeHandoff, HandoffState, PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId

log = logging.getLogger(__name__)

#: How long the scheduler waits for the belt's thread to look for a transfer, once a request. It takes a turn of that
#: thread; a busy one is not waited for longer, and the request is loaded beside the batch.
LOOK_SECONDS = 2e-3


class LocalWorker(Protocol):
    """What is needed of ``WorkerSide``, where the scheduler can call it."""

    def claim(self, claim: Claim) -> None:
        """Wait for the KV of a transfer."""

    def at_hand(self, request_id: str, seconds: float) -> ReceivedKV | None:
        """What was claimed, if all of it is here; the belt has so long to look."""

    def drop(self, request_id: str) -> None:
        """Nobody wants it any more."""


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
    hashes: tuple[bytes, ...] = ()  #: of its whole blocks, where they have any
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
    hashes: tuple[bytes, ...] = ()  #: of its whole blocks, until the ledger has been told of them
    state: IncomingState = IncomingState.NEW
    outcome: str | None = None  #: None: not known; empty: received; else why not
    asked: bool = False  #: whether the worker was asked for what is at hand
    now: bool = False  #: what was promised last is at hand


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt whose blocks may lie in host memory: nothing but tokens and the salt has gone into them."""

    token_ids: Sequence[int]
    salt: str = ""


class SchedulerSide:
    """All requests of one vLLM server that have ``kv_transfer_params``; and the others, where host memory is used.

    Args:
        block_size: tokens in a block.
        describe: who this server is, given what its ranks have seen when they last looked.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        block_size: int,
        describe: Callable[[Mapping[int, BeltLook]], dict[str, Any]],
        clock: Callable[[], float],
    ) -> None:
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
        self._warms: list[ReceiverAddress] = []
        self._describing: set[str] = set()
        self._look = False  # with the next step: somebody asks
        self._looks: dict[int, BeltLook] = {}  # the last of each rank
        self._warming: dict[str, tuple[EngineId, ...]] = {}
        self._peers: dict[EngineId, str] = {}  # what became of the last try to connect to each
        #: Set once the workers have said how much of it there is.
        self.host: HostScheduler | None = None
        #: Set where KV comes, and vLLM has a prefix cache.
        self.ledger: PrefixLedger | None = None
        #: Set where KV comes, and the only worker lives in this process.
        self.worker: LocalWorker | None = None

    @property
    def num_requests(self) -> int:
        """Requests that are known here and have not finished."""
        host = self.host.num_requests if self.host is not None else 0
        return (
            len(self._outgoing)
            + len(self._incoming)
            + len(self._answers)
            + len(self._warming)
            + len(self._describing)
            + host
        )

    def on_new_request(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        num_tokens: int,
        prompt: PromptTokens | None = None,
    ) -> None:
        """A request has come, with a prompt of so many tokens."""
        if params:
            self._on_handoff(request_id, params, num_tokens)
        outgoing, incoming = self._outgoing.get(request_id), self._incoming.get(request_id)
        wanted = outgoing is not None or (self.host if incoming is None else self.ledger) is not None
        if prompt is None or not wanted:
            return
        hashes = block_hashes(prompt.token_ids, self._block_size, prompt.salt)
        if outgoing is not None:
            outgoing.hashes = hashes
        if incoming is not None:
            incoming.hashes = hashes
        elif self.host is not None:
            self.host.on_new_request(request_id, num_tokens, hashes)

    def _on_handoff(self, request_id: str, params: Mapping[str, Any], num_tokens: int) -> None:
        match parse(params, request_id):
            case PrefillHandoff() as handoff:
                deadline = self._clock() + handoff.deadline_seconds
                self._outgoing[request_id] = Outgoing(handoff, num_tokens, deadline)
            case DecodeHandoff() as handoff:
                incoming = Incoming(handoff, num_tokens, self._clock() + handoff.deadline_seconds)
                if self._loader_of.setdefault(handoff.transfer_id, request_id) != request_id:
                    incoming.state = IncomingState.FOLLOWS
                self._incoming[request_id] = incoming
                if self.worker is not None and incoming.state is IncomingState.NEW:
                    incoming.state = IncomingState.CLAIMED
                    self.worker.claim(Claim(request_id, handoff))
            case Describe():
                # Answered when it ends, with what is seen until then.
                self._describing.add(request_id)
                self._look = True
            case Warm(receivers):
                self._warms.extend(receivers)
                self._warming[request_id] = tuple(receiver.engine_id for receiver in receivers)
            case BadHandoff(detail):
                log.warning("request %s is computed without a transfer: %s", request_id, detail)
                self._answers[request_id] = {"state": "failed", "reason": "bad_handoff", "detail": detail}

    def loadable_tokens(self, request_id: str, num_computed_tokens: int) -> int | None:
        """How many tokens after the computed ones can be loaded; None: ask again. Asked once more, nothing changes."""
        incoming = self._incoming.get(request_id)
        if incoming is None:
            return self.host.loadable_tokens(request_id, num_computed_tokens) if self.host is not None else 0
        if incoming.state is IncomingState.FOLLOWS:
            loader = self._incoming.get(TransferId(self._loader_of.get(incoming.handoff.transfer_id, "")))
            # What the other loads, this one finds in the prefix cache.
            waits = loader is not None and loader.state is not IncomingState.OVER
            return None if waits and incoming.deadline > self._clock() else 0
        if incoming.state not in (IncomingState.NEW, IncomingState.CLAIMED) or incoming.deadline <= self._clock():
            return 0
        tokens = max(incoming.num_tokens - 1 - num_computed_tokens, 0)
        incoming.now = tokens > 0 and self._at_hand(request_id, incoming, num_computed_tokens)
        return tokens

    def loads_now(self, request_id: str) -> bool:
        """Whether what ``loadable_tokens`` has promised is loaded before the step's forward pass, not beside it."""
        incoming = self._incoming.get(request_id)
        return incoming is not None and incoming.now

    def _at_hand(self, request_id: str, incoming: Incoming, num_computed_tokens: int) -> bool:
        """Whether nothing but the device can still fail when it is loaded."""
        if self.worker is None or incoming.state is not IncomingState.CLAIMED or any(load.now for load in self._loads):
            return False
        seconds, incoming.asked = (0.0 if incoming.asked else LOOK_SECONDS), True
        kv = self.worker.at_hand(request_id, seconds)
        return (
            kv is not None
            and kv.num_tokens in (incoming.num_tokens - 1, incoming.num_tokens)
            and num_computed_tokens // self._block_size >= kv.first_block
        )

    def on_allocated(self, request_id: str, block_ids: Sequence[int], num_loaded_tokens: int) -> None:
        """The request has its blocks; so many tokens are to be loaded into them."""
        if self.ledger is not None:
            self.ledger.taken(block_ids)
        incoming = self._incoming.get(request_id)
        if incoming is None and self.host is not None:
            self.host.on_allocated(request_id, block_ids, num_loaded_tokens)
        if incoming is None or incoming.state not in (IncomingState.NEW, IncomingState.CLAIMED):
            return
        if num_loaded_tokens == 0:
            # Cached here, or too late.
            if incoming.state is IncomingState.CLAIMED:
                self._drop(request_id)
            incoming.outcome = "cached" if incoming.deadline > self._clock() else "deadline"
            incoming.state = IncomingState.OVER
            return
        num_tokens = incoming.num_tokens - 1
        first = (num_tokens - num_loaded_tokens) // self._block_size
        end = -(-num_tokens // self._block_size)
        self._loads.append(Load(request_id, first, tuple(block_ids[first:end]), num_tokens, incoming.now))

    def _drop(self, request_id: str) -> None:
        if self.worker is not None:
            # A server that has nothing to do has no next step to say it with.
            self.worker.drop(request_id)
        else:
            self._drops.append(request_id)

    def orders(self, scheduled: Iterable[ScheduledPrompt], preempted: Iterable[str]) -> Orders:
        """What the worker must know for the step that has just been scheduled."""
        scheduled, preempted = tuple(scheduled), tuple(preempted)
        stopped = tuple(request_id for request_id in preempted if self._abandon(request_id))
        orders = self._belt_orders(scheduled, stopped)
        if self.ledger is not None:
            self._tell(self.ledger, scheduled)
            held, gone = self.ledger.take_changes()
            orders = dataclasses.replace(orders, held=held, gone=gone)
        if self.host is None:
            return orders
        read, restores, keeps = self.host.orders(scheduled, preempted)
        stopped = tuple(dict.fromkeys((*stopped, *read)))
        return dataclasses.replace(orders, preempted=stopped, restores=restores, keeps=keeps)

    def _tell(self, ledger: PrefixLedger, scheduled: Iterable[ScheduledPrompt]) -> None:
        for prompt in scheduled:
            ledger.taken(prompt.new_block_ids)
            incoming = self._incoming.get(prompt.request_id)
            if incoming is not None and incoming.hashes:
                # Its first step: vLLM has just taken what was loaded into its prefix cache.
                ledger.holds(incoming.hashes, prompt.new_block_ids)
                incoming.hashes = ()

    def _belt_orders(self, scheduled: Iterable[ScheduledPrompt], stopped: tuple[str, ...]) -> Orders:
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
                sends.append(Send(prompt.request_id, handoff, outgoing.num_tokens, outgoing.hashes))
            outgoing.block_ids.extend(prompt.new_block_ids)
            completed = self._completed(prompt, outgoing)
            if completed is not None:
                written.append(completed)
        claims = self._claims()
        orders = Orders(stopped, tuple(sends), tuple(written), claims, tuple(self._loads), tuple(self._drops))
        orders = dataclasses.replace(orders, warms=tuple(self._warms), look=self._look)
        self._look = False
        for load in self._loads:
            incoming = self._incoming[load.request_id]
            incoming.state = IncomingState.OVER if load.now else IncomingState.LOADING
            if load.now:
                # Its answer may be made before what this step brings back is heard.
                incoming.outcome = ""
        self._loads.clear()
        self._drops.clear()
        self._warms.clear()
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
                incoming = self._incoming[request_id]
                # Ranks report one by one; what one of them lacks, the request lacks.
                incoming.outcome = reason or incoming.outcome or ""
            if reason == "prefix_evicted" and self.ledger is not None:
                self.ledger.look_at_all()
        self._peers.update(news.peers)
        self._looks.update(news.looks)
        for request_id in finished_loading:
            if request_id in self._incoming:
                self._incoming[request_id].state = IncomingState.OVER
        if self.host is not None:
            self.host.on_spoiled(news.spoiled)

    def on_computed(self, tokens: PromptTokens, block_ids: Sequence[int]) -> None:
        """So many tokens, of a prompt and perhaps of its answer, have their KV in these blocks."""
        if self.ledger is not None:
            self.ledger.holds(block_hashes(tokens.token_ids, self._block_size, tokens.salt), block_ids)

    def on_finished(self, request_id: str) -> tuple[bool, dict[str, Any] | None]:
        """The request is over: (its blocks are still read, what the answer's ``kv_transfer_params`` say)."""
        held, loaded_tokens = self.host.on_finished(request_id) if self.host is not None else (False, 0)
        if (answer := self._answers.pop(request_id, None)) is not None:
            return held, answer
        if request_id in self._describing:
            self._describing.discard(request_id)
            return held, self._describe(self._looks)
        if (asked := self._warming.pop(request_id, None)) is not None:
            return held, {"peers": [self._peer(engine_id) for engine_id in asked]}
        if (outgoing := self._outgoing.pop(request_id, None)) is not None:
            # An aborted one too: the worker cancels it, and says when it reads no more.
            held = held or outgoing.state is OutgoingState.SENDING
            state = HandoffState(
                outgoing.handoff.transfer_id,
                "failed" if outgoing.failure else "open",
                outgoing.failure or None,
                loaded_tokens,
            )
            return held, msgspec.to_builtins(state)
        if (incoming := self._incoming.pop(request_id, None)) is not None:
            return False, self._finish(request_id, incoming)
        return held, None

    def _peer(self, engine_id: EngineId) -> dict[str, str]:
        reason = self._peers.get(engine_id, "not_yet")
        return {"engine_id": engine_id, "state": "failed" if reason else "ready", "reason": reason}

    def _finish(self, request_id: str, incoming: Incoming) -> dict[str, Any]:
        if incoming.state in (IncomingState.CLAIMED, IncomingState.LOADING):
            self._drop(request_id)
        transfer_id = incoming.handoff.transfer_id
        if self._loader_of.get(transfer_id) == request_id:
            del self._loader_of[transfer_id]
        answer: dict[str, Any] = {"transfer_id": transfer_id}
        if incoming.outcome is not None:
            answer["kv"] = "recomputed" if incoming.outcome not in ("", "cached") else "received"
            answer["reason"] = incoming.outcome or None
        return answer
