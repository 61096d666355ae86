"""``/kvbelt/requests``: what became of a request at the proxy.

Moments and durations that end in ``_ms`` are in milliseconds; moments count from the request's arrival. None: it has
not happened, or is not known.
"""

import msgspec

from kvbelt.wire.json_body import JsonMessage


class Decision(msgspec.Struct, frozen=True):
    path: str  #: as in ``x-kvbelt-path``; empty: not chosen yet
    reason: str | None  #: of ``wire/reasons.py``
    meaning: str | None  #: of the reason, in words


class Placing(msgspec.Struct, frozen=True, kw_only=True):
    """Where the proxy has placed the request, the last time."""

    action: str  #: ``split`` or ``whole``
    reason: str | None  #: of ``wire/reasons.py``
    meaning: str | None  #: of the reason, in words
    waited_ms: float  #: for all its places
    predicted_first_token_ms: float | None
    ttft_level_ms: float
    between_tokens_level_ms: float | None  #: on average; None: none


class WorkerNames(msgspec.Struct, frozen=True):
    """``host:port`` of each."""

    prefill: str | None
    decode: str | None


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of each part. Those of workers are as they report them."""

    proxy: float | None  #: until the first request to a worker was sent
    queue: float | None  #: before the prompt's computation
    prefill: float | None  #: on the worker that computed the prompt
    prefill_leg: float | None  #: from the request to the prefill worker to its answer
    kv_wait: float | None  #: on the decode worker: waiting for the commit
    load: float | None  #: on the decode worker: scattering the slot into its blocks
    decode_queue: float | None
    decode_headers: float | None  #: from the request to the decode worker to its headers
    first_decode_step: float | None
    first_token: float | None  #: to the client's socket; not streamed: until the proxy had it, if it came by itself
    between_tokens: float | None  #: on average
    total: float | None  #: until the whole answer was handed over


class _Transfer(msgspec.Struct, frozen=True, kw_only=True, tag_field="state"):
    """A transfer that has ended, as the prefill worker reported it."""

    bytes: int
    seconds: float  #: from the first write posted to the last one completed
    milliseconds: float  #: the same
    gb_per_second: float | None
    #: The channel's, as ``"cma/memory"``; None: not known. Told of a single request only.
    transport: str | msgspec.UnsetType | None = msgspec.UNSET


class DoneTransfer(_Transfer, frozen=True, kw_only=True, tag="done"):
    """``"state": "done"``: the decode worker has acknowledged the commit."""

    channel: str
    tokens: int
    writes: int
    exposed_ms: float  #: from the end of the prompt's computation to the acknowledged commit

    @property
    def overlapped_ms(self) -> float:
        """The part that ran beside the prompt's computation."""
        return max(0.0, self.milliseconds - self.exposed_ms)


class FailedTransfer(_Transfer, frozen=True, kw_only=True, tag="failed"):
    reason: str  #: of ``wire/reasons.py``


Transfer = DoneTransfer | FailedTransfer


class RequestSpan(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    start_ms: float
    duration_ms: float
    worker: str | None
    failed: str | None  #: why it failed


class RequestAttempt(msgspec.Struct, frozen=True, kw_only=True):
    leg: str  #: ``prefill`` or ``decode``
    worker: str
    transfer_id: str | None  #: of the KV that this leg sends; None: it sends none
    began_ms: float
    answered_ms: float | None
    ended_ms: float | None
    reason: str | None  #: why it failed, of ``wire/reasons.py``
    detail: str
    transfer: Transfer | None


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    route: str  #: ``/v1/completions`` or ``/v1/chat/completions``
    time: float  #: of its arrival, in seconds since the epoch
    stream: bool
    status: int  #: of the answer; 0: under way
    ended: bool
    decision: Decision
    after: tuple[str, ...]  #: why earlier attempts failed
    workers: WorkerNames
    transfer_id: str | None  #: of the latest leg that sends KV
    kv: str | None  #: ``x-kvbelt-kv``
    timings_ms: Timings
    tokens: int | None  #: of a streamed answer, about
    transfer: Transfer | None  #: of the latest leg that sends KV
    spans: tuple[RequestSpan, ...]
    attempts: tuple[RequestAttempt, ...]  #: every one, in order
    errors: tuple[str, ...]
    prompt: str | None  #: its beginning, as JSON, where prompts are recorded
    placing: Placing | None = None  #: None: it has no place yet

    @property
    def complete(self) -> bool:
        """Whether the answer and its transfer, if it had one, have ended."""
        return self.ended and (self.transfer is not None or self.transfer_id is None)

    @property
    def over_belt(self) -> bool:
        """Whether the KV crossed and was used."""
        return isinstance(self.transfer, DoneTransfer) and self.decision.path != "local"


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /kvbelt/requests``: the newest first."""

    requests: list[RequestRecord]
    kept: int  #: ended requests that the proxy keeps


REQUEST_RECORD = JsonMessage(RequestRecord, "the request's record")
REQUEST_LIST = JsonMessage(RequestList, "/kvbelt/requests")
