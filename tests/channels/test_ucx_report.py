"""UCX's report of the transports that it has chosen."""

import os
import subprocess
import sys

import msgspec
import pytest
import torch

from kvbelt.channels.choice import Choice
from kvbelt.channels.nixl import NixlChannel
from kvbelt.channels.ucx_report import UcxReport, choices_in
from kvbelt.channels.ucx_resources import resources_in
from kvbelt.ops.doctor.nixl_measurement import NixlMeasurement
from kvbelt.paged_copy import region_of
from kvbelt.wire.about import TransportChoice

#: As UCX 1.23 writes it; the second table's largest messages go another way than its smallest.
SAID = """\
[1795546609.703030] [vm:1 :0]     ucp_context.c:2753 UCX  INFO  Version 1.23.0 (loaded from /x/libucp.so)
[1795546609.718431] [vm:1 :0]   +--------+-------------+-----------------------------------+
[1795546609.718431] [vm:1 :0]   | a self cfg#0                                             |
[1795546609.718431] [vm:1 :0]   | remote memory write by ucp_put* from host memory to host |
[1795546609.718431] [vm:1 :0]   +--------+-------------+-----------------------------------+
[1795546609.718431] [vm:1 :0]   | Range  | Description |              Config               |
[1795546609.718431] [vm:1 :0]   +--------+-------------+-----------------------------------+
[1795546609.718431] [vm:1 :0]   | 0..inf | zero-copy   | cma/memory                        |
[1795546609.718431] [vm:1 :0]   +--------+-------------+-----------------------------------+
[1795546609.721392] [vm:1 :0]   +------------+--------------------+---------------+
[1795546609.721392] [vm:1 :0]   | a inter-node cfg#2                              |
[1795546609.721392] [vm:1 :0]   | remote memory write by ucp_put* from cuda/GPU0 to cuda |
[1795546609.721392] [vm:1 :0]   +------------+--------------------+---------------+
[1795546609.721392] [vm:1 :0]   |   Range    |    Description     |    Config     |
[1795546609.721392] [vm:1 :0]   +------------+--------------------+---------------+
[1795546609.721392] [vm:1 :0]   |          0 | short              | tcp/lo        |
[1795546609.721392] [vm:1 :0]   | 1..inf     | zero-copy          | rc_mlx5/mlx5_0:1 |
[1795546609.721392] [vm:1 :0]   +------------+--------------------+---------------+
"""


def test_the_largest_messages_transport_is_read_from_each_table() -> None:
    """Scope, operation, memory and transport of the largest messages are read from each table."""
    assert list(choices_in(SAID)) == [
        Choice("self", "write", "host", "cma/memory"),
        Choice("inter-node", "write", "cuda", "rc_mlx5/mlx5_0:1"),
    ]


def test_what_ucx_could_use_is_read_from_its_context() -> None:
    """A context's transports and devices are listed once each."""
    said = """\
#            md 1  :  component 1  tcp
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 5  :  md 4  dev 0  flags -- cma/memory
#      resource 6  :  md 4  dev 0  flags a- cma/memory
"""
    assert resources_in(said) == ["tcp/eth0", "cma/memory"]


def test_other_lines_mean_nothing() -> None:
    """Other lines of the log are ignored."""
    assert list(choices_in("nonsense\n| a | b |\n+---+\n" + SAID.partition("Config")[0])) == []


def test_only_transports_of_registered_memory_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX's choice for host memory is left out where only GPU memory is registered."""
    host, cuda = (Choice("intra-node", "write", *way) for way in (("host", "tcp/lo"), ("cuda", "cuda_ipc/cuda")))
    monkeypatch.setattr(UcxReport, "choices", lambda _: (host, cuda))
    memory = torch.zeros(1 << 12, dtype=torch.uint8)
    channel = NixlChannel(f"ways-{os.getpid()}")
    try:
        channel.open({"cpu"})
        channel.register(region_of(memory))
        assert channel.choices() == (host,)
    finally:
        channel.close()


def test_nixl_says_that_it_takes_tcp_where_nothing_else_is_allowed() -> None:
    """Two processes limited to TCP report TCP (tests/e2e/test_doctor.py has the other transports)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    command = [sys.executable, "-m", "kvbelt.ops.doctor.nixl_pair", "cpu"]
    done = subprocess.run(command, env=environment | {"UCX_TLS": "tcp"}, capture_output=True, timeout=240, check=True)
    measured = msgspec.json.decode(done.stdout, type=NixlMeasurement)
    assert not measured.error
    writes = [road for road in measured.transports if road.operation == "write"]
    assert writes
    assert all(road.over_tcp and road.scope == "intra-node" for road in writes), writes
    assert any(road.operation == "read" for road in measured.transports)
    assert any(one.startswith("tcp/") for one in measured.resources)
    assert not any(one.startswith("cma/") for one in measured.resources)  # UCX_TLS forbids it
    assert measured.write_gb_per_second > 0
    assert measured.read_us > 0


@pytest.mark.parametrize(
    ("transport", "tcp"),
    [
        ("tcp/eth0", True),
        ("52% on tcp/lo and 48% on tcp/eth0", True),
        ("cma/memory", False),
        ("50% on rc_mlx5/mlx5_0:1 and 50% on tcp/eth0", False),
        ("", False),
    ],
)
def test_a_transport_that_is_only_tcp(transport: str, tcp: bool) -> None:
    """A choice is over TCP if all its shares are."""
    assert TransportChoice("intra-node", "write", "host", transport).over_tcp is tcp
