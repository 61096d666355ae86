"""Real vLLM servers in their own pid and network namespaces, as containers have them."""

import os
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvbelt.ops.network import Network
from tests.e2e.prompts import long_text
from tests.ops.support import DIES_WITH_US, OWN_PIDS, network_of
from tests.vllm.asking import a_step, receiver
from tests.vllm.conftest import wait_until
from tests.vllm.servers import Fleet, Server, kvbelt

pytestmark = pytest.mark.e2e

#: At which the KV of the prompt takes twenty seconds.
SLOW_KBIT = 20_000
PROMPT = long_text(900, start=71)

Hosts = tuple[Network, Server, Server]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A network, a prefill server and a decode server."""
    if os.environ.get("KVBELT_VLLM_SHAPE") != "namespaces":
        pytest.skip("its servers need the memory of the others (scripts/test-vllm --short runs it by itself)")
    fleet = Fleet(Path(os.environ["KVBELT_VLLM_MODEL"]), tmp_path)
    with network_of("prefill", "decode") as network:

        def start(name: str, role: str, core: int) -> Server:
            place = network.places[name]
            config = kvbelt(role, pd_peer_host=place.host, pd_insecure=True)
            enter = (*DIES_WITH_US, *place.enter, *OWN_PIDS)
            chunks = ("--max-num-batched-tokens", "256")
            return fleet.start(name, config, *chunks, core=core, host=place.host, enter=enter)

        try:
            made = start("prefill", "kv_producer", 0), start("decode", "kv_consumer", 1)
            fleet.wait()
            yield network, *made
        finally:
            fleet.stop()


def held(decode: Server, label: str = "") -> float:
    """The used bytes of the receive buffer. A server's metrics are those of its last step."""
    a_step(decode)
    return decode.metric("kvbelt_receive_bytes", label)


def in_the_middle_of_a_write(network: Network, prefill: Server, decode: Server, pool: ThreadPoolExecutor) -> None:
    """Send a prompt over a slow link until a part of it has arrived."""
    to = receiver(decode)
    network.slow("prefill", kbit=SLOW_KBIT)
    handoff = {"transfer_id": uuid.uuid4().hex, "receiver": to, "deadline_seconds": 60.0}
    body: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": handoff}
    pool.submit(prefill.post, "/v1/completions", body)
    counter = Path(f"/sys/class/net/{network._hosts['prefill'].interface}/statistics/rx_bytes")
    before = int(counter.read_text(encoding="ascii"))
    wait_until(lambda: int(counter.read_text(encoding="ascii")) > before + 2_000_000)
    assert held(decode)


def test_a_killed_servers_slot_is_free_again(hosts: Hosts) -> None:
    """After SIGKILL in a write the slot is free within 30 s, without a replacement or a restart."""
    network, prefill, decode = hosts
    with ThreadPoolExecutor(1) as pool:
        in_the_middle_of_a_write(network, prefill, decode, pool)
        prefill.signal(signal.SIGKILL)
        wait_until(lambda: held(decode) == 0, 30)


def test_a_stopped_servers_slot_is_kept_until_it_goes_on(hosts: Hosts) -> None:
    """The slot is in quarantine while the server is stopped, and free once it has acknowledged the end."""
    network, prefill, decode = hosts
    with ThreadPoolExecutor(1) as pool:
        in_the_middle_of_a_write(network, prefill, decode, pool)
        prefill.signal(signal.SIGSTOP)
        try:
            wait_until(lambda: held(decode, 'state="quarantined"') > 0)
            for _ in range(30):
                assert held(decode)
        finally:
            network.fast("prefill")
            prefill.signal(signal.SIGCONT)
        wait_until(lambda: held(decode) == 0)
