"""Token for token: 1p1d, 2p2d, 0p1d and transformers' own generate give the same answers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvbelt.ops.deployment import SyncDeployment
from tests.e2e.asking import Answer, ask_all, assert_same, get
from tests.e2e.equality import GREEDY, assert_answers, assert_generated, generate

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def yardstick(aggregated: SyncDeployment) -> list[Answer]:
    """What the aggregated server answers, one at a time."""
    return ask_all(aggregated.url, GREEDY, at_once=1)


def test_aggregated_equals_generate(yardstick: list[Answer], small_model: Path) -> None:
    """The aggregated server's ids, lengths and ends are those of transformers' generate."""
    assert_generated(yardstick, generate(small_model))


@pytest.mark.parametrize(
    ("topology", "stream", "at_once"),
    [
        pytest.param("one_p_one_d", False, 1, id="1p1d-whole-alone"),
        pytest.param("one_p_one_d", True, 8, id="1p1d-streamed-eight"),
        pytest.param("one_p_one_d_mooncake", False, 8, id="1p1d-mooncake-whole-eight"),
        pytest.param("two_p_two_d", True, 1, id="2p2d-streamed-alone"),
        pytest.param("two_p_two_d", False, 8, id="2p2d-whole-eight"),
        pytest.param("aggregated", True, 8, id="0p1d-streamed-eight"),
    ],
)
def test_every_topology_gives_the_same_answers(
    topology: str, stream: bool, at_once: int, yardstick: list[Answer], request: pytest.FixtureRequest
) -> None:
    """Texts, ids, ends and usage equal the aggregated server's, streamed or whole, alone or eight at a time."""
    deployment: SyncDeployment = request.getfixturevalue(topology)
    paths = {"local"} if topology == "aggregated" else {"first-token", "re-derive"}
    assert_answers(deployment.url, yardstick, stream=stream, at_once=at_once, paths=paths)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_every_placement_gives_the_same_answers(stream: bool, elastic: SyncDeployment, yardstick: list[Answer]) -> None:
    """Under load, requests are split and answered whole. Which worker answers whole ones depends on the machine."""
    seen: set[str] = set()
    for number in range(8):
        salt = f"{number} {stream}"  # no worker holds a prompt, else all would go there
        answers = ask_all(elastic.url, [{**body, "cache_salt": salt} for body in GREEDY], at_once=8, stream=stream)
        for answer, expected in zip(answers, yardstick, strict=True):
            assert_same(answer, expected)
        seen |= actions(elastic)
        if len(seen) > 1 and "split" in seen:
            return
    raise AssertionError(f"only {seen}")


def actions(deployment: SyncDeployment) -> set[str]:
    """What became of the latest requests."""
    roles = {worker.url.rpartition("/")[2]: worker.role for worker in deployment.workers}
    rows = get(f"{deployment.url}/kvbelt/requests?limit=20").json()["requests"]
    places = [(row["decision"]["path"], row["workers"]["decode"]) for row in rows]
    return {"split" if path != "local" else f"whole, {roles[worker]}" for path, worker in places}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prefill_worker_answers_whole_requests(
    stream: bool, one_p_one_d: SyncDeployment, yardstick: list[Answer]
) -> None:
    """It decodes as a decode worker does, also beside prompts whose KV it sends."""
    prefill = one_p_one_d.process("prefill-0")
    with ThreadPoolExecutor(1) as beside:
        split = beside.submit(ask_all, one_p_one_d.url, GREEDY, at_once=4)
        assert_answers(prefill.url, yardstick, stream=stream, at_once=4, paths={""})
        for answer, expected in zip(split.result(), yardstick, strict=True):
            assert_same(answer, expected)
