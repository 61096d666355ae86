"""What became of each case, from all answers. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvbelt.ops.verify.answers import Answer
from kvbelt.ops.verify.ask import Asked
from kvbelt.ops.verify.cases import Case
from kvbelt.ops.verify.compare import TOLERANCE, Difference, differences, message_of, noise_explains

#: Outcomes of a case.
EXACT, REFUSED, NOISE, DIFFERS, UNASKED = "exact", "refused", "noise", "differs", "unasked"
REWORDED = "reworded"  #: refused with the same status, by the proxy in other words than by the reference

_MOST_DIFFERENCES = 3
_MOST_CHARACTERS = 300


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One difference."""

    round: str
    variant: str
    field: str
    how_far: str
    got: str
    expected: str


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str
    field: str
    what: str
    outcome: str
    path: str  #: of the first answer to new prompts
    paths: dict[str, int]  #: without reasons; how many answers took each
    why: str  #: the refusal's words, or why no answer came
    differences: list[Found] = []  #: the first one of each field, some fields


class OwnNoise(msgspec.Struct, frozen=True, kw_only=True):
    """How the reference's second answers differ from its first."""

    answers: int
    differ: int
    tolerance: float  #: of log probabilities that follows


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    noise: OwnNoise
    answers: int  #: of the deployment
    differ: int
    cases: list[CaseResult]


@dataclass(frozen=True, slots=True)
class _Compared:
    asked: Asked
    found: list[Difference]


_Key = tuple[str, str, str, bool]


def _key(asked: Asked) -> _Key:
    question = asked.question
    return question.endpoint, question.case.name, question.variant, asked.round.streamed


def judge(cases: Sequence[Case], reference: Sequence[Asked], subject: Sequence[Asked]) -> Judged:
    """``reference``: the first answer to a question in a form is what is expected; others show its noise."""
    expected: dict[_Key, Answer] = {}
    second: list[tuple[Answer, Answer]] = []
    for asked in reference:
        if asked.answer is not None:
            first = expected.setdefault(_key(asked), asked.answer)
            if first is not asked.answer:
                second.append((asked.answer, first))
    noise = _own_noise(second)
    compared = [
        _Compared(
            asked,
            differences(
                asked.answer,
                expected[_key(asked)],
                noise.tolerance,
                cached=asked.round.cached or "cache_salt" in asked.question.body,
            ),
        )
        for asked in subject
        if asked.answer is not None and _key(asked) in expected
    ]
    differ = sum(bool(one.found) for one in compared)
    explained = noise_explains((differ, len(compared)), (noise.differ, noise.answers))
    by_case: dict[tuple[str, str], list[_Compared]] = {}
    for one in compared:
        by_case.setdefault(_key(one.asked)[:2], []).append(one)
    silent = {_key(asked)[:2]: asked.why for asked in (*reference, *subject) if asked.answer is None}
    results = [
        _result(case, by_case.get(name, []), silent.get(name), explained=explained)
        for case in cases
        for name in [(case.endpoint, case.name)]
    ]
    return Judged(noise=noise, answers=len(compared), differ=differ, cases=results)


def _own_noise(second: Sequence[tuple[Answer, Answer]]) -> OwnNoise:
    strict = [differences(one, first, 0.0) for one, first in second]
    # Where tokens differ, their log probabilities say nothing about rounding.
    rounding = [
        abs(one.got - one.expected)
        for found in strict
        if all(isinstance(one.got, float) and isinstance(one.expected, float) for one in found)
        for one in found
    ]
    tolerance = max([TOLERANCE, 2 * max(rounding, default=0.0)])
    differ = sum(bool(differences(one, first, tolerance)) for one, first in second)
    return OwnNoise(answers=len(second), differ=differ, tolerance=tolerance)


def _result(case: Case, compared: Sequence[_Compared], silent: str | None, *, explained: bool) -> CaseResult:
    answers = [one.asked.answer for one in compared if one.asked.answer is not None]
    wrong = [one for one in compared if one.found]
    why = ""
    reworded = [one for one in wrong if _reworded(one)]
    if any(not (explained and found.generated) for one in wrong if one not in reworded for found in one.found):
        outcome = DIFFERS
    elif silent is not None or not answers:
        outcome, why = UNASKED, silent or "it was not asked"
    elif reworded:
        outcome, why = REWORDED, f"{answers[0].status}: {message_of(answers[0].said)}"
    elif wrong:
        outcome = NOISE
    elif any(answer.status == 200 for answer in answers):
        outcome = EXACT
    else:
        outcome, why = REFUSED, f"{answers[0].status}: {message_of(answers[0].said)}"
    firsts = {found.field: (one.asked, found) for one in reversed(wrong) for found in reversed(one.found)}
    paths = Counter(answer.path.partition(";")[0] for answer in answers if answer.path)
    return CaseResult(
        endpoint=case.endpoint,
        field=case.field,
        what=case.what,
        outcome=outcome,
        path=next((answer.path for answer in answers if answer.path), ""),
        paths=dict(paths),
        why=why[:_MOST_CHARACTERS],
        differences=[_told(*first) for first in reversed(firsts.values())][:_MOST_DIFFERENCES],
    )


def _reworded(one: _Compared) -> bool:
    answer = one.asked.answer
    return answer is not None and answer.status >= 400 and all(found.field != "status" for found in one.found)


def _told(asked: Asked, one: Difference) -> Found:
    return Found(
        round=asked.round.name,
        variant=asked.question.variant,
        field=one.field,
        how_far=one.how_far,
        got=_short(one.got),
        expected=_short(one.expected),
    )


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
