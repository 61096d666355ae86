"""One fleet of real vLLM servers for all tests of this folder that ask for it. Skipped where vLLM is not installed.

``KVBELT_VLLM_SHAPE`` is ``1p1d`` (default) or ``2p2d``; ``KVBELT_VLLM_ARGUMENTS`` goes to every server, for other block
and chunk sizes, and ``KVBELT_VLLM_PREFILL_ARGUMENTS``, ``KVBELT_VLLM_DECODE_ARGUMENTS`` and
``KVBELT_VLLM_PLAIN_ARGUMENTS`` to some of them; ``KVBELT_VLLM_HOST_GB`` gives prefill servers host memory;
``KVBELT_VLLM_BESIDE=offloading`` puts the connector of each into a ``MultiConnector``, with vLLM's
``OffloadingConnector`` beside it. ``scripts/test-vllm`` runs combinations.
"""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvbelt.ops.processes import SPLIT_ALL
from kvbelt.security.keys import secret_file, trusted_folder, write_new_keys
from tests.channels.memory import MemoryNetwork
from tests.http.support import free_port
from tests.vllm.belts import BeltServer
from tests.vllm.servers import Fleet, Server, Traces, beside_offloading, has_ranks, kvbelt

if TYPE_CHECKING:
    from tests.vllm.collector import Collector

#: Chats may call tools. Which format a parser reads matters little: what is tested is that servers agree.
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A plain server to compare with, prefill and decode servers, and a proxy before them.

    All but the plain one send their traces to a collector: whether they do changes no answer.
    """

    plain: Server
    prefill: list[Server]
    decode: list[Server]
    proxy: Server
    collector: "Collector"
    ready_ns: int  #: until then only the proxy has asked the servers

    def workers(self) -> list[dict[str, object]]:
        """The workers in the proxy's view."""
        try:
            answer = urllib.request.urlopen(self.proxy.url + "/health", timeout=60)  # noqa: S310 -- ours
        except urllib.error.HTTPError as unhealthy:
            answer = unhealthy  # it says the same of its workers while it can use none
        with answer:
            return json.loads(answer.read())["workers"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that kill a server of the deployment run last."""
    items.sort(key=lambda item: item.path.name == "test_serving_failures.py")


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Started once, about a minute on two idle cores."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (scripts/test-vllm installs it)")
    model = os.environ.get("KVBELT_VLLM_MODEL")
    if model is None:
        pytest.skip("KVBELT_VLLM_MODEL names no model folder (scripts/test-vllm sets it)")
    from tests.vllm.collector import collecting  # noqa: PLC0415 -- what it needs comes with vLLM

    number = int(os.environ.get("KVBELT_VLLM_SHAPE", "1p1d")[0])
    logs = tmp_path_factory.mktemp("vllm")
    fleet = Fleet(Path(model), logs)
    extra = [*_arguments(""), *TOOLS]
    of_prefill, of_decode = [*extra, *_arguments("PREFILL_")], [*extra, *_arguments("DECODE_")]
    keys = logs / "keys"
    write_new_keys(keys, ["proxy", "prefill", "decode"])
    notify = free_port()
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as ending:
        collector = ending.enter_context(collecting())
        ending.callback(fleet.stop)
        plain = fleet.start("plain", None, *extra, *_arguments("PLAIN_"), core=0)
        proxied: dict[str, object] = {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": notify}
        if host_gb := float(os.environ.get("KVBELT_VLLM_HOST_GB", "0")):
            proxied |= {"local_cpu": True, "max_local_cpu_size": host_gb}
        told = proxied | keys_for("prefill", keys)
        connectors = beside_offloading if os.environ.get("KVBELT_VLLM_BESIDE") == "offloading" else lambda belt: belt
        # Long prompts take several steps, so that one can be seen in vLLM's metrics while it is computed.
        chunks = () if "--max-num-batched-tokens" in extra else ("--max-num-batched-tokens", "256")
        prefill = [
            fleet.start(
                f"prefill{i}",
                connectors(kvbelt("kv_producer", **told)),
                *of_prefill,
                *chunks,
                core=i % cores,
                traces=by_grpc(collector),
            )
            for i in range(number)
        ]
        # The first loads at once what is at hand; a second one, or one with several ranks, beside its batch.
        one_process = not has_ranks(of_decode)
        decode = [
            fleet.start(
                f"decode{i}",
                connectors(kvbelt("kv_consumer", **proxied, **keys_for("decode", keys))),
                *of_decode,
                core=(i + 1) % cores,
                traces=by_http(collector),
                one_process=one_process and i == 0,
            )
            for i in range(number)
        ]
        fleet.wait()
        proxy = start_proxy(fleet, prefill, decode, notify, keys, "--otlp-endpoint", collector.http)
        found = Deployment(plain, prefill, decode, proxy, collector, 0)
        wait_until(lambda: all(worker["engine_id"] for worker in found.workers()))
        yield replace(found, ready_ns=time.time_ns())


def _arguments(side: str) -> list[str]:
    return shlex.split(os.environ.get(f"KVBELT_VLLM_{side}ARGUMENTS", ""))


def by_grpc(collector: "Collector") -> Traces:
    """Traces over gRPC, vLLM's default."""
    return Traces(collector.grpc, "grpc")


def by_http(collector: "Collector") -> Traces:
    """Traces over HTTP. vLLM needs the whole path."""
    return Traces(collector.http + "/v1/traces", "http/protobuf")


def keys_for(name: str, keys: Path) -> dict[str, str]:
    """A server's settings that name its key and its trusted keys."""
    return {"pd_key_file": str(secret_file(keys, name)), "pd_trusted_keys_dir": str(trusted_folder(keys))}


def start_proxy(
    fleet: Fleet, prefill: list[Server], decode: list[Server], notify: int, keys: Path, *arguments: str
) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "kvbelt", "proxy", "--port", str(port), "--notify-port", str(notify), *arguments]
    command += ["--key-file", str(secret_file(keys, "proxy")), "--trusted-keys-dir", str(trusted_folder(keys))]
    command += SPLIT_ALL
    for kind, servers in (("prefill", prefill), ("decode", decode)):
        command += [f"--{kind}-host", "127.0.0.1", f"--{kind}-port", ",".join(str(server.port) for server in servers)]
    log = fleet.logs / "proxy.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    server = Server("proxy", port, process, log)
    fleet.servers.append(server)
    wait_until(server.ready)
    return server


def wait_until(condition, seconds: float = 120.0) -> None:
    """Poll a condition, with a deadline."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail(f"did not become true within {seconds} s")
        time.sleep(0.05)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop its processes during the block."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@pytest.fixture
def network() -> MemoryNetwork:
    """The network of both ends."""
    return MemoryNetwork()


@pytest.fixture
def prefill(network: MemoryNetwork) -> Iterator[BeltServer]:
    """A prefill worker."""
    server = BeltServer("prefill", network)
    yield server
    server.close()


@pytest.fixture
def decode(network: MemoryNetwork) -> Iterator[BeltServer]:
    """A decode worker."""
    server = BeltServer("decode", network)
    yield server
    server.close()
