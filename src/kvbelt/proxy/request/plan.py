"""What is tried next for one request, after which outcome. Pure: no I/O, no clock, no tasks.

``Plan.handle(outcome)`` returns the next step. ``handler.py`` performs it and reports the outcome, until the step is
``STOP``. ``TABLE`` holds every move; ``Plan`` adds only what counts or names workers:

1. A request makes at most ``max_attempts`` calls of each kind. Repeating a call on the same worker is no new attempt.
2. A worker that failed the request is not asked again, unless it has been restarted since.
3. What the client was told is never taken back: once the first token is sent, only a continuation may follow it.
"""

from dataclasses import replace

from kvbelt.proxy.request.steps import Do, Move, Outcome, Result, State, Step, UnplannedError
from kvbelt.wire.reasons import Remedy, of_transfer

PLACE, PLACE_REST = Step(Do.PLACE), Step(Do.PLACE, continues=True)
PREFILL_ALONE, PREFILL_SENDING = Step(Do.CALL_PREFILL), Step(Do.CALL_PREFILL, kv=True)
DECODE, DECODE_KV = Step(Do.CALL_DECODE), Step(Do.CALL_DECODE, kv=True)
CONTINUE, CONTINUE_KV = Step(Do.CALL_DECODE, continues=True), Step(Do.CALL_DECODE, kv=True, continues=True)
SEND_FIRST_TOKEN, FINISH = Step(Do.SEND_FIRST_TOKEN), Step(Do.FINISH)
RELAY_STREAM, REPLY_MERGED, PASS_ON = Step(Do.RELAY_STREAM), Step(Do.REPLY_MERGED), Step(Do.PASS_ON)
QUOTE_IN_STREAM = Step(Do.BREAK_STREAM)
STOP = Step(Do.STOP)

#: Errors of the proxy's own: reason, status, OpenAI's error type.
_ERRORS = {
    Outcome.NO_WORKER: ("no_decode_worker", 503, "unavailable"),
    Outcome.QUEUE_FULL: ("queue_full", 429, "rate_limit_error"),
    Outcome.OVERLOADED: ("overloaded", 429, "rate_limit_error"),
    Outcome.ATTEMPTS_USED: ("decode_lost", 503, "unavailable"),
    Outcome.STREAM_LOST: ("decode_lost", 502, "upstream_error"),
    Outcome.BAD_ANSWER: ("bad_answer", 502, "upstream_error"),
    Outcome.DEADLINE: ("deadline", 504, "timeout_error"),
    Outcome.RECEIVER_FULL: ("receiver_full", 503, "unavailable"),
    Outcome.FAULT: ("internal", 500, "internal_error"),
}

S, O = State, Outcome  # noqa: E741 - the table is read across
_FIRST, REDERIVE, _ONLY, _LOCAL = "first-token", "re-derive", "prefill-only", "local"


def _error(outcome: Outcome, *, told: bool = False) -> Move:
    reason, status, kind = _ERRORS[outcome]
    return Move(S.ENDING, Step(Do.BREAK_STREAM if told else Do.REPLY_ERROR, reason=reason, status=status, kind=kind))


def _again(state: State, step: Step, path: str | None = None) -> Move:
    return Move(state, replace(step, again=True), path)


_PASS_ON, _QUOTE, _RELAY = Move(S.ENDING, PASS_ON), Move(S.ENDING, QUOTE_IN_STREAM), Move(S.RELAYING, RELAY_STREAM)
_MERGE, _ELSEWHERE = Move(S.ENDING, REPLY_MERGED), Move(S.CHOOSING, PLACE)
_CONTINUE_ELSEWHERE = Move(S.CONTINUING_WITHOUT_KV, PLACE_REST)
_LOCALLY = Move(S.LOCAL, DECODE, _LOCAL)
_TOKEN_LOCALLY = Move(S.TOKEN_WITHOUT_KV, SEND_FIRST_TOKEN, _LOCAL)

