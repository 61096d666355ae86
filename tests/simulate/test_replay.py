"""Requests of the past are replayed, as placement splits them and all whole."""

import subprocess
import sys

import msgspec
import pytest

from kvbelt.simulate.load import Load
from kvbelt.simulate.model import learned_costs
from kvbelt.simulate.profiles import H200_LLAMA_8B
from kvbelt.simulate.replay import replay
from kvbelt.wire.health import Role
from kvbelt.wire.replay import REPLAY_ANSWER, EndedRequest, ReplayQuestion, ReplayWorker
from kvbelt.wire.steps import StepsNow

STEPS = StepsNow(
    costs=learned_costs(H200_LLAMA_8B.engine),
    prompt_tokens=0,
    decodes=0,
    kv_tokens=0,
    most_prompt_tokens=8192,
    most_requests=64,
    most_kv_tokens=780_000,
)


def question(rate: float, pause: float | None = None, held: int = 0, *, splittable: bool = True) -> ReplayQuestion:
    """A prefill worker and a decode worker, and half a minute of requests."""
    return ReplayQuestion(
        [ReplayWorker(role, STEPS) for role in (Role.PREFILL, Role.DECODE)],
        [
            EndedRequest(1000 + one.at, one.prompt, held, one.output, splittable, 0.5, 0.05, None, False, None, True)
            for one in Load(rate=rate, seconds=30).requests()
        ],
        0.05,
        pause,
    )


def test_splitting_wins_under_load() -> None:
    assert replay(question(5.0)).regret < -0.1


@pytest.mark.parametrize("rate", [1.0, 3.0, 5.0])
def test_a_slow_link_makes_splitting_lose(rate: float) -> None:
    """The simulator does not know the link. It takes the pause before the second token that was observed."""
    assert replay(question(rate, pause=2.0)).regret > 0.02


def test_a_usual_pause_changes_nothing() -> None:
    assert replay(question(3.0, pause=0.03)) == replay(question(3.0))


def test_what_was_held_is_not_computed_again() -> None:
    assert replay(question(8.0, held=7000)).whole > replay(question(8.0)).whole + 0.5


def test_a_request_that_cannot_be_split_is_whole_in_both() -> None:
    assert abs(replay(question(3.0, pause=2.0, splittable=False)).regret) < 0.05


def test_what_is_not_streamed_is_load_but_not_judged() -> None:
    asked = question(8.0)
    answer = replay(asked)
    for number, one in enumerate(asked.requests[:-5]):
        asked.requests[number] = msgspec.structs.replace(one, within=None)
    assert answer.whole > 0.0
    assert replay(asked).whole == 0.0  # the last ones of an overload are late


def test_the_process_answers_as_the_function_does() -> None:
    asked = question(2.0)
    done = subprocess.run(
        [sys.executable, "-m", "kvbelt.simulate.replay"],
        input=msgspec.json.encode(asked),
        capture_output=True,
        check=True,
    )
    assert REPLAY_ANSWER.parse(done.stdout, "the replay") == replay(asked)
