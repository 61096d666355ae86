"""The belts of vLLM servers in their own pid and network namespaces, as containers have them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.support import DIES_WITH_US, OWN_PIDS, network_of
from tests.transfer.belts import eventually

pytestmark = pytest.mark.e2e

#: At which the transfer takes eight seconds.
SLOW_KBIT = 2000


class Host:
    """One belt, alone in its namespaces."""

    def __init__(self, network, name, kv_role):
        place = network.places[name]
        enter = [*DIES_WITH_US, *place.enter, *OWN_PIDS]
        self._process = subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.vllm.host_process", kv_role, place.host],
            env={**os.environ, **place.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = json.loads(self._process.stdout.readline())

    @property
    def pid(self):
        """The process id in this machine's namespace."""
        parent = self._process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii"))

    def ask(self, **order):
        """Send an order, and return the answer."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def held(self, state):
        """The used bytes of the receive buffer."""
        return self.ask(do="look")[state]

    def close(self):
        """End the process in any state."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def hosts():
    """A network, a decode belt and a prefill belt."""
    with network_of("decode", "prefill") as network:
        made = Host(network, "decode", "kv_consumer"), Host(network, "prefill", "kv_producer")
        yield network, *made
        for host in made:
            host.close()


def in_the_middle_of_a_write(network, decode, prefill):
    """A transfer on a slow link, until a part of it has arrived."""
    network.slow("prefill", kbit=SLOW_KBIT)
    assert prefill.ask(do="send", id="t", address=decode.address) == "sending"
    eventually(lambda: decode.held("reserved"), "a slot")
    counter = Path(f"/sys/class/net/{network._hosts['prefill'].interface}/statistics/rx_bytes")
    before = int(counter.read_text(encoding="ascii"))
    eventually(lambda: int(counter.read_text(encoding="ascii")) > before + 300_000, "bytes of a write")


def test_a_killed_servers_slot_is_free_again(hosts):
    """After SIGKILL in the middle of a write it is quarantined, and free within 30 s."""
    network, decode, prefill = hosts
    in_the_middle_of_a_write(network, decode, prefill)
    os.kill(prefill.pid, signal.SIGKILL)
    eventually(lambda: decode.held("quarantined"), "its slot in quarantine")
    eventually(lambda: not decode.held("quarantined"), "the slot is free", 30.0)


def test_a_stopped_servers_slot_is_kept_until_its_end_is_known(hosts):
    """It is kept while the server is stopped, and while a cut hides its death; after the repair it is freed."""
    network, decode, prefill = hosts
    in_the_middle_of_a_write(network, decode, prefill)
    os.kill(prefill.pid, signal.SIGSTOP)
    eventually(lambda: decode.held("quarantined"), "its slot in quarantine")
    network.cut("prefill")
    os.kill(prefill.pid, signal.SIGKILL)
    for _ in range(50):
        assert decode.held("quarantined")
    network.fast("prefill")
    network.mend("prefill")
    eventually(lambda: not decode.held("quarantined"), "the slot is free", 60.0)
