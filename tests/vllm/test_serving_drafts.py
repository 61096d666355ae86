"""Drafters with KV of their own, in real vLLM servers, against a plain server with the same drafter.

``KVBELT_VLLM_DRAFTS`` says which servers have it: ``both``, or ``decode`` alone.
"""

import os
import sys

import pytest

from tests.e2e.prompts import TWENTY
from tests.vllm.asking import all_free, ask
from tests.vllm.conftest import Deployment, wait_until
from tests.vllm.servers import Server

SIDES = os.environ.get("KVBELT_VLLM_DRAFTS", "")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not SIDES, reason="no drafter"),
]


def ids(count: int, start: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [100 + (start + number) * 37 % 9000 for number in range(count)]


def drafted(server: Server) -> tuple[float, float]:
    """The drafts of a server up to now, and those of them that were right."""
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    drafts, accepted = map(server.metric, names)
    return drafts, accepted


def accepted_share(server: Server, before: tuple[float, float]) -> float:
    drafts, accepted = (now - then for now, then in zip(drafted(server), before, strict=True))
    assert drafts > 0
    return accepted / drafts


def test_twenty_prompts(deployment: Deployment) -> None:
    """Their KV crosses, and the answers are the plain server's."""
    for body in TWENTY:
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(deployment.plain, body)[2]
        assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))


def test_drafts_are_as_good_as_over_a_prompt_that_was_computed_here(deployment: Deployment) -> None:
    """With the drafter on both sides its KV crosses as well; else the answers are the same, with worse drafts."""
    decode, plain = deployment.decode[0], deployment.plain
    before = drafted(decode), drafted(plain)
    for number in range(6):
        # A prefix that the other side holds, too: vLLM computes its last block again.
        body = {"prompt": ids(300 + 7 * number, 5000 * (number // 2)), "max_tokens": 24, "ignore_eos": True}
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(plain, body)[2]
        assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))
    here, there = accepted_share(decode, before[0]), accepted_share(plain, before[1])
    # Some nine of ten are right with the prompt's KV, and nearly none without.
    sys.stdout.write(f"accepted of the drafts: {here:.3f} over received KV, {there:.3f} plain\n")
    assert there > 0.8
    assert here > there - 0.1 if SIDES == "both" else here < there / 2
    wait_until(lambda: all_free(deployment))
