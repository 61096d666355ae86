"""Names and addresses of hosts in namespaces, and the real thing where this machine allows it."""

import socket
import subprocess
import sys

import pytest

from kvbelt.ops import network
from kvbelt.ops.network import Network, NetworkRefusedError, free_subnet, hosts_of
from tests.ops.support import network_of

#: Greets every connection.
LISTENER = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    sys.stdout.write("listening\\n"); sys.stdout.flush()
    while True:
        server.accept()[0].sendall(b"hello")
"""


def test_every_worker_has_a_host_whose_names_fit():
    """Namespaces are named after the run and the worker; links are short enough for the kernel; addresses differ."""
    hosts = hosts_of(["prefill-0", "decode-11"], tag="4194304z", subnet=300)
    assert [host.namespace for host in hosts.values()] == ["kvbelt-4194304z-prefill-0", "kvbelt-4194304z-decode-11"]
    assert all(len(host.interface) <= 15 for host in hosts.values())
    assert [host.address for host in hosts.values()] == ["198.19.44.2", "198.19.44.3"]


def test_a_network_that_is_in_use_is_passed_over():
    """The next free network is used; an error says when none is left."""
    assert free_subnet(7, "2: eth0    inet 198.18.6.1/24 brd") == 7
    assert free_subnet(7, "2: eth0    inet 198.18.7.1/24 brd") == 8
    everything = "".join(f" 198.{18 + n // 256}.{n % 256}.1/24" for n in range(512))
    with pytest.raises(NetworkRefusedError, match=r"198\.18\.0\.0/15"):
        free_subnet(7, everything)


def test_without_root_the_error_says_so(monkeypatch):
    """Without root the error says so, and nothing is tried."""
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkRefusedError, match="root"), Network(["a"]):
        pass


def test_a_host_is_reached_cut_off_and_reached_again():
    """Packets to a host that is cut off vanish; after mending they arrive; at the end nothing is left."""
    with network_of("a", "b") as hosts:
        place = hosts.places["a"]
        command = [*place.enter, sys.executable, "-S", "-c", LISTENER, place.host]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
            try:
                assert listener.stdout.readline() == "listening\n"
                assert greeting(place.host) == b"hello"
                hosts.cut("a")
                with pytest.raises(OSError, match=r"timed out|No route"):
                    greeting(place.host, within=1.0)
                hosts.mend("a")
                assert greeting(place.host) == b"hello"
                hosts.slow("a", kbit=1000, delay_ms=1)
                assert greeting(place.host) == b"hello"
                hosts.fast("a")
                hosts.fast("a")
            finally:
                listener.kill()
        namespace = place.enter[-1]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert namespace not in left


def test_what_a_killed_run_left_is_removed():
    """The next run removes the namespace and bridge of a killed run."""
    with network_of("a"):
        pass  # skips where it cannot be done
    with subprocess.Popen(["true"]) as gone:
        pass
    subprocess.run(["ip", "netns", "add", f"kvbelt-{gone.pid}a-x"], check=True)
    subprocess.run(["ip", "link", "add", f"kvb{gone.pid}a", "type", "bridge"], check=True)
    network.remove_leftovers()
    left = subprocess.run("ip netns list; ip link", shell=True, capture_output=True, text=True, check=True).stdout  # noqa: S602
    assert f"kvbelt-{gone.pid}a-x" not in left
    assert f"kvb{gone.pid}a" not in left


def greeting(host, within=60.0):
    """What the listener says."""
    with socket.create_connection((host, 5000), timeout=within) as client:
        return client.recv(5)
