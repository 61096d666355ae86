"""The support of the tests of servers."""

from tests.http.support import free_port


def test_a_free_port_is_given_away_once():
    """Two calls before listening give two ports."""
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)
