"""A decode worker and prefill workers in their own pid and network namespaces, as containers have them.

No proxy: the test hands prompts over itself, so that it knows which worker writes when.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kvbelt.ops.network import Network
from kvbelt.ops.processes import Place
from kvbelt.ops.tiny_model import tiny_model_dir
from kvbelt.security.keys import secret_file, trusted_folder, write_new_keys
from tests.e2e.asking import get, until
from tests.ops.support import DIES_WITH_US, OWN_PIDS, network_of

pytestmark = pytest.mark.e2e

#: The tiny model has 2 KiB of KV a token: 3 MiB.
LONG = "".join(f"{n} monkeys sat on {n * 7 % 97} walls. " for n in range(60))
SHORT = "Twelve monkeys sat on a wall and looked at the sea."

#: At which LONG takes twelve seconds.
SLOW_KBIT = 2000

#: Everything a dead worker held is free again after so long.
FREE_SECONDS = 30.0


class Worker:
    """One worker, alone in its namespaces."""

    def __init__(self, place: Place, port: int, *arguments: object) -> None:
        self.url = f"http://{place.host}:{port}"
        enter = (*DIES_WITH_US, *place.enter, *OWN_PIDS)
        command = (sys.executable, "-m", "kvbelt", "worker", "--port", str(port), *map(str, arguments))
        small = ("--device", "cpu", "--threads", "1", "--kv-gb", "0.05", "--no-prefix-caching")
        self._process = subprocess.Popen([*enter, *command, *small], env={**os.environ, **place.env})

    @property
    def pid(self) -> int:
        """The worker's process id in this machine's namespace."""
        parent = self._process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii"))

    @property
    def running(self) -> bool:
        """Whether the worker's first process still runs."""
        return self._process.poll() is None

    def ready(self) -> None:
        """Wait until the worker is ready."""

        def answers() -> bool:
            assert self.running
            with contextlib.suppress(httpx.TransportError):
                return get(f"{self.url}/health").status_code == 200
            return False

        until(answers, what="a worker that is ready")

    def health(self) -> dict[str, Any]:
        """The worker's own health."""
        body: dict[str, Any] = get(f"{self.url}/health").json()
        return body

    def held(self, state: str) -> int:
        """The used bytes of its receive buffer."""
        return int(self.health()["belt"][f"bytes_{state}"])

    def ask(self, prompt: str, max_tokens: int, params: dict[str, Any] | None = None) -> Any:
        """The tokens of one answer."""
        body = {
            "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        if params is not None:
            body["kv_transfer_params"] = params
        reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["token_ids"]

    def stop(self) -> None:
        """End the worker in any state."""
        self._process.kill()
        self._process.wait()


class Hosts:
    """The workers of one test."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network = network
        self._directory = directory
        self._model = tiny_model_dir(print)
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(4)
        self._workers: list[Worker] = []
        write_new_keys(directory, ["all"])
        address = network.places["decode"].host
        ports = {"pd_peer_init_port": 7300, "pd_peer_alloc_port": 7400}
        self.decode = self.start("decode", "decode", address, 7200, pd_role="receiver", pd_peer_host=address, **ports)
        self.decode.ready()

    def start(self, name: str, role: str, host: str, port: int, **own: Any) -> Worker:
        """Start a worker with the shared key."""
        config = self._directory / f"{name}.yaml"
        belt = {
            "enable_pd": True, "transfer_channel": "nixl", "pd_buffer_size": 8 << 20, "pd_buffer_device": "cpu",
            "pd_verify": "off", "pd_key_file": str(secret_file(self._directory, "all")),
            "pd_trusted_keys_dir": str(trusted_folder(self._directory)),
        }  # fmt: skip
        config.write_text(yaml.safe_dump(belt | own), encoding="utf-8")
        arguments = ("--role", role, "--host", host, "--config", config, "--model", self._model)
        self._workers.append(Worker(self.network.places[name], port, *arguments))
        return self._workers[-1]

    def prefill(self, name: str) -> Worker:
        """Start a prefill worker. Each has the same address on its own host."""
        return self.start(name, "prefill", "0.0.0.0", 7100, pd_role="sender")

    def send(self, worker: Worker, prompt: str) -> tuple[str, "Future[Any]"]:
        """Begin to send a prompt's KV to the decode worker."""
        name = f"t{next(self._numbers)}"
        params = {"transfer_id": name, "receiver": self.decode.health()["receiver"], "deadline_seconds": 60.0}
        return name, self._threads.submit(worker.ask, prompt, 1, params)

    def in_the_middle_of_a_write(self, name: str, worker: Worker) -> str:
        """Send a long prompt over a slow link until a part of it has arrived."""
        self.network.slow(name, kbit=SLOW_KBIT)
        counter = Path(f"/sys/class/net/{self.network._hosts[name].interface}/statistics/rx_bytes")
        transfer, _ = self.send(worker, LONG)
        until(lambda: self.decode.held("reserved"), what="a slot")
        before = int(counter.read_text(encoding="ascii"))
        until(lambda: int(counter.read_text(encoding="ascii")) > before + 300_000, what="bytes of a write")
        return transfer

    def handed_over(self, worker: Worker, prompt: str) -> Any:
        """The decode worker's answer from KV of a prefill worker."""
        transfer, sent = self.send(worker, prompt)
        answer = self.decode.ask(prompt, 8, {"transfer_id": transfer, "deadline_seconds": 30.0})
        sent.result()
        return answer

    def nothing_is_held(self, seconds: float) -> None:
        """Wait until the first decode process has freed every slot."""
        until(
            lambda: not any(self.decode.held(state) for state in ("reserved", "committed", "quarantined")),
            what="every slot free",
            within=seconds,
        )
        assert self.decode.running

    def close(self) -> None:
        """End everything."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A decode worker, and hosts for two prefill workers."""
    with network_of("decode", "a", "b") as network:
        made = Hosts(network, tmp_path)
        yield made
        made.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_killed_workers_slot_is_free_again(hosts: Hosts, replaced: bool) -> None:
    """This holds with or without a worker that replaces the killed one."""
    killed = hosts.prefill("a")
    killed.ready()
    hosts.in_the_middle_of_a_write("a", killed)
    os.kill(killed.pid, signal.SIGKILL)
    until(lambda: hosts.decode.held("quarantined"), what="its slot in quarantine")
    if replaced:
        hosts.prefill("a").ready()
    hosts.nothing_is_held(FREE_SECONDS)


def test_a_stopped_workers_slot_is_kept(hosts: Hosts) -> None:
    """The stopped worker may wake up. Its late bytes land in no other request's KV."""
    stopped, other = hosts.prefill("a"), hosts.prefill("b")
    stopped.ready()
    other.ready()
    expected = {prompt: hosts.decode.ask(prompt, 8) for prompt in (LONG, SHORT)}
    hosts.in_the_middle_of_a_write("a", stopped)
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: hosts.decode.held("quarantined"), what="its slot in quarantine")
    kept = hosts.decode.held("quarantined")
    for _ in range(3):
        for prompt, tokens in expected.items():
            assert hosts.handed_over(other, prompt) == tokens
    assert hosts.decode.held("quarantined") == kept
    os.kill(stopped.pid, signal.SIGCONT)
    for _ in range(3):
        for prompt, tokens in expected.items():
            assert hosts.handed_over(other, prompt) == tokens
    hosts.nothing_is_held(60.0)
    hosts.network.fast("a")
    assert hosts.handed_over(stopped, SHORT) == expected[SHORT]


def test_two_workers_of_one_address_and_one_key_are_two(hosts: Hosts) -> None:
    """The handshake of the second leaves the first one's slot alone."""
    first, second = hosts.prefill("a"), hosts.prefill("b")
    first.ready()
    second.ready()
    expected = {prompt: hosts.decode.ask(prompt, 8) for prompt in (LONG, SHORT)}
    transfer = hosts.in_the_middle_of_a_write("a", first)
    answer = hosts._threads.submit(hosts.decode.ask, LONG, 8, {"transfer_id": transfer, "deadline_seconds": 60.0})
    before = hosts.decode.held("reserved")
    assert before
    assert hosts.handed_over(second, SHORT) == expected[SHORT]
    assert hosts.decode.held("reserved") == before
    hosts.network.fast("a")
    assert answer.result() == expected[LONG]
    arrived = hosts.decode.health()["belt"]["received_total"]
    assert arrived == {"done": 2}, arrived
