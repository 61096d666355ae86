"""Every parser of what comes from outside, on its corpus and on what chance makes of it."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import first_that_breaks, keep
from tests.fuzz.mutation import CORPUS, files, inputs, mutated, seeds
from tests.fuzz.targets import TARGETS

REPLAYED = [pytest.param(name, path, id=f"{name}-{path.name}") for name in TARGETS for path in files(name)]


@pytest.mark.parametrize(("name", "path"), REPLAYED)
def test_what_is_in_the_corpus_raises_only_what_its_parser_promises(name: str, path: Path):
    """Valid, damaged and once found: none of it breaks its parser."""
    TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_input_raises_only_what_its_parser_promises(name: str, data):
    """Up to five changes to a file of the corpus, or bytes of every kind."""
    begin = seeds(name)
    chance = Random(data.draw(st.integers(0, 1 << 32)))
    given_bytes = data.draw(st.one_of(st.sampled_from(begin), st.sampled_from(begin), st.binary(max_size=300)))
    for _ in range(data.draw(st.integers(0, 5))):
        given_bytes = mutated(given_bytes, begin, chance)
    TARGETS[name](given_bytes)


def test_every_target_has_a_corpus_and_every_corpus_a_target():
    """A parser without files, or files that nobody reads, would pass unseen."""
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(len(seeds(name)) >= 3 for name in TARGETS)


def test_a_parser_that_raises_something_else_is_found_and_its_input_kept(tmp_path):
    """The loop can fail: a parser that stumbles over one byte in a place of its own does not get through."""

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
    """What was found once can be found again."""
    first, second = inputs("health", Random(7)), inputs("health", Random(7))
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]
