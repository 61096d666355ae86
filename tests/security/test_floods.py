"""A hostile process beside a deployment: transfers of others still finish, every byte right."""

import subprocess
import sys

import pytest

from kvbelt.security.keys import KeyPair, new_key_pair
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.security.support import belts, deployment
from tests.transfer.belts import Side, eventually, transfer_once

pytestmark = pytest.mark.e2e

#: What the flooder does, with which key, and what is counted of it, at least so often.
FLOODS = {
    "bytes that are not ZeroMQ": ("rubbish", "none", "handshake", 100),
    "connections that say nothing, or one byte now and then": ("silence", "none", "handshake", 0),
    "handshakes with an unknown key": ("handshakes", "unknown", "unknown_key", 100),
    "messages without a key": ("messages", "none", "handshake", 8),  # one a connection: its libzmq tries again slowly
    "messages with a trusted key": ("messages", "trusted", "malformed", 1000),
}


@pytest.fixture
def flood():
    """Starts a flooder, and ends it after the test."""
    processes = []

    def start(what: str, d: Side, own: KeyPair | None) -> None:
        address = d.belt.receiver_address()
        arguments = [what, str(address.init_port), str(address.alloc_port), address.public_key or ""]
        arguments += [own.public, own.secret] if own is not None else ["", ""]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.security.flooder", *arguments], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "flooding\n"

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def counted(d: Side, reason: str) -> int:
    """The number of refusals for this reason, on both ports."""
    return sum(counts.get(reason, 0) for counts in d.belt.snapshot().refused_total.values())


@pytest.mark.parametrize("case", FLOODS)
def test_transfers_finish_beside_a_flood(flood, case):
    """A connected worker goes on, a new one is let in, and no message of the flood is accepted."""
    what, key, reason, least = FLOODS[case]
    keys = deployment("p", "p2", "d", "q")
    own = {"none": None, "unknown": new_key_pair(), "trusted": keys["q"].own}[key]
    network = MemoryNetwork()
    with (
        Side("d", "decode", MemoryChannel("d", network), settings=belts(keys["d"])) as d,
        Side("p", "prefill", MemoryChannel("p", network), settings=belts(keys["p"])) as p,
    ):
        p.fill(1)
        transfer_once(p, d, "before", 100)
        flood(what, d, own)
        eventually(lambda: counted(d, reason) >= least, "the flood has come")
        for number in range(10):
            transfer_once(p, d, f"a{number}", 100, seed=number)
        with Side("p2", "prefill", MemoryChannel("p2", network), settings=belts(keys["p2"])) as p2:
            p2.fill(2)
            for number in range(3):
                transfer_once(p2, d, f"b{number}", 100, seed=number)
        snapshot = d.belt.snapshot()
        assert snapshot.received_total == {"done": 14}
        assert snapshot.bytes_reserved == snapshot.bytes_quarantined == 0


def test_transfers_finish_beside_a_flood_on_ports_without_keys(flood):
    """On loopback without keys only the bounds protect the belt."""
    network = MemoryNetwork()
    with (
        Side("d", "decode", MemoryChannel("d", network), settings=belts(None)) as d,
        Side("p", "prefill", MemoryChannel("p", network), settings=belts(None)) as p,
    ):
        p.fill(1)
        flood("messages", d, None)
        eventually(lambda: counted(d, "malformed") > 1000, "the flood has come")
        for number in range(10):
            transfer_once(p, d, f"a{number}", 100, seed=number)
        assert d.belt.snapshot().received_total == {"done": 10}
