"""Topologies that are accepted, and those that are refused."""

import pytest

from kvbelt.errors import SettingsError
from kvbelt.ops.topology import Topology


@pytest.mark.parametrize(
    ("text", "prefill", "decode"),
    [("1p1d", 1, 1), ("2p2d", 2, 2), ("3P1D", 3, 1), (" 0p2d ", 0, 2), ("12p34d", 12, 34)],
)
def test_parses_counts(text, prefill, decode):
    """XpYd is X prefill workers and Y decode workers."""
    topology = Topology.parse(text)
    assert (topology.prefill, topology.decode, topology.workers) == (prefill, decode, prefill + decode)


def test_no_prefill_worker_means_aggregated():
    """0p1d has workers that do everything themselves; 1p1d has none."""
    assert Topology.parse("0p1d").aggregated
    assert not Topology.parse("1p1d").aggregated


def test_is_written_as_it_is_read():
    """str() of a topology parses to the same topology."""
    assert str(Topology.parse("2P3D")) == "2p3d"


@pytest.mark.parametrize("text", ["", "1p", "1d", "p1d", "1p1", "-1p1d", "1.5p1d", "1p1d2", "1p0d", "0p0d", "101p1d"])
def test_refuses_what_cannot_be_started(text):
    """Anything else is refused with the offending text in the message."""
    with pytest.raises(SettingsError, match="topology") as caught:
        Topology.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)
