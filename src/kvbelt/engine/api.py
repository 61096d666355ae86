"""The engine's face: what goes in, what comes out, and the two seams for KV that crosses processes.

Threads: everything here may be called from any thread. Callbacks (``on_output`` and the two seams) run
on the engine's thread and must return quickly, except ``IncomingKV``'s, which run on a loader's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class InvalidRequestError(ValueError):
    """A request that this engine can never serve. ``param`` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(Exception):
    """The model folder cannot be served. The message says why and what to do."""


class IncomingKVLostError(Exception):
    """KV that was to be loaded is gone; the engine computes it itself. ``reason``: low cardinality."""

    def __init__(self, message: str, *, reason: str = "expired_before_load") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Names, defaults and meaning are vLLM's.

    Sampling is stateless: the random draw of output token *i* depends on ``seed`` and *i* alone, never on
    the batch or on earlier draws. Preempting, resuming or moving a request between workers changes nothing.
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
    logprobs: int | None = None  #: how many alternatives to report a token; None: no logprobs
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None  #: None: up to the model's context
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log probability and the alternatives to it, best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]  #: (token id, text, logprob)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a request spent, as measured inside the engine."""

    queue: float  #: from submit to its first scheduled step
    load: float  #: from its admission until its incoming KV was in its blocks, or lost
    prefill: float  #: from its first step to the first token
    computed_tokens: int  #: prompt tokens computed here
    loaded_tokens: int  #: prompt tokens whose KV came from elsewhere
    cached_tokens: int = 0  #: prompt tokens whose KV was here already
    lost: str | None = None  #: why KV that came from elsewhere was not used
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request."""

    request_id: str
    token_ids: tuple[int, ...]
    #: Text that became certain: held back while a character is incomplete or a stop string may be under way.
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  #: the stop token id or string that ended it; None for EOS
    error: str | None = None
    timing: Timing | None = None  #: on the first output and on the last


class BlockHold(Protocol):
    """Blocks of a finished request that are still being read. ``release`` may come from any thread, once."""

    block_ids: tuple[int, ...]

    def release(self) -> None:
        """Give the blocks back to the pool."""


class IncomingKV(Protocol):
    """KV of the first ``num_tokens`` prompt tokens, computed elsewhere; of its blocks from ``first_block`` on.

    The engine calls ``load`` once it has blocks for the request, at most once (after a preemption it computes), and
    ``release`` exactly once, whatever happens. If it does not have the blocks before ``first_block`` by then, it
    computes the prompt. Requests with one prompt may share one; their loads do not overlap.
    """

    num_tokens: int
    first_block: int

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """Put the KV of the prompt's blocks ``first ..`` into these, in order. May take seconds.

        On a thread of its own, beside the engine's.

        Raises:
            IncomingKVLostError: it is no longer there.
        """

    def release(self) -> None:
        """The engine needs it no more. A load under way ends soon, in whatever way; this may wait for it."""


class OutgoingKV(Protocol):
    """Somebody who carries a prompt's KV away while it is computed.

    A request with one holds its blocks until the hold handed to ``finished`` is released, and is never preempted.
    """

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """Blocks ``first .. first+len(block_ids)`` of the request are final in ``layer``.

        Called inside the forward pass, layer after layer, chunk after chunk, each block of each layer once,
        in ascending order; the prompt's last, partly filled block comes with the last chunk. What was in the prefix
        cache comes with the first.
        ``ready`` is None on CPU; on CUDA an event after which the bytes are there.
        """

    def finished(self, hold: BlockHold, *, complete: bool) -> None:
        """The request has ended; ``complete``: every block of every layer was handed over. Called exactly once."""


@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """Names of a prompt's full blocks, under which they are shared: where they are equal, so are the prefixes."""

    root: bytes  #: what the first block's hash is chained to
    hashes: tuple[bytes, ...]  #: of each full block
    #: Hash of the block after one: (that one's hash, the block's token ids). For blocks of the answer.
    extend: Callable[[bytes, Sequence[int]], bytes]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: a client's request with ``n`` choices becomes ``n`` of these."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    on_output: Callable[[Output], None]
    incoming: IncomingKV | None = None
    outgoing: OutgoingKV | None = None
    prefix: PrefixHashes | None = None  #: None: its blocks are shared with nobody


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot, cheap enough for every health check."""

    running: int
    waiting: int  #: those that load included
    loading: int
    blocks_total: int
    blocks_free: int  #: cached ones included
    blocks_cached: int  #: in the prefix cache, in use or not
    preemptions_total: int
    prompt_tokens_total: int  #: computed here
    generated_tokens_total: int
    cache_query_tokens_total: int  #: prompt tokens looked for in the prefix cache
    cache_hit_tokens_total: int  #: found there
    busy_seconds_total: float  #: in steps
    steps_total: int
