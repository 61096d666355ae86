"""Counting refusals, and where a process may listen without keys."""

import logging

import pytest

from kvbelt.errors import SettingsError
from kvbelt.security.loopback import is_loopback, require_keys_beyond_loopback
from kvbelt.security.refusals import LOG_SECONDS, MAX_LABELS, Refusals, Tally


def test_a_flood_is_counted_and_not_logged(caplog):
    """Each reason has one line, and later another one with the number of repeats."""
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            refusals.add("alloc", "malformed", "x")
        refusals.add("init", "malformed", "x")
        assert len(caplog.records) == 2
        now[0] = LOG_SECONDS
        refusals.add("alloc", "malformed", "x")
    assert "999 times" in caplog.messages[-1]
    assert refusals.totals() == {"alloc": {"malformed": 1001}, "init": {"malformed": 1}}


def test_a_peers_words_stay_within_their_line(caplog):
    """A peer's text adds no line break, and its line is short."""
    Refusals().add("alloc", "malformed", "a\nERROR: b" + "c" * 100_000)
    assert "\n" not in caplog.messages[0]
    assert len(caplog.messages[0]) < 500


def test_labels_are_bounded():
    """Peers cannot make labels without limit through their reasons."""
    tally = Tally()
    for number in range(10_000):
        tally.add(f"reason-{number}")
    tally.add("x" * 1000)
    tally.add("reason-0")
    assert len(tally) == MAX_LABELS + 1
    assert tally["reason-0"] == 2
    assert sum(tally.values()) == 10_002


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1", "[::1]"])
def test_loopback_needs_no_keys(host):
    """Only processes of this machine reach loopback."""
    assert is_loopback(host)
    require_keys_beyond_loopback(host, keys=False, insecure=False, setting="s", how="h")


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "*", "10.0.0.7", "decode-0", "localhost.example.com", "127.0.0.1.evil"]
)
def test_elsewhere_needs_keys_or_the_explicit_word(host):
    """The error names the setting, the address and the remedy."""
    with pytest.raises(SettingsError, match=r"s is .*no keys.*the remedy") as raised:
        require_keys_beyond_loopback(host, keys=False, insecure=False, setting="s", how="the remedy")
    assert host in str(raised.value)
    require_keys_beyond_loopback(host, keys=True, insecure=False, setting="s", how="h")
    require_keys_beyond_loopback(host, keys=False, insecure=True, setting="s", how="h")
