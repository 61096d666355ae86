"""The record of each request: those under way and the last ones. ``record_view.py`` makes them messages.

A record holds no text of its request, unless the settings ask for the beginning of its prompt.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from time import monotonic
from typing import Literal

import msgspec

from kvbelt.http import Response
from kvbelt.proxy.observe.trace_context import Trace
from kvbelt.routing.levels import kept
from kvbelt.wire.handoff import DecodeOutcome
from kvbelt.wire.notification import TransferEnd
from kvbelt.wire.replay import EndedRequest

Leg = Literal["prefill", "decode"]


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One leg, to one worker. A request has at most one of each kind, or more where workers fail."""

    leg: Leg
    worker: str
    began: float
    transfer_id: str = ""  #: of the KV that this leg sends; empty: it sends none
    answered: float | None = None  #: the head of its answer has come
    ended: float | None = None
    reason: str | None = None  #: why it failed, of ``wire/reasons.py``; None: it did not, or has not ended
    detail: str = ""
    timing: bytes = b""  #: the worker's ``Server-Timing``, parsed only when the record is read
    transfer: TransferEnd | None = None  #: how the transfer ended, as the prefill worker reported
    transfer_at: float | None = None  #: when that was reported
    span_id: bytes = b""  #: in the request's trace; empty: there is none
    kv: str | None = None  #: what became of the KV, as a vLLM decode server reported, in the words of ``x-kvbelt-kv``

    def end(self, reason: str | None = None, detail: str = "") -> None:
        """The leg is over. Only the first call counts."""
        if self.ended is None:
            self.ended = monotonic()
            self.reason, self.detail = reason, detail


class Record(msgspec.Struct, array_like=True, gc=False):
    """One request. Moments are ``time.monotonic()``; None: has not happened."""

    request_id: str
    route: str  #: ``/v1/completions`` or ``/v1/chat/completions``
    began: float
    unix_time: float
    stream: bool = False
    path: str = ""  #: as in ``x-kvbelt-path``
    reason: str | None = None
    after: tuple[str, ...] = ()  #: why earlier attempts failed
    attempts: list[Attempt] = []  #: every one, in order
    prefill_worker: str | None = None
    decode_worker: str | None = None
    prefill_sent: float | None = None
    prefill_answered: float | None = None
    decode_sent: float | None = None
    decode_answered: float | None = None  #: its headers have come, which tell what became of the KV
    #: The answer's first bytes were handed to the client's socket. Without a stream these are all of its bytes:
    #: ``time_to_first_token`` is what is shown.
    first_token: float | None = None
    decode_first: float | None = None  #: the decode worker's first bytes
    streaming: Response | None = None  #: the worker's answer, while it is relayed
    streamed: int = 0  #: its pieces, once it has ended
    ended: float | None = None
    status: int = 0
    kv: str | None = None  #: ``x-kvbelt-kv``, or what a vLLM server has said instead
    errors: tuple[str, ...] = ()
    prompt: str | None = None  #: its beginning, as JSON, where prompts are recorded
    number: int = 0  #: in the order in which requests have ended; 0: it has not
    trace: Trace | None = None  #: None: there is none
    action: str = ""  #: of its latest place, ``split`` or ``whole``; empty: it has had none
    placed_because: str = ""  #: of ``wire/reasons.py``
    waited: float = 0.0  #: seconds for its places
    predicted: float | None = None  #: when its first token was expected, at its latest placing
    ttft_level: float = 0.0  #: seconds
    itl_level: float | None = None  #: seconds
    tpot_level: float | None = None  #: seconds
    prompt_tokens: int = 0  #: as it was placed
    held_tokens: int = 0  #: of them, that its worker should have held
    output_tokens: int = 0  #: about
    splittable: bool = True

    @property
    def prediction_error(self) -> float | None:
        """Seconds by which its first token was expected too late. None: not known, or a worker failed it."""
        seconds = self.time_to_first_token
        if seconds is None or self.predicted is None or self.after:
            return None
        return self.predicted - self.began - seconds

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the client got it, or could have got it; None: not yet, or an answer in one piece hides it."""
        moment = self.first_token
        if moment is not None and not self.stream and self.path != "prefill-only":
            moment = self.prefill_answered if self.path == "first-token" else None
        return None if moment is None else moment - self.began

    @property
    def pieces(self) -> int:
        """Pieces of the worker's stream so far, by its own framing: about one a token, and one for its end."""
        return self.streamed if self.streaming is None else self.streaming.pieces

    @property
    def gaps(self) -> int:
        """How many tokens the client got after its first; 0: none, or the answer was not streamed."""
        if self.first_token is None or self.decode_first is None:
            return 0
        # The prefill worker's token comes before the stream, or the stream's first piece is the first token.
        others = 1 if self.first_token < self.decode_first else 0
        return max(0, self.pieces - 2 + others)

    @property
    def between_tokens(self) -> float | None:
        """Seconds between two tokens, on average, as the client got them. None: not streamed, or one token."""
        if self.ended is None or self.first_token is None:
            return None
        gaps = self.gaps
        return (self.ended - self.first_token) / gaps if gaps else None

    @property
    def between_tokens_level(self) -> float | None:
        """Seconds, on average."""
        return self.itl_level if self.tpot_level is None else self.tpot_level

    def for_replay(self) -> EndedRequest:
        split, pause, within = self.action == "split", None, None
        gaps, first, ended = self.gaps, self.first_token, self.ended
        if self.stream and first is not None and ended is not None:
            if split and self.path == "first-token" and self.decode_first is not None:
                pause = self.decode_first - first
            mean = (ended - first) / gaps if gaps else None
            within = kept(self.ttft_level, self.between_tokens_level, first - self.began, mean, pause or 0.0)
        return EndedRequest(
            self.began,
            self.prompt_tokens,
            self.held_tokens,
            gaps + 1 if gaps else self.output_tokens,
            self.splittable,
            self.ttft_level,
            self.itl_level,
            self.tpot_level,
            split,
            pause,
            within,
        )


