"""What to think of what a client was given. Pure.

Right is what the aggregated server answers, token for token. An error that says that it is one is honest, unless it
says that kvbelt itself has a defect (500, ``internal_error``); and so is a connection that ends while nobody listens
because the proxy itself is being started again. Everything else is a failure of the deployment.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.ops.chaos.reading import Answer, MalformedError, read_error, read_stream, read_whole


class Ending(StrEnum):
    """How a request ended, as its client saw it."""

    COMPLETE = "complete"  #: the whole of an HTTP answer came
    REFUSED = "refused"  #: no connection
    CLOSED = "closed"  #: the connection ended before an answer was complete
    SILENT = "silent"  #: no end within the deadline and two seconds
    LEFT = "left"  #: the client itself hung up


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that a client saw of one request. Moments are seconds of one clock."""

    request_id: str
    question: int
    stream: bool
    deadline: float
    began: float
    ended: float
    ending: Ending
    status: int = 0
    body: bytes = b""
    path: str = ""  #: ``x-kvbelt-path``
    first_token: float | None = None
    detail: str = ""  #: of a connection that ended


class Word(StrEnum):
    """The verdict in one word."""

    RIGHT = "right"
    ERROR = "honest error"
    LEFT = "client left"
    WRONG = "wrong answer"
    HANG = "hang"
    TRUNCATED = "silent truncation"
    DROPPED = "dropped connection"
    MALFORMED = "malformed answer"
    REFUSED = "refused although it is served"
    INTERNAL = "internal error"


FAILURES = (Word.WRONG, Word.HANG, Word.TRUNCATED, Word.DROPPED, Word.MALFORMED, Word.REFUSED, Word.INTERNAL)

#: The type of an error that no fault of anybody else's explains.
_INTERNAL = "internal_error"

#: Statuses below 500 that speak of the moment and not of the request.
_PASSING = (408, 429)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason``: of an honest error, in few words; of a failure, what was wrong."""

    word: Word
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the deployment did what it must never do."""
        return self.word in FAILURES


def judge(seen: Seen, right: Answer, *, proxy_away: bool) -> Verdict:
    """``proxy_away``: whether the proxy was being started again at some moment of the request."""
    if seen.ending is Ending.SILENT:
        return Verdict(Word.HANG, f"no end within {seen.deadline:g} s and two more")
    try:
        if seen.ending is Ending.COMPLETE and seen.status != 200:
            return _error(seen)
        if seen.stream and seen.status == 200:
            return _stream(seen, right, proxy_away=proxy_away)
        if seen.ending is not Ending.COMPLETE:
            return _broken(seen, proxy_away=proxy_away)
        return _compare(read_whole(seen.body), right)
    except MalformedError as error:
        return Verdict(Word.MALFORMED, str(error))


def _error(seen: Seen) -> Verdict:
    reason = f"{seen.status} {read_error(seen.body)}"
    if 400 <= seen.status < 500 and seen.status not in _PASSING:
        return Verdict(Word.REFUSED, f"{reason}: {seen.body[:300]!r}")
    if seen.status < 400:
        return Verdict(Word.MALFORMED, f"status {seen.status}")
    return Verdict(Word.INTERNAL if _INTERNAL in reason else Word.ERROR, reason)


def _broken(seen: Seen, *, proxy_away: bool) -> Verdict:
    if seen.ending is Ending.LEFT:
        return Verdict(Word.LEFT)
    if proxy_away:
        return Verdict(Word.ERROR, "the proxy is being started again")
    return Verdict(Word.DROPPED, f"{seen.ending}: {seen.detail}")


def _stream(seen: Seen, right: Answer, *, proxy_away: bool) -> Verdict:
    told = read_stream(seen.body)
    given = told.answer()
    if not _begins(given, right):
        return Verdict(Word.WRONG, difference(given, right))
    if told.error is not None:
        return Verdict(Word.INTERNAL if _INTERNAL in told.error else Word.ERROR, f"in the stream: {told.error}")
    if seen.ending is not Ending.COMPLETE:
        return _broken(seen, proxy_away=proxy_away)
    if not told.done or None in given.finish_reasons or len(given.texts) < len(right.texts):
        return Verdict(Word.TRUNCATED, "a choice without its end" if told.done else "no [DONE]")
    return _compare(given, right)


def _begins(given: Answer, right: Answer) -> bool:
    """Whether what came so far is how the right answer begins."""
    return len(given.token_ids) <= len(right.token_ids) and all(
        ids == whole[: len(ids)] for ids, whole in zip(given.token_ids, right.token_ids, strict=False)
    )


def _compare(given: Answer, right: Answer) -> Verdict:
    return Verdict(Word.RIGHT) if given == right else Verdict(Word.WRONG, difference(given, right))


def difference(given: Answer, right: Answer) -> str:
    """Where two answers begin to differ, for people."""
    for choice, (ids, whole) in enumerate(zip(given.token_ids, right.token_ids, strict=False)):
        for place, (token, wanted) in enumerate(zip(ids, whole, strict=False)):
            if token != wanted:
                return f"choice {choice}, token {place}: {token} instead of {wanted}"
        if len(ids) != len(whole):
            return f"choice {choice}: {len(ids)} tokens instead of {len(whole)}"
    for name in ("texts", "finish_reasons", "usage"):
        here, there = getattr(given, name), getattr(right, name)
        if here != there:
            return f"{name}: {here!r} instead of {there!r}"
    return f"{len(given.texts)} choices instead of {len(right.texts)}"
