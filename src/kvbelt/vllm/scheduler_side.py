"""The half of the connector that lives in vLLM's scheduler: what to send, what to load, into which blocks.

Pure: values in, values out, no vLLM, no threads, time injected. The tables in ``requests`` drive it.

A request with a ``PrefillHandoff`` **sends** (``sends``).

A request with a ``DecodeHandoff`` **loads**. Everything but its last token is promised to vLLM as loadable. On the fast
path that is exactly the prefill worker's prompt; on the re-derive path the last token is computed here, so that the
first token can be sampled after it. If the KV does not come, vLLM is told that the blocks are invalid, and computes
them.

Every other request may find blocks in host memory. All leave some there (``host_scheduler``).
The hashes that a decode server's prefix cache holds are told to its workers (``held_prefixes``); those blocks need not
be sent again.

KV that has arrived whole before its request is scheduled is loaded **now**: before the forward pass of the request's
first step, which computes the prompt's last token. Only a worker in the scheduler's own process can tell in time
(``arrival_wait``). A load beside the running batch costs two more steps: it is reported with the next step, and vLLM
schedules ahead of the device. But the running batch waits for a load of the first kind, so there is one a step.
"""

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal

from kvbelt.belt_facts import BeltView
from kvbelt.vllm.groups import ONE_GROUP, Groups
from kvbelt.vllm.handoff import BadHandoff, parse
from kvbelt.vllm.held_prefixes import PrefixLedger
from kvbelt.vllm.host_scheduler import HostCommands, HostScheduler
from kvbelt.vllm.identity import RankIdentity
from kvbelt.vllm.pacing import Pacing
from kvbelt.vllm.requests import (
    Effect,
    Incoming,
    Loadable,
    LoadEvent,
    LoadState,
    Outgoing,
    PromptTokens,
    SendEvent,
    with_remaining_time,
)
from kvbelt.vllm.sends import Sends
from kvbelt.vllm.step_messages import Arrived, Claim, Load, ScheduledPrompt, StepCommands, StepReport
from kvbelt.wire.block_hash import block_hashes
from kvbelt.wire.handoff import (
    DecodeHandoff,
    DecodeOutcome,
    Describe,
    HandoffState,
    PrefillHandoff,
    ReceiverAddress,
    Warm,
)
from kvbelt.wire.health import ServerDescription
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.peers import PeerState, PeerStates
from kvbelt.wire.steps import StepsNow

log = logging.getLogger(__name__)

#: How long the scheduler may wait, once a request, for the belt's thread to look for an arrival. The thread needs one
#: turn; if it is busy for longer, the request is loaded beside the batch.
ARRIVAL_WAIT_SECONDS = 2e-3

Answer = BadHandoff | ServerDescription | PeerStates | HandoffState | DecodeOutcome


