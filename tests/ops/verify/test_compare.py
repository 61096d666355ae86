"""Differences between two answers, and whether the reference's own noise explains them."""

import pytest

from kvbelt.ops.verify.answers import Answer
from kvbelt.ops.verify.compare import differences, noise_explains


def test_a_difference_names_its_field_and_how_far_it_goes() -> None:
    got = {"choices": [{"text": "abx", "token_ids": [1, 2, 9], "logprobs": {"p": [-1.0, -2.5]}}]}
    expected = {"choices": [{"text": "abc", "token_ids": [1, 2, 3], "logprobs": {"p": [-1.0, -2.0]}}]}
    found = differences(Answer(200, "", got), Answer(200, "", expected))
    assert [(one.field, one.how_far) for one in found] == [
        ("choices.logprobs.p", "by 0.5"),
        ("choices.text", "equal up to character 2 of 3"),
        ("choices.token_ids", "equal up to 2 of 3"),
    ]
    assert all(one.generated for one in found)


def test_last_digits_of_log_probabilities_may_differ() -> None:
    """And nothing else: an integer is no number with a fraction."""
    assert not differences(Answer(200, "", {"p": -1.0}), Answer(200, "", {"p": -1.001}))
    assert differences(Answer(200, "", {"p": -1.0}), Answer(200, "", {"p": -1}))


def test_a_refusal_is_compared_in_words_and_status() -> None:
    refusal = {"error": {"message": "n is 0", "param": "n"}}
    (one,) = differences(Answer(400, "", refusal), Answer(200, "", {"choices": []}))
    assert (one.field, one.got, one.expected, one.generated) == ("status", "400: n is 0", "200", False)
    (other,) = differences(Answer(400, "", refusal), Answer(400, "", {"error": {"message": "n", "param": "n"}}))
    assert (other.field, other.generated) == ("error.message", False)


@pytest.mark.parametrize(
    ("subject", "reference", "explained"),
    [
        ((1, 1000), (0, 1000), False),
        ((12, 1000), (10, 1000), True),
        ((100, 1000), (10, 1000), False),
        ((3, 100), (1, 100), True),
        ((0, 10), (0, 10), False),
    ],
)
def test_noise_explains_no_more_than_the_reference_has(
    subject: tuple[int, int], reference: tuple[int, int], explained: bool
) -> None:
    """A reference that is always the same explains nothing."""
    assert noise_explains(subject, reference) is explained
