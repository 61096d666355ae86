"""What is expected of an answer's length."""

import random

import pytest

from kvbelt.routing.output_lengths import UNKNOWN, OutputLengths


def learnt(lengths, limit=None):
    known = OutputLengths()
    for tokens in lengths:
        known.learn("m", tokens, limit)
    return known


def test_nothing_is_known_but_the_limit():
    known = OutputLengths()
    assert (known.expected("m", 40), known.expected("m", None)) == (40, UNKNOWN)


def test_answers_that_end_by_themselves_are_told_from_their_limit():
    known = learnt([100] * 50, limit=1000)
    assert known.expected("m", 1000) == pytest.approx(100, rel=0.1)
    assert known.expected("m", 40) == 40
    assert known.expected("another", 1000) == 1000


def test_answers_that_are_cut_by_their_limit_say_only_that_they_are_longer():
    assert learnt([100] * 50, limit=100).expected("m", 400) == 400
    known = learnt([200])
    for _ in range(50):
        known.learn("m", 100, 100)
    assert known.expected("m", None) == 200
    for _ in range(50):
        known.learn("m", 300, 300)
    assert known.expected("m", None) >= 280


def test_the_median_of_what_was_seen_last_is_expected():
    draw = random.Random(1)
    lengths = [draw.randrange(1, 200) for _ in range(400)]
    assert learnt(lengths).expected("m", None) == pytest.approx(100, rel=0.25)
    assert learnt([*lengths, *(1000 for _ in range(400))]).expected("m", None) == pytest.approx(1000, rel=0.1)


def test_names_of_models_do_not_fill_the_memory():
    known = OutputLengths()
    for number in range(1000):
        known.learn(str(number), 10, None)
    assert len(known._medians) < 100
