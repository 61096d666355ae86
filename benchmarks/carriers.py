"""The same KV through NIXL (within the host, and over TCP), Mooncake (TCP) and a real Redis, from process to process.

Time runs from "the sender has the bytes in its memory" to "the receiver has them in its own, and knows"; every byte of
every round is compared. NIXL and Mooncake write into the receiver's memory (kvbelt's channels, without the belt: no
gather, no scatter), one span a layer. Redis is a separate server on loopback, without persistence. The sender sets one
value a layer in one pipeline, directly from its memory; the receiver gets them with one command and copies them into
its memory (redis-py with hiredis). memcpy is the C library's within one process, the limit of the machine. The rounds
of all systems alternate, so that other load on the machine affects them alike; ratios are taken within a round.

A second measurement is the duration of a new pair's first write, with ``Channel.connect`` half a second before it (as
in the belt's handshake) and without.

Needs redis-server (Debian: redis-server), and the extras ``mooncake`` and ``bench``.

    python -m benchmarks.carriers [--rounds 15] [--pairs 10] [--json FILE]
"""

import ctypes
import multiprocessing
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from benchmarks import _carriers
from benchmarks._run import Summary, figure, finish, note, parser, summarise, table

#: By name of the carrier, as tables show it.
KINDS = {"nixl": "NIXL, cma", "nixl-tcp": "NIXL, TCP", "mooncake": "Mooncake, TCP", "redis": "Redis, TCP"}
WARM_UP_ROUNDS = 3
TIMEOUT_SECONDS = 60.0

#: SmolLM2-135M in fp32: keys and values of 3 heads of 64 in each of 30 layers.
NUM_LAYERS = 30
TOKEN_BYTES = 2 * 3 * 64 * 4

OPENING_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Case:
    """One size."""

    num_tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and bytes of each layer."""
        return NUM_LAYERS, self.num_tokens * TOKEN_BYTES

    @property
    def num_bytes(self) -> int:
        return NUM_LAYERS * self.num_tokens * TOKEN_BYTES

    @property
    def name(self) -> str:
        return f"{self.num_bytes / 1e6:,.{1 if self.num_bytes < 1e7 else 0}f} MB, {self.num_tokens:,} tokens"


CASES = [Case(30), Case(1000), Case(5800)]


class Pair:
    """Both processes of one channel or server."""

    def __init__(self, kind: str, case: Case, redis_port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._kind = kind
        self._here, sender_end = context.Pipe()
        self._there, receiver_end = context.Pipe()
        tell, told = context.Pipe()
        common = (kind, case.shape, redis_port)
        self._processes = [
            context.Process(target=_carriers.run_receiver, args=(*common, receiver_end, told), daemon=True),
            context.Process(target=_carriers.run_sender, args=(*common, sender_end, tell), daemon=True),
        ]
        for process in self._processes:
            process.start()
        self._here.send(self._heard(self._there))
        self._heard(self._here)

    def move(self, number: int) -> float:
        """Seconds of one round; every byte is compared."""
        self._there.send(number)
        self._heard(self._there)
        self._here.send(number)
        began = self._heard(self._here)
        ended, right = self._heard(self._there)
        if not right:
            raise SystemExit(f"{KINDS[self._kind]}: the bytes of round {number} differ")
        return float(ended - began)

    def _heard(self, connection: Any) -> Any:
        if not connection.poll(TIMEOUT_SECONDS):
            raise SystemExit(f"{KINDS[self._kind]}: no answer within {TIMEOUT_SECONDS:g} s")
        return connection.recv()

    def close(self) -> None:
        for connection, process in zip((self._there, self._here), self._processes, strict=True):
            connection.send(None)
            process.join(TIMEOUT_SECONDS)


@contextmanager
def redis_server() -> Iterator[int]:
    """A Redis server on a free port, which keeps nothing on disk."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("redis-server is not installed (Debian: redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        words = [
            binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            client = _carriers.redis_client(port)
            give_up = time.monotonic() + 10
            while not _answers(client):
                if time.monotonic() > give_up:
                    raise SystemExit("redis-server does not answer")
                time.sleep(0.05)
            yield port
        finally:
            server.terminate()
            server.wait()


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except OSError:
        return False
    except Exception as error:
        if type(error).__name__ == "ConnectionError":  # redis-py's own
            return False
        raise


def memcpy(case: Case) -> Callable[[], float]:
    """Copies as many bytes within this process."""
    here, there = np.ones(case.num_bytes, dtype=np.uint8), np.ones(case.num_bytes, dtype=np.uint8)

    def copy() -> float:
        began = time.perf_counter()
        ctypes.memmove(there.ctypes.data, here.ctypes.data, case.num_bytes)
        return time.perf_counter() - began

    return copy


def measure(case: Case, rounds: int, redis_port: int) -> dict[str, Any]:
    """All rounds of one size."""
    copy = memcpy(case)
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *KINDS)}
    with ExitStack() as stack:
        pairs = {kind: Pair(kind, case, redis_port) for kind in KINDS}
        for pair in pairs.values():
            stack.callback(pair.close)
        for number in range(1, WARM_UP_ROUNDS + rounds + 1):
            seconds["memcpy"].append(copy())
            for kind, pair in pairs.items():
                seconds[kind].append(pair.move(number))
    seconds = {name: values[WARM_UP_ROUNDS:] for name, values in seconds.items()}
    return {
        "case": case.name,
        "bytes": case.num_bytes,
        "ms": {name: summarise(1e3 * value for value in values) for name, values in seconds.items()},
        "gb_per_s": {name: summarise(case.num_bytes / 1e9 / v for v in values) for name, values in seconds.items()},
        "times_nixl": {
            name: summarise(v / nixl for v, nixl in zip(values, seconds["nixl"], strict=True))
            for name, values in seconds.items()
        },
    }


