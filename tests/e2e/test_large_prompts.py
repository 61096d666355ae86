"""Prompts that are larger than the decode worker's buffer stream through it, and are answered like all others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbelt.ops.deployment import SyncDeployment, running
from tests.e2e.asking import ask, ask_all, assert_same, health, until
from tests.e2e.conftest import deployment_spec
from tests.e2e.prompts import long_text

pytestmark = pytest.mark.e2e

#: About 400 tokens, 25 blocks; the buffer has room for 14.
LARGE = [long_text(300, start=start) for start in (3, 23, 43)]
SHORT = ["The capital of France is", "Two plus two is", "天空是"]


@pytest.fixture(scope="module")
def narrow(small_model: Path) -> Iterator[SyncDeployment]:
    """A 1p1d with ten megabytes of buffer on each side."""
    with running(deployment_spec(small_model, "1p1d", buffer_gb=0.00086)) as deployment:
        yield deployment


def test_large_and_small_prompts_side_by_side(narrow: SyncDeployment, aggregated: SyncDeployment) -> None:
    """All of them cross the belt, the large ones in parts, and the answers are the aggregated server's."""
    decode = narrow.process("decode-0")
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "temperature": 0, "max_tokens": 8}
        for pair in zip(LARGE, SHORT, strict=True)
        for prompt in pair
    ]
    answers = ask_all(narrow.url, bodies, at_once=len(bodies), stream=True)
    for answer, expected in zip(answers, ask_all(aggregated.url, bodies, at_once=1), strict=True):
        assert_same(answer, expected)
        assert answer.path.startswith("first-token")
    assert health(decode)["belt"]["received_bytes_total"] > 3 * health(decode)["belt"]["receive_bytes"]

    def nothing_held() -> bool:
        load = health(decode)["load"]
        return load["blocks_free"] == load["blocks_total"]

    until(nothing_held, what="every block given back")


def test_choices_of_a_large_prompt(narrow: SyncDeployment, aggregated: SyncDeployment) -> None:
    """Parts can be read once, so the other choices share the blocks of the first."""
    body = {"prompt": long_text(300, start=63), "n": 3, "seed": 5, "max_tokens": 6}
    answer = ask(narrow.url, body, stream=False)
    assert answer.path == "re-derive; reason=n"
    assert_same(answer, ask(aggregated.url, body, stream=False))
