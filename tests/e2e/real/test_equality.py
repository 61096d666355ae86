"""Token for token, with the demo model: 1p1d gives what one worker and transformers' own generate give."""

from pathlib import Path

import pytest

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import Answer, ask_all
from tests.e2e.equality import GREEDY, Generated, assert_answers, assert_generated, generate

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def generated(demo_model: Path) -> list[Generated]:
    """What transformers' generate gives."""
    return generate(demo_model)


@pytest.fixture(scope="module")
def one_worker(started: SyncDeployment) -> list[Answer]:
    """The decode worker's own answers, one at a time. Nothing of them stays cached."""
    salted = [{**body, "cache_salt": "alone"} for body in GREEDY]
    return ask_all(started.process("decode-0").url, salted, at_once=1)


def test_the_prompts_are_what_they_claim(generated: list[Generated]) -> None:
    """Twenty prompts between 5 and about 1,500 tokens."""
    lengths = sorted(one.prompt_tokens for one in generated)
    assert len(lengths) == 20
    assert lengths[0] <= 6
    assert 1400 <= lengths[-1] <= 1600


def test_one_worker_equals_generate(one_worker: list[Answer], generated: list[Generated]) -> None:
    """A worker's ids, lengths and ends are those of transformers' generate."""
    assert_generated(one_worker, generated)


@pytest.mark.parametrize(("stream", "at_once"), [(False, 1), (True, 8)], ids=["whole-alone", "streamed-eight"])
def test_1p1d_equals_one_worker(
    stream: bool, at_once: int, deployment: SyncDeployment, one_worker: list[Answer]
) -> None:
    """Texts, ids, ends and usage, streamed or whole, alone or eight at a time."""
    assert_answers(deployment.url, one_worker, stream=stream, at_once=at_once, paths={"first-token", "re-derive"})
