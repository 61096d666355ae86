"""From answers to outcomes, a report and a status."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvbelt.ops.verify.answers import Answer
from kvbelt.ops.verify.ask import Asked, Round
from kvbelt.ops.verify.cases import CHAT, COMPLETIONS, Case, Question
from kvbelt.ops.verify.judge import Judged, judge
from kvbelt.ops.verify.report import Result, as_json, from_json, lines, status

SERVER: Any = None
CASES = [Case(COMPLETIONS, "echo", "", {"echo": True}), Case(CHAT, "n", "0", {"n": 0})]


def asked(case: Case, answer: Answer | None, round_name: str = "alone") -> Asked:
    question = Question(case, "greedy", case.body, streamable=True, wholeable=True)
    return Asked(question, Round(round_name, SERVER, streamed=False), answer, "" if answer else "it hung")


def text(said: str, path: str = "") -> Answer:
    return Answer(200, path, {"choices": [{"text": said}]})


REFUSED = Answer(400, "", {"error": {"message": "n is 0"}})
OTHER_WORDS = Answer(400, "", {"error": {"message": "n must be 1"}})


def result(judged: Judged) -> Result:
    return Result(
        kvbelt="1", engine="embedded 1", reference="it", seed=0, quick=False, requests=4, seconds=1, judged=judged
    )


def judged(subject: Sequence[Answer | None], second: Answer | None = None) -> Judged:
    """Of both cases: the reference says ``a`` and refuses."""
    own = [asked(CASES[0], text("a")), asked(CASES[1], REFUSED)]
    if second is not None:
        own.append(asked(CASES[0], second))
    return judge(CASES, own, [asked(case, answer) for case, answer in zip(CASES, subject, strict=True)])


@pytest.mark.parametrize(
    ("subject", "second", "outcomes", "exit_status"),
    [
        ((text("a", "local"), REFUSED), None, ["exact", "refused"], 0),
        ((text("b", "local"), REFUSED), None, ["differs", "refused"], 1),
        ((text("b", "local"), REFUSED), text("c"), ["noise", "refused"], 0),
        ((text("a", "local"), text("a")), text("c"), ["exact", "differs"], 1),
        ((text("a", "local"), OTHER_WORDS), None, ["exact", "reworded"], 0),
        ((None, REFUSED), None, ["unasked", "refused"], 2),
        ((None, text("a")), None, ["unasked", "differs"], 1),
    ],
)
def test_outcomes_make_the_status(
    subject: Sequence[Answer | None], second: Answer | None, outcomes: list[str], exit_status: int
) -> None:
    """Differences come before what could not be asked; a status is never noise."""
    found = result(judged(subject, second))
    assert [case.outcome for case in found.judged.cases] == outcomes
    assert status(found) == exit_status
    assert from_json(as_json(found)) == found


def test_the_report_shows_the_difference_and_the_road() -> None:
    shown = "\n".join(lines(result(judged((text("b", "re-derive; reason=echo"), REFUSED)))))
    assert "| echo  | DIFFERS     |" in shown
    assert 'got       "b"' in shown
    assert "roads: re-derive 1" in shown
    assert "equal up to character 0 of 1" in shown


def test_the_report_says_that_nothing_was_split() -> None:
    """Then the belt was not tried."""
    shown = "\n".join(lines(result(judged((text("a", "local"), REFUSED)))))
    assert "no request was split" in shown
    assert "exact: local" in shown
