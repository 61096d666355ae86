"""Every sampling option with a fixed seed: disaggregated answers equal the aggregated server's."""

import pytest

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import ask, assert_same
from tests.e2e.prompts import CHAT, COMPLETION, OPTIONS

pytestmark = pytest.mark.e2e


LOGPROBS = {"completion": {"logprobs": 3}, "chat": {"logprobs": True, "top_logprobs": 3}}
KINDS = {"completion": COMPLETION, "chat": CHAT}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_option_gives_the_same_answer_everywhere(
    kind: str, option: str, one_p_one_d: SyncDeployment, two_p_two_d: SyncDeployment, aggregated: SyncDeployment
) -> None:
    """The same text, ids, end and usage on 0p1d, 1p1d (streamed too) and 2p2d."""
    body = {**KINDS[kind], **OPTIONS[option]}
    expected = ask(aggregated.url, body, stream=False)
    for deployment, stream in ((one_p_one_d, False), (one_p_one_d, True), (two_p_two_d, False)):
        answer = ask(deployment.url, body, stream=stream)
        assert_same(answer, expected)
        assert not answer.path.startswith("local"), "it did not cross the belt"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_worker_takes_every_option(
    kind: str, one_p_one_d: SyncDeployment, aggregated: SyncDeployment
) -> None:
    """Asked for a whole answer, it gives the aggregated server's."""
    prefill = one_p_one_d.process("prefill-0")
    for option in OPTIONS.values():
        body = {**KINDS[kind], **option}
        assert_same(ask(prefill.url, body, stream=True), ask(aggregated.url, body, stream=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_logprobs_are_the_same_everywhere(
    kind: str, stream: bool, one_p_one_d: SyncDeployment, aggregated: SyncDeployment
) -> None:
    """Log probabilities of the chosen tokens and their rivals agree to three digits."""
    body = {**KINDS[kind], **LOGPROBS[kind], "seed": 21, "temperature": 0.7}
    expected = ask(aggregated.url, body, stream=False)
    assert expected.logprobs[0]
    assert_same(ask(one_p_one_d.url, body, stream=stream), expected)


def test_several_prompts_in_one_request(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """A list of prompts with two choices each is answered in order."""
    body = {"prompt": ["The sun is", "Two plus two is", "天空是"], "n": 2, "seed": 5, "max_tokens": 8}
    expected = ask(aggregated.url, body, stream=False)
    assert len(expected.texts) == 6
    assert_same(ask(one_p_one_d.url, body, stream=False), expected)


def test_echo_returns_the_prompt_first(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """``echo`` puts the prompt before the completion, as the aggregated server does."""
    body = {**COMPLETION, "echo": True, "temperature": 0}
    expected = ask(aggregated.url, body, stream=False)
    assert expected.texts[0].startswith(COMPLETION["prompt"])
    assert_same(ask(one_p_one_d.url, body, stream=True), expected)


def test_token_ids_as_prompt(one_p_one_d: SyncDeployment, aggregated: SyncDeployment) -> None:
    """A prompt of token ids is taken as it is."""
    body = {"prompt": [504, 3575, 282, 4649, 314], "temperature": 0, "max_tokens": 10}
    assert_same(ask(one_p_one_d.url, body, stream=True), ask(aggregated.url, body, stream=False))
