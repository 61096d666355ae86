"""The words of the plan (``plan.py``): states, outcomes and steps. Their values appear in ``docs/failures.md``."""

# ruff: noqa: S105 - these tokens are no passwords

from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    CHOOSING = "choosing workers"
    PREFILL_ONLY = "prefill-only answer"
    PREFILL = "prefill"
    PREFILL_AGAIN = "prefill again, with a first token in hand"
    TOKEN = "first token"
    TOKEN_WITHOUT_KV = "first token, without KV"
    CONTINUING = "continuing the stream"
    CONTINUING_WITHOUT_KV = "continuing the stream, without KV"
    MERGING = "continuing a whole answer"
    MERGING_WITHOUT_KV = "continuing a whole answer, without KV"
    REDERIVING = "re-deriving"
    LOCAL = "local"
    RELAYING = "relaying a stream"
    ENDING = "ending"
    OVER = "over"


class Outcome(StrEnum):
    SPLIT = "placed on a prefill and a decode worker"
    UNSPLIT = "placed on one worker"
    ONE_TOKEN = "placed on a prefill worker, for one token"
    NO_WORKER = "no worker is left"
    ATTEMPTS_USED = "all decode attempts are used"
    LAST_WORDS = "no worker is left, the last one answered 5xx"
    QUEUE_FULL = "too many requests wait"
    OVERLOADED = "no worker was free in time"
    FIRST_TOKEN = "first token"
    LAST_TOKEN = "first token, which ends the answer"
    UNFIT = "first token the client cannot use"
    KV_FAILED = "transfer failed"
    KV_HOPELESS = "transfer failed, and would again"
    TOKEN_KV_FAILED = "first token, transfer failed"
    TOKEN_KV_HOPELESS = "first token, transfer failed and would again"
    PREFILL_FAILED = "prefill worker failed"
    STALE = "stale connection"
    SENT = "first token sent"
    KEPT = "first token kept"
    STREAM = "a stream begins"
    WHOLE = "a whole answer"
    REFUSED = "refused"
    DECODE_FAILED = "decode worker failed"
    DECODE_5XX = "decode worker answered 5xx"
    KV_LOST = "KV lost while it was awaited"
    DONE = "done"
    STREAM_LOST = "stream lost"
    BAD_ANSWER = "not a completion"
    DEADLINE = "deadline"
    RECEIVER_FULL = "deadline, the receive buffer was full"
    CLIENT_GONE = "client gone"
    FAULT = "fault of the proxy"


class Do(StrEnum):
    PLACE = "await a place"
    CALL_PREFILL = "call the prefill worker"
    CALL_DECODE = "call the decode worker"
    SEND_FIRST_TOKEN = "send the first token"
    FINISH = "answer with the first token alone"
    RELAY_STREAM = "relay the stream"
    REPLY_MERGED = "reply with the merged answer"
    PASS_ON = "pass on the worker's answer"
    REPLY_ERROR = "reply with an error"
    BREAK_STREAM = "end the stream with an error event"
    STOP = "stop"


_LIMITED = frozenset({Do.PLACE, Do.CALL_PREFILL, Do.CALL_DECODE})


@dataclass(frozen=True, slots=True)
class Step:
    do: Do
    kv: bool = False  #: a prefill call sends KV; a decode call reads KV
    continues: bool = False  #: the decode call goes on after the first token, else it answers the client's own request
    again: bool = False  #: the same attempt on the same worker
    reason: str = ""  #: of the error; empty in BREAK_STREAM: the worker's own error is passed on
    status: int = 0
    kind: str = ""  #: OpenAI's error type
    limited: bool = field(init=False)  #: it counts as an attempt, or prepares one

    def __post_init__(self) -> None:
        object.__setattr__(self, "limited", self.do in _LIMITED and not self.again)


@dataclass(frozen=True, slots=True)
class Move:
    """A row's right side."""

    state: State
    step: Step
    path: str | None = None  #: ``x-kvbelt-path`` from now on; None: as before


@dataclass(frozen=True, slots=True)
class Result:
    """An outcome with what is known about it."""

    outcome: Outcome
    reason: str | None = None  #: of ``wire/reasons.py``
    detail: str = ""  #: for people
    incarnation: str = ""  #: of the worker that failed


class UnplannedError(Exception):
    """The table has no row for this outcome in this state: a fault of the proxy."""
