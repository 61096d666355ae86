"""What a body may consist of."""

import pytest

from kvbelt.errors import RequestError
from kvbelt.limits import Limits, require_ids_fit

MIB = 1024 * 1024
PIECE = 256 * 1024


def test_a_large_body_is_looked_through_in_pieces():
    """Others have their turn after each of 256 KiB."""
    assert len(list(Limits().looking_through(b"a" * (8 * MIB)))) == 32


def test_a_small_body_is_left_to_its_parser():
    assert list(Limits().looking_through(b"\xff[[[" * 1000)) == []


@pytest.mark.parametrize("part", [b"{", b"[", b'"a"', b"1,1,1,1,1,1,1,1,"])
def test_parts_are_counted_across_pieces(part):
    """So many are allowed; one more is refused, before what follows is looked at."""
    body = b" " * (PIECE - 2) + part * 4
    assert len(list(Limits(json_parts=4).looking_through(body))) == 2
    turns = Limits(json_parts=3).looking_through(body + b" " * (8 * PIECE))
    next(turns)
    with pytest.raises(RequestError, match="json_parts"):
        next(turns)


def test_escaped_quotes_begin_no_string():
    """Not even where a piece ends between the two bytes."""
    body = b" " * (PIECE - 1) + b'\\"' * 20
    assert len(list(Limits(json_parts=1).looking_through(body))) == 2


@pytest.mark.parametrize("before", range(4))
def test_a_character_across_two_pieces_is_one(before):
    text = "a" * before + "\N{GRINNING FACE}" * (MIB // 4)
    list(Limits().looking_through(text.encode()))


def test_bytes_that_are_no_text_are_refused_with_their_place():
    """As the whole body's decoder would name it."""
    body = "é".encode() * MIB + b"\xff" + b"a" * MIB
    with pytest.raises(RequestError) as caught:
        list(Limits().looking_through(body))
    assert caught.value.message == (
        f"the request body is not a JSON object in UTF-8: 'utf-8' codec can't decode byte 0xff in position {2 * MIB}: "
        "invalid start byte"
    )


@pytest.mark.parametrize(("ids", "context"), [(b"[1,2,3]", 3), (b"[ 1, 2, 3 ]", 3), (b"[1,2,3,4]", None), (b"[]", 1)])
def test_ids_within_the_context_are_taken(ids, context):
    require_ids_fit(memoryview(ids), context)


def test_ids_beyond_the_context_are_counted():
    with pytest.raises(RequestError, match="context length is 3 tokens; the prompt has 4") as caught:
        require_ids_fit(memoryview(b"[1,2,3,4]"), 3)
    assert caught.value.code == "context_length_exceeded"