def first_writes(kind: str, pairs: int) -> dict[str, Summary]:
    """Milliseconds of a new pair's first 4 KiB, alternately with and without connecting before."""
    context = multiprocessing.get_context("spawn")
    ends = {}
    one, other = context.Pipe()
    for role, between in (("receiver", one), ("sender", other)):
        control, far = context.Pipe()
        process = context.Process(target=_carriers.run_first_writes, args=(kind, role, far, between), daemon=True)
        process.start()
        ends[role] = control, process
    taken: dict[str, list[float]] = {"connected": [], "not connected": []}
    for number in range(2 * pairs + 2):
        connect = bool(number % 2)
        for control, _ in ends.values():
            control.send((connect, OPENING_SECONDS))
        milliseconds = [control.recv() for control, _ in ends.values()][1]
        if number >= 2:
            taken["connected" if connect else "not connected"].append(milliseconds)
    for control, process in ends.values():
        control.send(None)
        process.join(TIMEOUT_SECONDS)
    return {name: summarise(values) for name, values in taken.items()}


def plain(value: Any) -> Any:
    if isinstance(value, Summary):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--pairs", type=int, default=10, help="new pairs of the second measurement")
    options = arguments.parse_args()
    results = []
    with redis_server() as port:
        for case in CASES:
            note(f"measuring {case.name}")
            results.append(measure(case, options.rounds, port))
    names = {"memcpy": "memcpy", **KINDS}
    head = ["ms", *names.values()]
    shown = [table(head, [[r["case"], *(str(r["ms"][name]) for name in names)] for r in results]), ""]
    head = ["times NIXL, cma", *names.values()]
    shown += [table(head, [[r["case"], *(str(r["times_nixl"][name]) for name in names)] for r in results]), ""]
    head = ["GB/s", *names.values()]
    shown += [table(head, [[r["case"], *(figure(r["gb_per_s"][name].median) for name in names)] for r in results]), ""]
    firsts = {}
    for kind in ("nixl", "nixl-tcp", "mooncake"):
        note(f"measuring first writes of {KINDS[kind]}")
        firsts[kind] = first_writes(kind, options.pairs)
    head = ["first 4 KiB of a new pair, ms", "not connected before", "connected before"]
    rows = [[KINDS[kind], str(taken["not connected"]), str(taken["connected"])] for kind, taken in firsts.items()]
    shown.append(table(head, rows))
    results_json = {"moves": results, "first_writes": firsts}
    packages = ("mooncake-transfer-engine-non-cuda", "redis", "hiredis")
    finish("carriers", "\n".join(shown), plain(results_json), options.json, packages=packages)


if __name__ == "__main__":
    main()
