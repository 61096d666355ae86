"""The engine's interface: requests, outputs, and two Protocols for KV that crosses processes.

Threads: everything here may be called from any thread. Callbacks run on the engine's thread and must return quickly;
those of ``IncomingKV`` run on a loader's thread.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from kvbelt.pacing.costs import StepCosts


class InvalidRequestError(ValueError):
    """This engine can never serve the request. ``param`` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(Exception):
    """The model folder cannot be served. The message says why and what to do."""


class IncomingKVLostError(Exception):
    """KV that was to be loaded is gone, so the engine computes it. ``reason`` has low cardinality."""

    def __init__(self, message: str, *, reason: str = "expired_before_load") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Names, defaults and meaning are vLLM's.

    Sampling is stateless: the draw of output token *i* depends on ``seed`` and *i* alone, never on the batch or on
    earlier draws. Preempting or resuming a request, or moving it to another worker, changes no token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  #: 0 or -1: off
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None  #: no others are generated
    bad_words: tuple[tuple[int, ...], ...] = ()  #: token sequences that the answer does not contain
    logprobs: int | None = None  #: how many alternatives to report a token; None: no logprobs
    prompt_logprobs: int | None = None  #: likewise for the prompt's tokens, which are then all computed here
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None  #: None: up to the model's context
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    token: str  #: its text, or "bytes:" and its bytes in hexadecimal
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    token: str
    data: bytes | None  #: its part of the answer's text as bytes; None: it is hidden
    offset: int  #: where it begins in the answer's text, in characters
    logprob: float | None  #: None: nothing is before the token
    top: tuple[TopLogprob, ...]  #: alternatives, best first


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request spent its time, in seconds, and where its KV came from."""

    queue: float  #: from submit to its first scheduled step
    load: float  #: from its admission until its incoming KV was loaded or lost
    prefill: float  #: from its first step to the first token
    computed_tokens: int  #: prompt tokens computed here
    loaded_tokens: int  #: prompt tokens whose KV was loaded from another process
    cached_tokens: int = 0  #: prompt tokens found in the prefix cache
    lost: str | None = None  #: why incoming KV was not used
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one request."""

    request_id: str
    token_ids: tuple[int, ...]
    #: Text that cannot change any more. An incomplete character, or half a stop string, is held back.
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  #: the stop token id or stop string; None for EOS
    error: str | None = None
    timing: Timing | None = None  #: on the first output and on the last
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  #: on the first output, if they were asked for


class AnswerGrammar(Protocol):
    """Which tokens an answer may have, as it grows. Engine's thread."""

    def restrict(self, logits: Any) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place on one row."""

    def accept(self, token_id: int) -> None:
        """It has been generated."""


class BlockHold(Protocol):
    """Blocks of a finished request that are still being read."""

    block_ids: tuple[int, ...]

    def release(self) -> None:
        """Give the blocks back to the pool. Any thread, once."""


class IncomingKV(Protocol):
    """KV of the first ``num_tokens`` prompt tokens, computed in another process; blocks from ``first_block`` on.

    The engine calls ``load`` when it has blocks for the request, and at most once: after a preemption it computes.
    It calls ``release`` exactly once, whatever happens. If its prefix cache lacks the blocks before ``first_block`` by
    then, it computes the prompt. Requests with the same prompt may share one; their loads do not overlap.
    """

    num_tokens: int
    first_block: int

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """Put the KV of the prompt's blocks, from ``first`` on, into these. On a loader's thread; may take seconds.

        Raises:
            IncomingKVLostError: the KV is gone.
        """

    def release(self) -> None:
        """The engine needs the KV no more. A load under way ends soon, well or not; this may wait for it."""


class OutgoingKV(Protocol):
    """A consumer, which reads a prompt's KV while it is computed.

    A request with a consumer is never preempted, and holds its blocks until the hold given to ``finished`` is released.
    """

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """Blocks ``first .. first+len(block_ids)`` of the request are final in ``layer``.

        Called inside the forward pass, once for each block of each layer, in ascending order. Blocks from the prefix
        cache come with the first chunk; the prompt's last, partly filled block comes with the last chunk. ``ready`` is
        None on CPU; on CUDA it is an event after which the bytes are there.
        """

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """The request has ended. ``complete``: every block of every layer was announced. Called exactly once."""


@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """Hashes of a prompt's full blocks. Two blocks with one hash have the same tokens, and the same tokens before."""

    root: bytes  #: the first block's hash is chained to it
    hashes: tuple[bytes, ...]  #: of each full block
    #: (hash of a block, token ids of the next block) to the next block's hash; for blocks of the answer.
    extend: Callable[[bytes, Sequence[int]], bytes]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. A client's request with ``n`` choices becomes ``n`` of these."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    on_output: Callable[[Output], None]
    incoming: IncomingKV | None = None
    outgoing: OutgoingKV | None = None
    prefix: PrefixHashes | None = None  #: None: its blocks are not shared
    grammar: AnswerGrammar | None = None  #: None: any tokens
    itl_seconds: float | None = None  #: that its tokens should not be apart by more; None: the engine's setting
    turn: int = 0  #: of a client's request with many sequences; in later turns, requests that come later go first


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot, cheap enough for every health check."""

    running: int
    waiting: int  #: includes ``loading``
    loading: int
    blocks_total: int
    blocks_free: int  #: includes cached blocks that are not in use
    blocks_cached: int  #: in the prefix cache, in use or not
    preemptions_total: int
    prompt_tokens_total: int  #: computed here
    generated_tokens_total: int
    cache_query_tokens_total: int  #: prompt tokens looked up in the prefix cache
    cache_hit_tokens_total: int  #: prompt tokens found there
    busy_seconds_total: float  #: in steps
    steps_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSteps:
    """What the engine's steps cost, and what they have to do now."""

    costs: StepCosts
    prompt_tokens: int  #: of accepted prompts, not computed yet, neither cached nor loaded from elsewhere
    decodes: int  #: running requests that generate
    kv_tokens: int  #: tokens of KV that those read in a step
    most_prompt_tokens: int  #: in one step, when no decode is running
    most_requests: int  #: that run at once
    most_kv_tokens: int  #: that fit the KV memory