class SchedulerSide:
    """All requests of one vLLM server that have ``kv_transfer_params``, and with host memory all others.

    Args:
        block_size: tokens in a block.
        describe: makes the server's description from its identity, the last view of each rank's belt, and its steps.
        pacing: of the server's steps.
        clock: seconds, from any origin.
        groups: of the model's layers. If its KV cannot be moved, each prompt is computed where it is.
    """

    def __init__(
        self,
        block_size: int,
        describe: Callable[[RankIdentity | None, Mapping[int, BeltView], StepsNow], ServerDescription],
        pacing: Pacing,
        clock: Callable[[], float],
        groups: Groups = ONE_GROUP,
    ) -> None:
        self._block_size = block_size
        self._groups = groups
        self._describe = describe
        self.pacing = pacing
        self._clock = clock
        self._requests: dict[str, Outgoing | Incoming | Describe | Warm | BadHandoff] = {}
        self._sends = Sends(self._requests, block_size, groups, clock)
        self._loaders: dict[TransferId, Incoming] = {}  # the request of several that loads a transfer
        self._claims: dict[str, Incoming] = {}  # of requests that the worker does not know yet
        self._drops: list[str] = []
        # For the next step, as claims and drops.
        self._loads: list[Load] = []
        self._warms: list[ReceiverAddress] = []
        self._outcomes: list[DecodeOutcome] = []
        self._view = False
        self._server: RankIdentity | None = None
        self._views: dict[int, BeltView] = {}  # the last of each rank
        self._peers: dict[EngineId, str] = {}  # the reason of the last attempt to connect to each
        self.host: HostScheduler | None = None
        self._content_of: Callable[[int], Any] | None = None
        self.ledger: PrefixLedger | None = None  #: from the first request on that loads

    def on_workers_ready(self, server: RankIdentity) -> None:
        """The belts of all ranks run."""
        self._server = server
        if server.host_places:
            self.host = HostScheduler(self._block_size, server.host_places)
            self.pacing.host_kv_tokens = server.host_places * self._block_size

    def watch_prefix_cache(self, content_of: Callable[[int], Any]) -> None:
        """Tell the workers what vLLM's prefix cache holds; ``content_of`` a block is None where nothing is cached."""
        self._content_of = content_of

    @property
    def remembers(self) -> bool:
        """Whether it matters which tokens a request that ends has computed."""
        return self.ledger is not None or self.host is not None

    @property
    def num_requests(self) -> int:
        """Requests that are known here and have not finished."""
        return len(self._requests) + (len(self.host) if self.host is not None else 0)

    def on_new_request(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        num_tokens: int,
        prompt: PromptTokens | None = None,
        *,
        generates: bool = True,
        adapter: str = "",
    ) -> None:
        """A request has come.

        Args:
            request_id: of the request.
            params: its ``kv_transfer_params``.
            num_tokens: of its prompt.
            prompt: None if its KV is not shared.
            generates: it goes on after one token.
            adapter: of ``adapters.adapter_of``.
        """
        if params:
            self._on_params(request_id, params, num_tokens, adapter, generates=generates)
        request = self._requests.get(request_id)
        self.pacing.on_new_request(request_id, num_tokens, loads=isinstance(request, Incoming), generates=generates)
        if prompt is None or (self.host is None and not isinstance(request, Outgoing | Incoming)):
            return
        hashes = block_hashes(prompt.token_ids, self._block_size, prompt.salt)
        if isinstance(request, Outgoing | Incoming):
            request.hashes = hashes
        if self.host is not None:
            self.host.on_new_request(request_id, num_tokens, () if isinstance(request, Incoming) else hashes)

    def _on_params(
        self, request_id: str, params: Mapping[str, Any], num_tokens: int, adapter: str, *, generates: bool
    ) -> None:
        message = parse(params, request_id)
        match message:
            case PrefillHandoff():
                self._requests[request_id] = self._sends.begin(message, num_tokens, generates=generates)
                return
            case DecodeHandoff() if self._groups.problem:
                incoming = Incoming(message, num_tokens, self._clock() + message.deadline_seconds)
                incoming.state, incoming.outcome = LoadState.OVER, "kv_groups"
                self._requests[request_id] = incoming
                return
            case DecodeHandoff():
                if self.ledger is None and self._content_of is not None:
                    self.ledger = PrefixLedger(self._content_of)
                incoming = Incoming(message, num_tokens, self._clock() + message.deadline_seconds)
                if message.adapter != adapter:
                    incoming.useless = "adapter_differs"
                self._requests[request_id] = incoming
                if self._loaders.setdefault(message.transfer_id, incoming) is incoming:
                    self._claims[request_id] = incoming
                else:
                    incoming.state = LoadState.FOLLOWING
                return
            case Describe(itl_seconds):
                self._view = True
                if itl_seconds is not None:
                    self.pacing.level = itl_seconds
            case Warm():
                self._warms += message.receivers
            case BadHandoff():
                log.warning("request %s is computed without a transfer: %s", request_id, message.detail)
        self._requests[request_id] = message

    def _incoming(self, request_id: str) -> Incoming | None:
        request = self._requests.get(request_id)
        return request if isinstance(request, Incoming) else None

    def arrival_wait(self, request_id: str, num_computed_tokens: int) -> float | None:
        """Seconds worth waiting for the belt to say whether the KV has arrived; None: it makes no difference."""
        incoming = self._incoming(request_id)
        if incoming is None or not self._awaited(incoming) or any(load.now for load in self._loads):
            return None
        if incoming.num_tokens - 1 <= num_computed_tokens:
            return None
        seconds, incoming.was_waited_for = (0.0 if incoming.was_waited_for else ARRIVAL_WAIT_SECONDS), True
        return seconds

    def loadable(self, request_id: str, num_computed_tokens: int, arrived: Arrived | None = None) -> Loadable:
        """How many tokens after the computed ones can be loaded. May be asked again; asking changes nothing.

        Args:
            request_id: of the request.
            num_computed_tokens: that vLLM's prefix cache has.
            arrived: KV that the worker has at hand, if ``arrival_wait`` asked for it.
        """
        incoming = self._incoming(request_id)
        if incoming is None:
            host = self.host
            return Loadable(host.loadable_tokens(request_id, num_computed_tokens) if host is not None else 0)
        if incoming.state is LoadState.FOLLOWING and incoming.deadline > self._clock():
            loader = self._loaders.get(incoming.handoff.transfer_id)
            # This request finds in the prefix cache what the other one loads.
            return Loadable(None if loader is not None and loader.state is not LoadState.OVER else 0)
        if not self._awaited(incoming):
            return Loadable(0)
        tokens = max(incoming.num_tokens - 1 - num_computed_tokens, 0)
        incoming.now = (
            tokens > 0
            and arrived is not None
            and arrived.num_tokens in (incoming.num_tokens - 1, incoming.num_tokens)
            and arrived.first_block <= num_computed_tokens // self._block_size
        )
        return Loadable(tokens, incoming.now)

    def _awaited(self, incoming: Incoming) -> bool:
        return incoming.state is LoadState.AWAITED and not incoming.useless and incoming.deadline > self._clock()

    def on_allocated(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_loaded_tokens: int,
        others: Sequence[Sequence[int]] = (),
    ) -> None:
        """The request has its blocks, and those of the other groups; so many tokens are to be loaded into them."""
        if self.ledger is not None:
            self.ledger.taken(block_ids)
        incoming = self._incoming(request_id)
        if incoming is None:
            if self.host is not None:
                self.host.on_allocated(request_id, block_ids, num_loaded_tokens)
            return
        match incoming.on(LoadEvent.LOAD if num_loaded_tokens else LoadEvent.NO_LOAD):
            case Effect.DROP:
                in_time = "cached" if incoming.deadline > self._clock() else "deadline"
                self._conclude(incoming, incoming.useless or in_time)
                self._drop(request_id)
            case Effect.LOAD:
                num_tokens = incoming.num_tokens - 1
                first = (num_tokens - num_loaded_tokens) // self._block_size
                wanted = slice(first, -(-num_tokens // self._block_size))
                of_others = tuple(tuple(each[wanted]) for each in others)
                load = Load(request_id, first, tuple(block_ids[wanted]), num_tokens, incoming.now, of_others)
                self._loads.append(load)

    def _conclude(self, incoming: Incoming, outcome: str) -> None:
        if outcome != incoming.outcome:
            incoming.outcome = outcome
            self._outcomes.append(incoming.told)

    def _drop(self, request_id: str) -> None:
        if self._claims.pop(request_id, None) is None:
            self._drops.append(request_id)

    def take_claims(self) -> StepCommands:
        """The new claims and drops alone, for a worker that can be told before the next step."""
        claims = tuple(
            Claim(request_id, with_remaining_time(incoming.handoff, incoming.deadline, self._clock()))
            for request_id, incoming in self._claims.items()
        )
        commands = StepCommands(claims=claims, drops=tuple(self._drops))
        self._claims.clear()
        self._drops.clear()
        return commands

    @property
    def followed(self) -> Container[str]:
        """Requests that ``take_step`` must be told of also when they are given no blocks."""
        return self._requests if self.host is None else self._requests.keys() | self.host.computing

    def take_step(self, scheduled: Iterable[ScheduledPrompt], preempted: Iterable[str]) -> StepCommands:
        """What the worker must know for the step that has just been scheduled."""
        scheduled, preempted = tuple(scheduled), tuple(preempted)
        stopped = self._sends.stop(preempted)
        sends, written = self._sends.take_step(scheduled)
        held, gone = self._prefix_changes(scheduled)
        host = self.host.take_step(scheduled, preempted) if self.host is not None else HostCommands()
        told = self.take_claims()
        loads, self._loads = self._loads, []
        warms, self._warms = self._warms, []
        view, self._view = self._view, False
        for load in loads:
            if load.now and (incoming := self._incoming(load.request_id)) is not None:
                incoming.on(LoadEvent.ENDED)
                # The request may be answered before the report of this step is heard.
                self._conclude(incoming, "")
        outcomes, self._outcomes = self._outcomes, []
        return StepCommands(
            held=held,
            gone=gone,
            preempted=tuple(dict.fromkeys((*stopped, *host.stopped))),
            sends=sends,
            written=written,
            claims=told.claims,
            loads=tuple(loads),
            drops=told.drops,
            warms=tuple(warms),
            view=view,
            steps=self.pacing.take_report(),
            outcomes=tuple(outcomes),
            copies=host.copies,
            keeps=host.keeps,
        )

    def _prefix_changes(self, scheduled: Iterable[ScheduledPrompt]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        if self.ledger is None:
            return (), ()
        for prompt in scheduled:
            self.ledger.taken(prompt.new_block_ids)
            incoming = self._incoming(prompt.request_id)
            if incoming is not None and incoming.hashes:
                # In a request's first step vLLM has just put what was loaded into its prefix cache.
                self.ledger.holds(incoming.hashes, prompt.new_block_ids)
                incoming.hashes = ()
        return self.ledger.take_changes()

    def on_report(self, report: StepReport, ended_loads: Iterable[str]) -> None:
        """A step's output has come back."""
        self._sends.on_report(report.sent)
        for request_id, reason in report.received.items():
            if (incoming := self._incoming(request_id)) is not None:
                # Ranks report one by one; what one of them lacks, the request lacks.
                self._conclude(incoming, reason or incoming.outcome or "")
            if reason == "prefix_evicted" and self.ledger is not None:
                self.ledger.check_all()
        self._peers.update(report.peers)
        self._views.update(report.views)
        for request_id in ended_loads:
            if (incoming := self._incoming(request_id)) is not None:
                incoming.on(LoadEvent.ENDED)
        if self.host is not None:
            self.host.index.forget(report.spoiled)

    def on_finished(
        self, request_id: str, computed: PromptTokens | None = None, block_ids: Sequence[int] = ()
    ) -> tuple[bool, Answer | None]:
        """The request is over.

        Args:
            request_id: of the request.
            computed: the tokens, of the prompt and of the answer, whose KV lies in ``block_ids``, if it may be shared.
            block_ids: of the request.

        Returns:
            Whether its blocks are still read, and the ``kv_transfer_params`` of its answer.
        """
        self.pacing.on_finished(request_id)
        tokens = computed or PromptTokens(())
        hashes = block_hashes(tokens.token_ids, self._block_size, tokens.salt)
        if self.ledger is not None:
            self.ledger.holds(hashes, block_ids)
        read, loaded_tokens = False, 0
        if self.host is not None:
            read, loaded_tokens = self.host.on_finished(request_id, hashes, len(tokens.token_ids), block_ids)
        match request := self._requests.pop(request_id, None):
            case BadHandoff():
                return read, request
            case Describe():
                return read, self._describe(self._server, self._views, self.pacing.now())
            case Warm():
                reasons = {one.engine_id: self._peers.get(one.engine_id, "not_yet") for one in request.receivers}
                states = [PeerState(name, "failed" if why else "ready", why) for name, why in reasons.items()]
                return read, PeerStates(states)
            case Outgoing(handoff, failure=failure):
                read = request.on(SendEvent.FINISHED) is Effect.HOLD or read
                state: Literal["failed", "open"] = "failed" if failure else "open"
                return read, HandoffState(handoff.transfer_id, state, failure or None, loaded_tokens)
            case Incoming():
                if request.on(LoadEvent.FINISHED) is Effect.DROP:
                    self._drop(request_id)
                if self._loaders.get(request.handoff.transfer_id) is request:
                    del self._loaders[request.handoff.transfer_id]
                return read, request.told
        return read, None
