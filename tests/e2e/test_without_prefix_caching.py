"""Workers that share nothing answer as those that do: some of the other tests' questions, asked twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from tests.e2e.asking import ask, ask_all, assert_same, counters, metric
from tests.e2e.conftest import deployment_spec
from tests.e2e.prompts import CHAT, COMPLETION, OPTIONS, TWENTY

pytestmark = pytest.mark.e2e

#: A short one, Chinese, a conversation, and two of several blocks.
SOME = [{**TWENTY[i], "temperature": 0, "max_tokens": 12} for i in (0, 5, 11, 14, 16)]


@pytest.fixture(scope="module")
def unshared(small_model: Path) -> Iterator[SyncDeployment]:
    """A 1p1d whose workers compute, and send, every prompt whole."""
    with running(deployment_spec(small_model, "1p1d", prefix_caching=False)) as deployment:
        yield deployment


def test_prompts_are_computed_and_sent_whole(unshared: SyncDeployment, aggregated: SyncDeployment) -> None:
    """Asked twice, side by side, the answers are those of a server with prefix caching; nothing is found or spared."""
    expected = ask_all(aggregated.url, SOME, at_once=1)
    for _ in range(2):
        for answer, right in zip(ask_all(unshared.url, SOME, at_once=len(SOME)), expected, strict=True):
            assert_same(answer, right)
            assert not answer.path.startswith("local")
    for name in ("prefill-0", "decode-0"):
        assert metric(unshared.process(name), "kvbelt_prefix_cache_query_tokens_total") == 0
    assert counters(unshared.process("decode-0"))[1] == 0


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("body", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_an_option_gives_the_same_answer(
    body: dict, option: str, unshared: SyncDeployment, aggregated: SyncDeployment
) -> None:
    """With a fixed seed, as the server with prefix caching answers."""
    asked = {**body, **OPTIONS[option]}
    answer = ask(unshared.url, asked, stream=True)
    assert_same(answer, ask(aggregated.url, asked, stream=False))
    assert not answer.path.startswith("local")
