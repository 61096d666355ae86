"""Workers on hosts of their own, in network namespaces: cables pulled in the middle of a transfer, and slow ones."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from kvbelt.ops.network import Network
from kvbelt.ops.tiny_model import tiny_model_dir
from tests.e2e.asking import Answer, ask, until
from tests.e2e.breaking import Asking, assert_right, bytes_held
from tests.e2e.conftest import deployment_spec
from tests.ops.support import network_of

pytestmark = pytest.mark.e2e

#: The tiny model has 2 KiB of KV a token.
SHORT: dict[str, Any] = {"prompt": "Twelve monkeys", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
LONG: dict[str, Any] = {**SHORT, "prompt": "".join(f"{n} monkeys sat on {n * 7 % 97} walls. " for n in range(60))}
OTHER: dict[str, Any] = {**LONG, "prompt": LONG["prompt"][::-1]}

#: At which LONG's 3 MiB take ten seconds and more, and a health check well below one.
SLOW_KBIT = 2000


@dataclass
class Hosts:
    """A 1p1d whose workers have hosts of their own."""

    network: Network
    deployment: SyncDeployment
    expected: dict[str, Answer]

    @property
    def prefill(self) -> RunningProcess:
        """The prefill worker."""
        return self.deployment.process("prefill-0")

    @property
    def decode(self) -> RunningProcess:
        """The decode worker."""
        return self.deployment.process("decode-0")

    def ask(self, body: dict[str, Any]) -> Asking:
        """Send a request through the proxy."""
        return Asking(self.deployment.url, body)

    def in_transfer(self) -> None:
        """Wait until the decode worker has granted a slot."""
        until(lambda: bytes_held(self.decode)["reserved"], what="a transfer under way")

    def nothing_held(self) -> None:
        """Wait until the decode worker's buffer is empty."""
        until(lambda: not any(bytes_held(self.decode).values()), what="every slot given back")

    def together_again(self) -> None:
        """Wait until the pair works. Errors may come before, but no wrong answer."""

        def over_the_belt() -> bool:
            reply = self.ask(SHORT).answer_or_error()
            if reply.status_code in {502, 503}:
                return False
            return assert_right(reply, self.expected["short"]).startswith("first-token")

        until(over_the_belt, what="an answer over the belt")


@pytest.fixture(scope="module")
def started() -> Iterator[Hosts]:
    """The 1p1d, and a 0p1d of the same model for the right answers."""
    model: Path = tiny_model_dir(print)
    with network_of("prefill-0", "decode-0") as network:
        # Room for one LONG: the next one takes the same memory. What is asked again is sent again, and nobody looks
        # whether what came is what was sent: the answers must show it.
        small = {
            "kv_gb": 0.05,
            "buffer_gb": 0.004,
            "worker_args": ("--no-prefix-caching",),
            "belt": {"pd_verify": "off"},
        }
        with running(deployment_spec(model, "0p1d", **small)) as aggregated:
            expected = {name: ask(aggregated.url, body, stream=False) for name, body in
                        {"short": SHORT, "long": LONG, "other": OTHER}.items()}  # fmt: skip
        spec = deployment_spec(model, "1p1d", places=network.places, notify_host=network.gateway, **small)
        with running(spec) as deployment:
            yield Hosts(network, deployment, expected)


@pytest.fixture
def hosts(started: Hosts) -> Iterator[Hosts]:
    """The working 1p1d; it works again after each test."""
    started.together_again()
    yield started
    for name in ("prefill-0", "decode-0"):
        started.network.mend(name)
        started.network.fast(name)
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.prefill.pid, signal.SIGCONT)


def test_a_slow_cable_costs_time_only(hosts: Hosts) -> None:
    """Over a link of 10 Mbit/s the KV takes seconds and arrives."""
    hosts.network.slow("prefill-0", kbit=5 * SLOW_KBIT)
    path = assert_right(hosts.ask(LONG).answer_or_error(), hosts.expected["long"])
    assert not path.startswith("local")


@pytest.mark.parametrize("side", ["prefill-0", "decode-0"])
def test_cut_in_the_middle_of_a_transfer(hosts: Hosts, side: str) -> None:
    """A cut host leaves an answer or an honest error. After the repair every slot is free and the pair works."""
    hosts.network.slow("prefill-0", kbit=SLOW_KBIT)
    request = hosts.ask(LONG)
    hosts.in_transfer()
    hosts.network.cut(side)
    reply = request.answer_or_error()
    if side == "prefill-0":  # the decode worker is there, and does it all
        assert assert_right(reply, hosts.expected["long"]).startswith("local; reason=")
    else:  # there is no other one
        assert reply.status_code in {502, 503}, reply.text
        assert reply.json()["error"]["message"]
    hosts.network.fast("prefill-0")
    hosts.network.mend(side)
    hosts.together_again()
    hosts.nothing_held()


def test_a_writer_that_was_stopped_wakes_up_behind_a_cut(hosts: Hosts) -> None:
    """A writer that was stopped and cut off wakes up and writes into no other request's KV."""
    hosts.network.slow("prefill-0", kbit=SLOW_KBIT)
    request = hosts.ask(LONG)
    hosts.in_transfer()
    os.kill(hosts.prefill.pid, signal.SIGSTOP)
    hosts.network.cut("prefill-0")
    assert assert_right(request.answer_or_error(), hosts.expected["long"]).startswith("local; reason=")
    until(lambda: bytes_held(hosts.decode)["quarantined"], what="the writer's slot in quarantine")
    os.kill(hosts.prefill.pid, signal.SIGCONT)
    hosts.network.fast("prefill-0")
    assert bytes_held(hosts.decode)["quarantined"], "its writer has not been heard"
    hosts.network.mend("prefill-0")
    # What is late arrives in these moments, while other prompts ask for slots.
    for _ in range(5):
        assert_right(hosts.ask(OTHER).answer_or_error(), hosts.expected["other"])
    hosts.together_again()
    hosts.nothing_held()