# What several states have in common.
_UNPLACED = (O.NO_WORKER, O.QUEUE_FULL, O.OVERLOADED)
_NONE_LEFT = {outcome: _error(outcome) for outcome in _UNPLACED} | {O.LAST_WORDS: _PASS_ON}
_OWN_ANSWER = {O.STREAM: _RELAY, O.WHOLE: _PASS_ON, O.REFUSED: _PASS_ON}
_MERGED_ANSWER = {O.WHOLE: _MERGE, O.REFUSED: _PASS_ON, O.DECODE_FAILED: _ELSEWHERE, O.DECODE_5XX: _ELSEWHERE}
_CONTINUATION = {
    O.STREAM: _RELAY, O.REFUSED: _QUOTE, O.DECODE_FAILED: _CONTINUE_ELSEWHERE, O.DECODE_5XX: _CONTINUE_ELSEWHERE,
}  # fmt: skip
_ANSWER_OF_PREFILL = {
    O.FIRST_TOKEN: Move(S.TOKEN, SEND_FIRST_TOKEN, _FIRST),
    O.LAST_TOKEN: Move(S.ENDING, FINISH, _FIRST),
    O.UNFIT: Move(S.REDERIVING, DECODE_KV, REDERIVE),
    O.REFUSED: _PASS_ON,
    O.TOKEN_KV_FAILED: Move(S.PREFILL_AGAIN, PLACE),
    O.TOKEN_KV_HOPELESS: _TOKEN_LOCALLY,
}

#: States in which the client has been told something, and its answer is not complete.
TOLD = (S.CONTINUING, S.CONTINUING_WITHOUT_KV, S.RELAYING)

