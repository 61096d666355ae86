"""What became of each request: the last few, for people (``record_view.py``). None of its text, unless asked for."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from time import monotonic
from typing import Literal

import msgspec

from kvbelt.http import Response
from kvbelt.proxy.trace_context import Trace
from kvbelt.wire.notification import Notification

Leg = Literal["prefill", "decode"]


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One leg, to one worker. A request has one of each kind, or more where workers fail."""

    leg: Leg
    worker: str
    began: float
    transfer_id: str = ""  #: of the KV that this leg sends; empty: it sends none
    answered: float | None = None  #: the head of its answer was there
    ended: float | None = None
    reason: str | None = None  #: why it failed, of ``wire/reasons.py``; None: it did not, or has not ended
    detail: str = ""
    timing: bytes = b""  #: the worker's ``Server-Timing``, unparsed until somebody looks
    transfer: Notification | None = None  #: how the transfer ended, as the prefill worker told
    told: float | None = None  #: ... and when
    span_id: bytes = b""  #: in the request's trace; empty: it has none

    def end(self, reason: str | None = None, detail: str = "") -> None:
        """It is over. The first end counts."""
        if self.ended is None:
            self.ended = monotonic()
            self.reason, self.detail = reason, detail

    def tell(self, transfer: Notification, now: float) -> None:
        """The prefill worker has said how its transfer ended."""
        self.transfer, self.told = transfer, now


class Record(msgspec.Struct, array_like=True, gc=False):
    """One request. Moments are ``time.monotonic()``; None: has not happened."""

    request_id: str
    route: str  #: ``/v1/completions`` or ``/v1/chat/completions``
    began: float
    unix_time: float
    stream: bool = False
    path: str = ""  #: the road taken, as in ``x-kvbelt-path``
    reason: str | None = None
    after: tuple[str, ...] = ()  #: why attempts failed that were made again elsewhere
    attempts: list[Attempt] = []  #: every one, in order
    prefill_worker: str | None = None
    decode_worker: str | None = None
    prefill_sent: float | None = None
    prefill_answered: float | None = None
    decode_sent: float | None = None
    decode_answered: float | None = None  #: its headers are there: the KV's fate is known
    first_token: float | None = None  #: handed to the client's socket
    decode_first: float | None = None  #: the decode worker's first bytes
    streaming: Response | None = None  #: the worker's answer, while it is handed on; not when the request has ended
    streamed: int = 0  #: pieces that it had in the end
    ended: float | None = None
    status: int = 0
    kv: str | None = None  #: ``x-kvbelt-kv``
    errors: tuple[str, ...] = ()
    prompt: str | None = None  #: its beginning, as JSON, where prompts are recorded
    number: int = 0  #: in the order in which requests have ended; 0: it has not
    trace: Trace | None = None  #: None: nobody asked for one

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the client had it, or could have had it; None: not yet, or an answer in one piece hides it."""
        moment = self.first_token
        if moment is not None and not self.stream and self.path != "prefill-only":
            moment = self.prefill_answered if self.path == "first-token" else None
        return None if moment is None else moment - self.began

    @property
    def pieces(self) -> int:
        """Of the worker's stream so far, by its own framing: about one a token, and one for its end."""
        return self.streamed if self.streaming is None else self.streaming.pieces

    @property
    def gaps(self) -> int:
        """How many times a next token came behind one that the client had; 0: none did, or it was not streamed."""
        if self.first_token is None or self.decode_first is None:
            return 0
        # The prefill worker's token stands before the stream, else the stream's first piece is the first token.
        others = 1 if self.first_token < self.decode_first else 0
        return max(0, self.pieces - 2 + others)

    @property
    def between_tokens(self) -> float | None:
        """Seconds from one token to the next, on average, as the client had them. None: not streamed, or one token."""
        if self.ended is None or self.first_token is None:
            return None
        gaps = self.gaps
        return (self.ended - self.first_token) / gaps if gaps else None


#: Records that are packed together, as requests are counted together (metrics.py), and for the same reason.
_BATCH = 64

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def _names(transfer_id: str) -> tuple[str, ...]:
    """What an attempt may call this transfer. A prompt's own suffix, where a request has several, does not matter."""
    stem = transfer_id.rpartition(".")[0]
    return (transfer_id, stem) if stem else (transfer_id,)


class Records:
    """The requests under way, and the last ``kept`` that have ended.

    Those are kept as one string of bytes each: a thousand of them are twenty thousand objects otherwise, which the
    core's cache cannot hold beside the requests (``benchmarks.proxy_overhead``). They are packed many at a time, or
    when somebody looks, who pays for the look.
    """

    def __init__(self, kept: int, clock: Callable[[], float] = monotonic) -> None:
        self.most = kept
        self.open: dict[str, Record] = {}  #: under way, by request id, in the order in which they came
        self.ended_count = 0  #: since the start
        self.clock = clock
        self._fresh: list[Record] = []  # have just ended, the last one last
        self._ended: deque[bytes] = deque(maxlen=kept)  # all the others
        self._sent: dict[str, Attempt] = {}  # of requests that are not packed, by transfer id
        self._late: deque[tuple[Notification, float]] = deque(maxlen=kept)  # told when the request had ended, and when

    def add(self, record: Record) -> None:
        """A request has come. Nobody else's that is under way has its id."""
        self.open[record.request_id] = record

    def attempt(self, record: Record, leg: Leg, worker: str, transfer_id: str = "") -> Attempt:
        """A leg begins now."""
        attempt = Attempt(leg, worker, self.clock(), transfer_id)
        record.attempts.append(attempt)
        if transfer_id:
            self._sent[transfer_id] = attempt
        return attempt

    def tell(self, transfer: Notification) -> None:
        """A transfer has ended."""
        for name in _names(transfer.transfer_id):
            if (attempt := self._sent.get(name)) is not None:
                attempt.tell(transfer, self.clock())
                return
        self._late.append((transfer, self.clock()))

    def end(self, record: Record) -> None:
        """Its answer is complete, or its client is gone. Nothing is changed in it any more."""
        del self.open[record.request_id]
        record.ended = self.clock()
        self.ended_count += 1
        record.number = self.ended_count
        self._fresh.append(record)
        if len(self._fresh) == _BATCH:
            self._pack()

    def _pack(self) -> None:
        for record in self._fresh:
            for attempt in record.attempts:
                self._sent.pop(attempt.transfer_id, None)
        self._ended.extend(map(_encode, self._fresh))
        self._fresh.clear()

    def get(self, request_id: str) -> Record | None:
        """The newest record of this id."""
        return next((record for record in self.newest() if record.request_id == request_id), None)

    def newest(self) -> Iterator[Record]:
        """All of them: those under way, the latest first, then those that have ended, the last one first."""
        return chain(reversed(self.open.values()), self.newest_ended())

    def newest_ended(self) -> Iterator[Record]:
        """Those that have ended, the last one first. Copies."""
        self._pack()
        late = {name: told for told in self._late for name in _names(told[0].transfer_id)}
        for packed in reversed(self._ended):
            record = _decode(packed)
            if late:
                for attempt in record.attempts:
                    if attempt.transfer_id in late:
                        attempt.tell(*late[attempt.transfer_id])
            yield record

    def reach(self, number: int) -> float | None:
        """When the first of the last ``number`` that have ended did so. None: there were never more than these."""
        self._pack()
        number = min(number, self.most)
        return _decode(self._ended[-number]).ended if self.ended_count > number else None

    def __len__(self) -> int:
        """How many are kept that have ended."""
        self._pack()
        return len(self._ended)
