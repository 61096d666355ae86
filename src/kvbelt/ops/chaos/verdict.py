"""Judges what a client got. Pure.

A right answer equals the aggregated server's, token for token. An explicit error is honest, unless it is internal
(500, ``internal_error``). A connection that fails while the proxy is restarting is an honest error, too. Everything
else is a failure of the deployment.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.ops.chaos.completion import Completion, MalformedError, read_error, read_stream, read_whole


class Ending(StrEnum):
    """How a request ended for its client."""

    COMPLETE = "complete"  #: a whole HTTP response came
    REFUSED = "refused"  #: no connection
    CLOSED = "closed"  #: the connection ended before the response was complete
    SILENT = "silent"  #: not ended two seconds after the deadline
    LEFT = "left"  #: the client disconnected


@dataclass(frozen=True, slots=True)
class Observation:
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
    detail: str = ""  #: of a connection that failed


class Outcome(StrEnum):
    """What became of a request."""

    RIGHT = "right"
    ERROR = "honest error"
    LEFT = "client left"
    WRONG = "wrong answer"
    HANG = "hang"
    TRUNCATED = "silent truncation"
    DROPPED = "dropped connection"
    MALFORMED = "malformed answer"
    REFUSED = "refused without cause"
    INTERNAL = "internal error"


FAILURES = (
    Outcome.WRONG,
    Outcome.HANG,
    Outcome.TRUNCATED,
    Outcome.DROPPED,
    Outcome.MALFORMED,
    Outcome.REFUSED,
    Outcome.INTERNAL,
)

#: The type of an error that only a defect of kvbelt explains.
_INTERNAL = "internal_error"

#: Statuses below 500 that depend on the moment, not on the request.
_PASSING = (408, 429)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason``: an honest error's type, or what was wrong."""

    outcome: Outcome
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the deployment broke an invariant."""
        return self.outcome in FAILURES


def judge(seen: Observation, right: Completion, *, proxy_away: bool) -> Verdict:
    """``proxy_away``: the proxy was restarting at some moment of the request."""
    if seen.ending is Ending.SILENT:
        return Verdict(Outcome.HANG, f"no end within {seen.deadline:g} s and two more")
    try:
        if seen.ending is Ending.COMPLETE and seen.status != 200:
            return _error(seen)
        if seen.stream and seen.status == 200:
            return _stream(seen, right, proxy_away=proxy_away)
        if seen.ending is not Ending.COMPLETE:
            return _broken(seen, proxy_away=proxy_away)
        return _compare(read_whole(seen.body), right)
    except MalformedError as error:
        return Verdict(Outcome.MALFORMED, str(error))


def _error(seen: Observation) -> Verdict:
    reason = f"{seen.status} {read_error(seen.body)}"
    if 400 <= seen.status < 500 and seen.status not in _PASSING:
        return Verdict(Outcome.REFUSED, f"{reason}: {seen.body[:300]!r}")
    if seen.status < 400:
        return Verdict(Outcome.MALFORMED, f"status {seen.status}")
    return Verdict(Outcome.INTERNAL if _INTERNAL in reason else Outcome.ERROR, reason)


def _broken(seen: Observation, *, proxy_away: bool) -> Verdict:
    if seen.ending is Ending.LEFT:
        return Verdict(Outcome.LEFT)
    if proxy_away:
        return Verdict(Outcome.ERROR, "the proxy is restarting")
    return Verdict(Outcome.DROPPED, f"{seen.ending}: {seen.detail}")


def _stream(seen: Observation, right: Completion, *, proxy_away: bool) -> Verdict:
    stream = read_stream(seen.body)
    given = stream.answer()
    if not _begins(given, right):
        return Verdict(Outcome.WRONG, difference(given, right))
    if stream.error is not None:
        return Verdict(
            Outcome.INTERNAL if _INTERNAL in stream.error else Outcome.ERROR, f"in the stream: {stream.error}"
        )
    if seen.ending is not Ending.COMPLETE:
        return _broken(seen, proxy_away=proxy_away)
    if not stream.done or None in given.finish_reasons or len(given.texts) < len(right.texts):
        return Verdict(Outcome.TRUNCATED, "a choice without its end" if stream.done else "no [DONE]")
    return _compare(given, right)


def _begins(given: Completion, right: Completion) -> bool:
    """Whether what came so far is a prefix of the right answer."""
    return len(given.token_ids) <= len(right.token_ids) and all(
        ids == whole[: len(ids)] for ids, whole in zip(given.token_ids, right.token_ids, strict=False)
    )


def _compare(given: Completion, right: Completion) -> Verdict:
    return Verdict(Outcome.RIGHT) if given == right else Verdict(Outcome.WRONG, difference(given, right))


def difference(given: Completion, right: Completion) -> str:
    """The first difference of two completions, for people."""
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
