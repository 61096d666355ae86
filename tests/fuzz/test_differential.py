"""What the differential fuzz draws, and what it leaves out."""

import itertools
from collections import Counter

from kvbelt.wire.fields import FIELDS
from tests.docs.pages import DOCS, cells
from tests.fuzz.differential import both_accept_or_refuse, same
from tests.fuzz.known import DIFFERENCES
from tests.fuzz.requests import VALUES, requests


def test_every_field_is_drawn():
    """A new field needs values."""
    assert set(VALUES) >= set(FIELDS)
    drawn = Counter(name for request in itertools.islice(requests(1), 2000) for name in request.members)
    assert set(VALUES) <= set(drawn)


def test_a_seed_draws_the_same_requests():
    """So a difference can be repeated."""
    assert list(itertools.islice(requests(5), 50)) == list(itertools.islice(requests(5), 50))


def test_every_difference_from_vllm_is_in_the_docs():
    """With its reason."""
    lines = (DOCS / "differences.md").read_text(encoding="utf-8").splitlines()
    rows = [cells(line) for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == list(DIFFERENCES)


def test_answers_may_differ_in_the_last_digits_of_log_probabilities_alone():
    assert same({"logprobs": [-1.00001], "text": "a"}, {"logprobs": [-1.00002], "text": "a"})
    assert not same({"logprobs": [-1.0]}, {"logprobs": [-1.1]})
    assert not same({"text": "a"}, {"text": "b"})


def test_a_refusal_inside_a_stream_is_a_refusal():
    """As vLLM refuses what it finds late."""
    ours = {"status": 400, "error": {"message": "no"}}
    late = {"status": 200, "streamed": True, "body": {"error": {"message": "no"}}}
    accepted = {"status": 200, "streamed": True, "body": {}}
    assert both_accept_or_refuse(ours, late)
    assert not both_accept_or_refuse(ours, accepted)
    assert not both_accept_or_refuse(accepted, late)