_BATCH = 64  #: records that are packed together, for the reason for which metrics.py counts requests together

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def _names(transfer_id: str) -> tuple[str, ...]:
    """The attempt's possible names of this transfer: with and without the suffix of one of several prompts."""
    stem = transfer_id.rpartition(".")[0]
    return (transfer_id, stem) if stem else (transfer_id,)


class Records:
    """The requests under way, and the last ``kept`` that have ended.

    Each ended record is kept as one string of bytes. A thousand of them would be twenty thousand objects, which the
    core's cache cannot hold beside the requests (``benchmarks.proxy_overhead``). They are packed many at a time, or
    when they are read.
    """

    def __init__(self, kept: int, clock: Callable[[], float] = monotonic) -> None:
        self.most = kept
        self.open: dict[str, Record] = {}  #: under way, by request id, in the order of their arrival
        self.ended_count = 0  #: since the start
        self.clock = clock
        self._fresh: list[Record] = []  # ended, but not packed yet, the last one last
        self._ended: deque[bytes] = deque(maxlen=kept)  # all the others
        self._sent: dict[str, Attempt] = {}  # of records that are not packed yet, by transfer id
        # Reported after the request had ended, and when.
        self._late: deque[tuple[TransferEnd, float]] = deque(maxlen=kept)
        self._late_kv: deque[tuple[str, str]] = deque(maxlen=kept)  # transfer id, and what was reported

    def add(self, record: Record) -> None:
        """A request has come. No other one under way has its id."""
        self.open[record.request_id] = record

    def attempt(self, record: Record, leg: Leg, worker: str, transfer_id: str = "") -> Attempt:
        attempt = Attempt(leg, worker, self.clock(), transfer_id)
        record.attempts.append(attempt)
        if transfer_id:
            self._sent[transfer_id] = attempt
        return attempt

    def on_notification(self, transfer: TransferEnd) -> None:
        now = self.clock()
        for name in _names(transfer.transfer_id):
            if (attempt := self._sent.get(name)) is not None:
                attempt.transfer, attempt.transfer_at = transfer, now
                return
        self._late.append((transfer, now))

    def on_outcome(self, outcome: DecodeOutcome) -> None:
        """A vLLM decode server has told what became of a transfer's KV."""
        if (text := outcome.text) is None:
            return
        for name in _names(outcome.transfer_id):
            if (attempt := self._sent.get(name)) is not None:
                attempt.kv = text
                return
        self._late_kv.append((outcome.transfer_id, text))

    def end(self, record: Record) -> None:
        """Its answer is complete, or its client is gone. The record must not change after this."""
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
        return next((record for record in self.newest() if record.request_id == request_id), None)

    def newest(self) -> Iterator[Record]:
        """Those under way, the latest first, then copies of those that have ended, the last one first."""
        return chain(reversed(self.open.values()), self.newest_ended())

    def newest_ended(self) -> Iterator[Record]:
        """Copies of those that have ended, the last one first."""
        self._pack()
        late = {name: entry for entry in self._late for name in _names(entry[0].transfer_id)}
        late_kv = {name: text for transfer_id, text in self._late_kv for name in _names(transfer_id)}
        for packed in reversed(self._ended):
            record = _decode(packed)
            if late or late_kv:
                for attempt in record.attempts:
                    if attempt.transfer_id in late:
                        attempt.transfer, attempt.transfer_at = late[attempt.transfer_id]
                    attempt.kv = late_kv.get(attempt.transfer_id, attempt.kv)
            yield record

    def reach(self, number: int) -> float | None:
        """When the first of the last ``number`` ended records ended. None: there were never more."""
        self._pack()
        number = min(number, self.most)
        return _decode(self._ended[-number]).ended if self.ended_count > number else None

    def __len__(self) -> int:
        self._pack()
        return len(self._ended)
