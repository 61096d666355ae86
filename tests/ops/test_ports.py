"""Ports: the seed's numbers, free ones, and busy ones."""

import dataclasses
import socket

import pytest

from kvbelt.errors import StartError
from kvbelt.ops import ports as ports_module
from kvbelt.ops.ports import PortUse, check_free, find_free, free_ports, seed_ports
from kvbelt.ops.topology import Topology


@pytest.fixture
def listener():
    """A port with a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_seed_ports_are_the_seeds():
    """2p2d listens where the seed says."""
    ports = seed_ports(Topology(2, 2))
    assert ports == ports_module.Ports(9100, 7500, (7100, 7101), (7200, 7201), (7300, 7301), (7400, 7401))


def test_busy_port_is_named_with_its_owner_and_flag(listener):
    """The error is one line with the port, its owner and the flag that changes it."""
    ports = seed_ports(Topology(1, 1), proxy=listener)
    with pytest.raises(StartError, match=rf"port {listener} for the proxy .*already in use.*--port") as caught:
        check_free(list(ports.uses("127.0.0.1")))
    assert "\n" not in str(caught.value)


def test_worker_port_is_moved_by_auto_ports(listener):
    """The flag for worker ports is --auto-ports."""
    with pytest.raises(StartError, match=r"for prefill-0 .*--auto-ports"):
        check_free([PortUse(listener, "prefill-0", "--auto-ports")])


def test_the_notification_port_is_moved_by_auto_ports():
    """The error says with which option another one is chosen."""
    notify = free_ports(Topology(1, 1)).notify
    with socket.create_server(("127.0.0.1", notify)):
        ports = dataclasses.replace(free_ports(Topology(1, 1)), notify=notify)
        with pytest.raises(StartError, match=rf"port {notify} for the proxy's notifications .* with --auto-ports$"):
            check_free(list(ports.uses("127.0.0.1")))


def test_two_owners_of_one_port_are_both_named():
    """--port 7200 collides with decode-0, and the error comes before anything starts."""
    with pytest.raises(StartError, match="port 7200 is wanted by both the proxy and decode-0"):
        check_free(list(seed_ports(Topology(1, 1), proxy=7200).uses("127.0.0.1")))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_impossible_port_is_refused(port):
    """A number outside the range of ports is refused with the range."""
    with pytest.raises(StartError, match="between 1 and 65535"):
        check_free([PortUse(port, "the proxy", "--port")])


def test_unknown_address_is_refused():
    """An address that this machine does not have is named with the system's reason."""
    with pytest.raises(StartError, match=r"on 192\.0\.2\.1: cannot be bound"):
        check_free([PortUse(find_free(1)[0], "the proxy", "--port", "192.0.2.1")])


def test_free_ports_are_distinct_and_free():
    """Every port of a topology is found once and can be bound."""
    ports = free_ports(Topology(2, 3))
    uses = list(ports.uses("127.0.0.1"))
    assert len({use.port for use in uses}) == 2 + 2 + 3 * 3
    check_free(uses)


def test_free_ports_keep_the_proxys_when_told():
    """--port with --auto-ports fixes the proxy's port alone."""
    assert free_ports(Topology(1, 1), proxy=9100).proxy == 9100


def test_free_ports_lie_below_outgoing_connections():
    """The kernel gives no outgoing connection a port that a worker is about to bind."""
    assert max(find_free(50)) < ports_module._ephemeral_start()


def test_aggregated_server_claims_no_belt_ports():
    """0p1d has no init and alloc ports."""
    uses = list(seed_ports(Topology(0, 1)).uses("127.0.0.1"))
    assert [(use.port, use.owner) for use in uses] == [
        (9100, "the proxy"),
        (7500, "the proxy's notifications"),
        (7200, "both-0"),
    ]


def test_ports_of_other_hosts_are_not_checked():
    """Ports of workers on other hosts are not checked on this host."""
    ports = seed_ports(Topology(1, 2))
    claimed = {use.owner for use in ports.uses("127.0.0.1", elsewhere={"decode-1", "prefill-0"})}
    assert claimed == {
        "the proxy",
        "the proxy's notifications",
        "decode-0",
        "decode-0's handshakes",
        "decode-0's reservations",
    }