TABLE: dict[State, dict[Outcome, Move]] = {
    S.CHOOSING: {
        **_NONE_LEFT,
        O.ATTEMPTS_USED: _error(O.ATTEMPTS_USED),
        O.SPLIT: Move(S.PREFILL, PREFILL_SENDING),
        O.ONE_TOKEN: Move(S.PREFILL_ONLY, PREFILL_ALONE, _ONLY),
        O.UNSPLIT: Move(S.LOCAL, DECODE, _LOCAL),
    },
    # One token is all that is asked for: the prefill worker's answer is the answer.
    S.PREFILL_ONLY: {
        **_OWN_ANSWER,
        O.STALE: _again(S.PREFILL_ONLY, PREFILL_ALONE),
        O.PREFILL_FAILED: _ELSEWHERE,
    },
    # The prefill worker computes the prompt and sends its KV.
    S.PREFILL: {
        **_ANSWER_OF_PREFILL,
        O.STALE: _again(S.PREFILL, PREFILL_SENDING),
        O.PREFILL_FAILED: _ELSEWHERE,
        O.KV_FAILED: _ELSEWHERE,
        O.KV_HOPELESS: _LOCALLY,
    },
    # A first token without its KV is better than none: it is used when no other prefill worker helps.
    S.PREFILL_AGAIN: {
        **_ANSWER_OF_PREFILL,
        **_NONE_LEFT,
        O.SPLIT: Move(S.PREFILL_AGAIN, PREFILL_SENDING),
        O.UNSPLIT: _TOKEN_LOCALLY,
        O.STALE: _again(S.PREFILL_AGAIN, PREFILL_SENDING),
        O.PREFILL_FAILED: Move(S.PREFILL_AGAIN, PLACE),
        O.KV_FAILED: Move(S.PREFILL_AGAIN, PLACE),
        O.KV_HOPELESS: _TOKEN_LOCALLY,
    },
    # The client's stream begins with the first token; a whole answer is merged at the end.
    S.TOKEN: {O.SENT: Move(S.CONTINUING, CONTINUE_KV), O.KEPT: Move(S.MERGING, CONTINUE_KV)},
    S.TOKEN_WITHOUT_KV: {
        O.SENT: Move(S.CONTINUING_WITHOUT_KV, CONTINUE),
        O.KEPT: Move(S.MERGING_WITHOUT_KV, CONTINUE),
    },
    # The client has the first token, so that every further decode worker continues after it.
    S.CONTINUING: {
        **_CONTINUATION,
        O.STALE: _again(S.CONTINUING, CONTINUE_KV),
        O.KV_LOST: _again(S.CONTINUING_WITHOUT_KV, CONTINUE, _LOCAL),
    },
    S.CONTINUING_WITHOUT_KV: {
        **_CONTINUATION,
        O.STALE: _again(S.CONTINUING_WITHOUT_KV, CONTINUE),
        O.UNSPLIT: Move(S.CONTINUING_WITHOUT_KV, CONTINUE, _LOCAL),
        **{outcome: _error(outcome, told=True) for outcome in (*_UNPLACED, O.ATTEMPTS_USED)},
        O.LAST_WORDS: _QUOTE,
    },
    # Nothing was said: when the decode worker fails, the request is placed anew.
    S.MERGING: {
        **_MERGED_ANSWER,
        O.STALE: _again(S.MERGING, CONTINUE_KV),
        O.KV_LOST: _again(S.MERGING_WITHOUT_KV, CONTINUE, _LOCAL),
    },
    S.MERGING_WITHOUT_KV: {**_MERGED_ANSWER, O.STALE: _again(S.MERGING_WITHOUT_KV, CONTINUE)},
    S.REDERIVING: {
        **_OWN_ANSWER,
        O.STALE: _again(S.REDERIVING, DECODE_KV),
        O.KV_LOST: _again(S.LOCAL, DECODE, _LOCAL),
        O.DECODE_FAILED: _ELSEWHERE,
        O.DECODE_5XX: _ELSEWHERE,
    },
    S.LOCAL: {
        **_OWN_ANSWER,
        O.STALE: _again(S.LOCAL, DECODE),
        O.DECODE_FAILED: _ELSEWHERE,
        O.DECODE_5XX: _ELSEWHERE,
    },
    S.RELAYING: {
        O.DONE: Move(S.OVER, STOP),
        O.STREAM_LOST: _error(O.STREAM_LOST, told=True),
        O.BAD_ANSWER: _error(O.BAD_ANSWER, told=True),
    },
    S.ENDING: {O.DONE: Move(S.OVER, STOP), O.BAD_ANSWER: _error(O.BAD_ANSWER)},
    S.OVER: {},
}
# What may happen at any time. A fault while the answer is being ended is left to the HTTP server.
for _state in S:
    if _state is not S.OVER:
        TABLE[_state][O.CLIENT_GONE] = Move(S.OVER, STOP)
        for _outcome in (O.DEADLINE, O.RECEIVER_FULL, O.FAULT):
            TABLE[_state][_outcome] = _error(_outcome, told=_state in TOLD)
TABLE[S.ENDING] |= dict.fromkeys((O.DEADLINE, O.RECEIVER_FULL, O.FAULT), Move(S.OVER, STOP))


def transfer_outcome(reason: str, *, token: bool) -> Outcome:
    """The outcome of a prefill call whose transfer failed.

    Args:
        reason: the transfer's, of ``wire/reasons.py``.
        token: whether the client can use the first token all the same.
    """
    if of_transfer(reason).remedy is Remedy.ELSEWHERE:
        return O.TOKEN_KV_FAILED if token else O.KV_FAILED
    return O.TOKEN_KV_HOPELESS if token else O.KV_HOPELESS


_OF_PREFILL = frozenset({O.PREFILL_FAILED, O.KV_FAILED, O.TOKEN_KV_FAILED})
_OF_DECODE = frozenset({O.DECODE_FAILED, O.DECODE_5XX})
_ANSWERED = frozenset({O.STREAM, O.WHOLE, O.REFUSED, O.DONE})
_PLACED = frozenset({O.SPLIT, O.ONE_TOKEN, O.UNSPLIT})
_NO_PREFILL = frozenset({"no_prefill_worker", "pairs_refused"})
_CALL_PREFILL, _CALL_DECODE = Do.CALL_PREFILL, Do.CALL_DECODE  # fast to read


