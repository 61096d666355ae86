"""What a body may consist of."""

import pytest

from kvbelt.errors import RequestError
from kvbelt.limits import Limits

MIB = 1024 * 1024


def test_a_large_body_is_looked_through_in_pieces():
    """Others have their turn after each MiB."""
    assert len(list(Limits().counting(b"a" * (32 * MIB)))) == 32


@pytest.mark.parametrize("part", [b"{", b"[", b'"a"', b"1,1,1,1,"])
def test_parts_are_counted_across_pieces(part):
    """So many are allowed; one more is refused, before what follows is looked at."""
    body = b" " * (MIB - 2) + part * 4
    assert len(list(Limits(json_parts=4).counting(body))) == 2
    turns = Limits(json_parts=3).counting(body + b" " * (8 * MIB))
    next(turns)
    with pytest.raises(RequestError, match="json_parts"):
        next(turns)


def test_escaped_quotes_begin_no_string():
    """Not even where a piece ends between the two bytes."""
    body = b" " * (MIB - 1) + b'\\"' * 20
    assert len(list(Limits(json_parts=1).counting(body))) == 2
