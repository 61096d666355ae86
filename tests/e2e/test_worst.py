"""One client does its worst, and others are served."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from benchmarks._worst import WORST, send

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.load import Load

pytestmark = pytest.mark.e2e

SMALL = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}


def test_the_worst_is_refused_with_its_reason_and_others_are_served(one_p_one_d: SyncDeployment) -> None:
    """All of it at once, four requests at a time. How long others wait, ``benchmarks.worst`` measures."""
    url = one_p_one_d.url
    with Load(url, SMALL, at_once=1, stream=True) as others, ThreadPoolExecutor(4) as client:
        worst = {name: make() for name, make in WORST.items()}
        got = dict(zip(worst, client.map(lambda one: send(url, one), worst.values()), strict=True))
    for name, (status, body) in got.items():
        assert status == worst[name].status, f"{name}: {body[:400]}"
        assert worst[name].said in body, f"{name}: {body[:400]}"
    assert {one.status for one in others.outcomes} == {200}, others.outcomes
    assert len({one.token_ids for one in others.outcomes}) == 1
