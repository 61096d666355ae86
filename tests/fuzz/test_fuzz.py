"""Every parser of input from outside, on its corpus and on random changes of it."""

from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbelt.proxy.workers import vllm_dialect
from kvbelt.wire.about import ABOUT
from kvbelt.wire.health import WORKER_HEALTH
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.peers import PEERS_REQUEST
from kvbelt.wire.probe import PROBE_REQUEST, PROBE_RESULT
from kvbelt.wire.workers import NEW_WORKER
from tests.fuzz.__main__ import first_that_breaks, keep
from tests.fuzz.mutation import CORPUS, files, inputs, mutated, seeds
from tests.fuzz.targets import TARGETS

REPLAYED = [pytest.param(name, path, id=f"{name}-{path.name}") for name in TARGETS for path in files(name)]


@pytest.mark.parametrize(("name", "path"), REPLAYED)
def test_what_is_in_the_corpus_raises_only_what_its_parser_promises(name: str, path: Path):
    """The corpus has valid inputs, damaged ones, and those that once broke a parser."""
    TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_input_raises_only_what_its_parser_promises(name: str, data):
    """Inputs are random bytes, or a file of the corpus with up to five changes."""
    begin = seeds(name)
    chance = Random(data.draw(st.integers(0, 1 << 32)))
    given_bytes = data.draw(st.one_of(st.sampled_from(begin), st.sampled_from(begin), st.binary(max_size=300)))
    for _ in range(data.draw(st.integers(0, 5))):
        given_bytes = mutated(given_bytes, begin, chance)
    TARGETS[name](given_bytes)


def test_every_target_has_a_corpus_and_every_corpus_a_target():
    """Otherwise a parser or a file would not be tried."""
    assert {path.name for path in CORPUS.iterdir()} == {*TARGETS, "proxy"}
    assert all(len(seeds(name)) >= 3 for name in TARGETS)


def test_a_parser_that_raises_something_else_is_found_and_its_input_kept(tmp_path):
    """A parser that fails on one byte in one place is found."""

    def stumbles(data: bytes) -> None:
        if b"\xff" in data:
            raise KeyError("not a documented error")

    chance = Random(1)
    stream = inputs("health", chance)
    found = first_that_breaks(stumbles, (next(stream) for _ in range(2000)))
    assert found is not None
    data, error = found
    assert isinstance(error, KeyError)
    assert keep("health", data, tmp_path).read_bytes() == data


def test_the_same_seed_makes_the_same_inputs():
    """So a failure can be repeated."""
    first, second = inputs("health", Random(7)), inputs("health", Random(7))
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (WORKER_HEALTH, "health/ready"),
        (WORKER_HEALTH, "health/loading"),
        (ABOUT, "about/prefill"),
        (ABOUT, "about/proxy"),
        (PROBE_RESULT, "probe_answer/whole"),
        (PROBE_REQUEST, "probe_order/one"),
        (PEERS_REQUEST, "peers/two"),
        (NEW_WORKER, "new_worker/decode"),
    ],
)
def test_the_corpus_holds_whole_messages(message: JsonMessage, path: str):
    """The corpus has a valid message of each contract, because mutations of a refused input find nothing."""
    message.parse((CORPUS / path).read_bytes(), "p")


@pytest.mark.parametrize("path", ["described", "warmed"])
def test_the_corpus_holds_whole_answers_of_a_vllm_server(path: str):
    """Mutations of a refused answer find nothing."""
    data = (CORPUS / "vllm_description" / path).read_bytes()
    read = vllm_dialect.peer_states_of if path == "warmed" else partial(vllm_dialect.description_of, 200)
    assert read(data, "p") is not None
