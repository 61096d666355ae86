"""What tests of servers stand on."""

from tests.http.support import free_port


def test_a_free_port_is_given_away_once():
    """Whoever asks for two before listening on either gets two."""
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)
