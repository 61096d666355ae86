"""Judging what a client got."""

import pytest

from kvbelt.ops.chaos.completion import MalformedError, read_error, read_stream, read_whole
from kvbelt.ops.chaos.verdict import Ending, Outcome, judge
from tests.ops.chaos.support import DONE, ERROR, RIGHT, USAGE, chunk, seen, whole

STREAM = chunk("a", 1) + b": a comment\n\n" + chunk("bc", 2, 3, finish="length") + USAGE
ERROR_EVENT = b"data: " + ERROR + b"\n\n"


def outcome(what, *, proxy_away=False):
    """The verdict."""
    return judge(what, RIGHT, proxy_away=proxy_away).outcome


@pytest.mark.parametrize("one", [seen(whole()), seen(STREAM + DONE, stream=True)])
def test_the_same_to_the_token_is_right(one):
    """An equal answer is right, whole or streamed."""
    assert outcome(one) is Outcome.RIGHT


@pytest.mark.parametrize(
    "one",
    [
        seen(whole(ids=(1, 2, 4))),
        seen(whole(ids=(1, 2))),
        seen(whole(text="abd")),
        seen(whole(finish="stop")),
        seen(whole(usage=(5, 2))),
        seen(chunk("a", 9) + USAGE + DONE, stream=True),
        seen(chunk("a", 9) + ERROR_EVENT + DONE, stream=True),
        seen(chunk("a", 9), stream=True, ending=Ending.LEFT),
        seen(STREAM.replace(b'"bc"', b'"bd"') + DONE, stream=True),
    ],
)
def test_anything_else_is_wrong(one):
    """Different tokens, text, finish reason or usage are wrong, even if an error follows or the client leaves."""
    assert outcome(one) is Outcome.WRONG


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (seen(ERROR, status=503), "503 unavailable"),
        (seen(ERROR.replace(b"503", b'1, "reason": "full"'), status=429), "429 unavailable (full)"),
        (seen(chunk("a", 1) + ERROR_EVENT + DONE, stream=True), "in the stream: unavailable"),
    ],
)
def test_an_error_that_says_so_is_honest(one, reason):
    """An error status, or an error event after a right start of a stream, is honest."""
    verdict = judge(one, RIGHT, proxy_away=False)
    assert (verdict.outcome, verdict.reason) == (Outcome.ERROR, reason)


@pytest.mark.parametrize(
    "one",
    [
        seen(ERROR.replace(b"unavailable", b"internal_error"), status=500),
        seen(chunk("a", 1) + ERROR_EVENT.replace(b"unavailable", b"internal_error") + DONE, stream=True),
    ],
)
def test_an_error_of_our_own_making_is_a_failure(one):
    """An internal error is explicit, but no fault explains it."""
    assert outcome(one) is Outcome.INTERNAL


def test_silence_is_a_hang():
    """Silence after the deadline is a hang, whatever came before."""
    assert outcome(seen(STREAM, stream=True, ending=Ending.SILENT)) is Outcome.HANG


@pytest.mark.parametrize(
    "body",
    [
        STREAM,  # no [DONE]
        chunk("a", 1) + USAGE + DONE,  # no end of the choice
        USAGE + DONE,  # no choice
    ],
)
def test_a_stream_that_just_ends_is_a_silent_truncation(body):
    """Each of these streams looks complete to a careless client."""
    assert outcome(seen(body, stream=True)) is Outcome.TRUNCATED


@pytest.mark.parametrize("ending", [Ending.CLOSED, Ending.REFUSED])
def test_a_connection_may_end_only_while_the_proxy_is_away(ending):
    """Without a proxy no process could send an error."""
    assert outcome(seen(status=0, ending=ending)) is Outcome.DROPPED
    assert outcome(seen(status=0, ending=ending), proxy_away=True) is Outcome.ERROR


def test_a_stream_cut_off_while_the_proxy_is_away_is_honest():
    """Its connection ends before the stream does, so no client takes it for complete."""
    assert outcome(seen(chunk("a", 1), stream=True, ending=Ending.CLOSED), proxy_away=True) is Outcome.ERROR


def test_a_client_that_hung_up_is_not_judged():
    """Only what it got before is judged."""
    assert outcome(seen(status=0, ending=Ending.LEFT)) is Outcome.LEFT
    assert outcome(seen(chunk("a", 1), stream=True, ending=Ending.LEFT)) is Outcome.LEFT


def test_a_request_that_is_served_must_not_be_refused():
    """The aggregated server has answered the same request."""
    assert outcome(seen(ERROR, status=400)) is Outcome.REFUSED


@pytest.mark.parametrize(
    "one",
    [
        seen(b"<html>", status=502),
        seen(b'{"error": "no"}', status=500),
        seen(ERROR, status=302),
        seen(b"{}"),
        seen(b"data: {\n\n" + DONE, stream=True),
        seen(STREAM + DONE + chunk("d", 4), stream=True),
        seen(b"event: x\n\n", stream=True),
    ],
)
def test_what_no_client_of_openai_understands_is_malformed(one):
    """Errors without their body, events that are not JSON, and data after the end are malformed."""
    assert outcome(one) is Outcome.MALFORMED


def test_reasons_are_short_and_whole():
    """Reasons name the choice; a choice that ends twice and an invalid error are reported."""
    two = chunk("a", 1) + chunk("b", 2).replace(b'"index": 0', b'"index": 1')
    assert read_stream(two).answer().token_ids == ((1,), (2,))
    with pytest.raises(MalformedError, match="twice"):
        read_stream(chunk("a", 1, finish="stop") * 2)
    with pytest.raises(MalformedError, match="JSON"):
        read_error(b"nonsense")
    with pytest.raises(MalformedError, match="choices"):
        read_whole(b'{"id": 1}')