class Plan:
    """One request's walk through the table."""

    state = S.CHOOSING
    path = ""  #: ``x-kvbelt-path`` is made of this ...
    reason: str | None = None  #: ... of this ...
    after: tuple[str, ...] = ()  #: ... and of the failures after which the request was placed anew
    detail = ""  #: the latest failure or error, for people
    tried: frozenset[str] = frozenset()  #: incarnations that failed this request
    decode_lacks_model = False  #: of a decode worker, so that a prefill worker may have to answer
    may_repeat = True  #: whether the call under way may end in ``STALE``: one of each attempt may
    _prefill_calls = 0
    _decode_calls = 0
    _failed: str | None = None  # why the request is placed anew
    _failed_prefill = False  # and whether that was a prefill call
    _cause: str | None = None  # why the decode worker computes the prompt, if it comes to that
    _kv_failure: str | None = None  # why the transfer of the latest answer failed
    _quotable = False  # a worker's last answer is the client's, if no other worker is left

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts

    @property
    def may_prefill(self) -> bool:
        return self._prefill_calls < self._max_attempts

    def begin(self) -> Step:
        return PLACE

    def handle(self, result: Outcome | Result) -> Step:
        """The next step. Raises UnplannedError: this outcome cannot follow from the last step."""
        reason = None
        if isinstance(result, Result):
            outcome, reason = result.outcome, result.reason
            self._learn(result)
        else:
            outcome = result
        if self._failed is not None:
            outcome, reason = self._after_failure(outcome, reason)
        move = TABLE[self.state].get(outcome)
        if move is None:
            raise UnplannedError(f"{outcome!r} in {self.state!r}")
        self.state = move.state
        # A decode worker that answers with a reason waited for KV, and computed the prompt after all.
        path = _LOCAL if reason is not None and outcome in _ANSWERED else move.path
        if path is not None:
            self.path = path
            self.reason = None if path in (_FIRST, _ONLY) else reason or self._cause
        return self._limit(move.step) if move.step.limited else move.step

    def _learn(self, result: Result) -> None:
        outcome = result.outcome
        self.detail = result.detail
        if outcome in _OF_PREFILL:
            self.tried |= {result.incarnation}
            self._failed_prefill = True
            if outcome is not O.PREFILL_FAILED:
                self._kv_failure = result.reason
            if result.reason == "model_missing":
                self._quotable = True
            self._failed, self._cause = result.reason, self._kv_failure or result.reason
        elif outcome in _OF_DECODE:
            self.tried |= {result.incarnation}
            self._failed_prefill = False
            self._failed = self._cause = result.reason
            self._kv_failure, self._quotable = None, outcome is O.DECODE_5XX
            self.decode_lacks_model |= result.reason == "model_missing"
        elif outcome is O.STALE:
            if not self.may_repeat:
                raise UnplannedError("a second stale connection in one attempt")
            self.may_repeat = False

    def _after_failure(self, outcome: Outcome, reason: str | None) -> tuple[Outcome, str | None]:
        """What an outcome means after a failure."""
        if outcome in _PLACED:
            if outcome is O.UNSPLIT and self._failed_prefill and (reason is None or reason in _NO_PREFILL):
                reason = None  # the failure is the cause
            elif self._failed is not None:
                self.after += (self._failed,)
            self._failed = None
        elif outcome in (O.NO_WORKER, O.ATTEMPTS_USED) and self._quotable:
            return O.LAST_WORDS, reason
        return outcome, reason

    def _limit(self, step: Step) -> Step:
        """Count an attempt, or refuse to place a request for one too many."""
        do = step.do
        if do is _CALL_PREFILL:
            self._prefill_calls += 1
            self.may_repeat = True
        elif do is _CALL_DECODE:
            self._decode_calls += 1
            self.may_repeat = True
        elif self._decode_calls >= self._max_attempts:
            self.detail = (
                f"{self._max_attempts} workers in turn did not answer, the last one because {self.detail}; try again"
            )
            return self.handle(O.ATTEMPTS_USED)
        return step
