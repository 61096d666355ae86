"""Benchmark 5: what the proxy alone costs, on one core, next to a plain aiohttp proxy and to no proxy at all.

    python -m benchmarks.proxy [--rounds 5] [--seconds 3] [--json FILE]

The proxy under test has core 0 to itself; stand-in engines and load generator share core 1. Rounds are
interleaved, figures are medians with their spread (lowest to highest round). "No proxy" is a client that asks
both engines itself: the limit of this harness, and what the added time is measured against.

* ``requests/s``: prefill-then-decode requests completed, 32 at once.
* ``CPU µs``: the proxy process's CPU time a request in that run.
* ``first event``: from the request's first byte to the first event, one request at a time, p50 and p99, minus
  the same percentile of the client that asks the prefill engine itself.
"""

import asyncio
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from benchmarks._proxy_load import (
    BothLegs,
    Client,
    Engine,
    decode_answer,
    health,
    post,
    prefill_answer,
    prompt_ids,
    request,
    text_prompt,
)
from benchmarks._run import figure, finish, note, parser, table

HERE = Path(__file__).parent
TARGET = 3.0  #: times the aiohttp proxy's requests/s, 30 KB text prompts
CONCURRENCY = 32
CORE_SHARE = 0.75  #: a proxy under full load that uses less of its core shares it with somebody
_TICKS = os.sysconf("SC_CLK_TCK")

KVBELT = """
import asyncio, signal, sys, uvloop
from kvbelt.proxy import Address, Proxy, ProxySettings
async def main(port, prefill, decode):
    settings = ProxySettings(
        prefill=(Address("127.0.0.1", prefill),),
        decode=(Address("127.0.0.1", decode),),
        port=port,
        notification_port=0,
    )
    proxy = Proxy(settings)
    await proxy.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await proxy.close()
uvloop.run(main(*map(int, sys.argv[1:4])))
"""


@dataclass
class Subject:
    """One thing that is measured, and its figures round by round."""

    name: str
    prompt: str  #: ``text`` or ``ids``
    port: int = 0  #: 0: no proxy
    process: subprocess.Popen[bytes] | None = None
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  #: share of its core that the proxy used
    p50: list[float] = field(default_factory=list)  #: seconds
    p99: list[float] = field(default_factory=list)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(core: int) -> None:
    """This process runs on one core from now on, where the system allows it."""
    if hasattr(os, "sched_setaffinity") and core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def wait_for(port: int) -> None:
    """Until a proxy answers a request."""
    for _ in range(200):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("x").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                return
        except OSError:
            pass
        await asyncio.sleep(0.05)
    raise SystemExit(f"nothing answers on port {port}")


async def connect(subject: Subject, engines: tuple[int, int], done: "Done") -> Client:
    """One connection of the load generator, or two if there is no proxy."""
    loop = asyncio.get_running_loop()
    prompt: str | list[int] = text_prompt() if subject.prompt == "text" else prompt_ids()
    if subject.port:
        _, client = await loop.create_connection(lambda: Client([request(prompt)], done), "127.0.0.1", subject.port)
        return client
    body = json.dumps({"prompt": [*prompt_ids(), 11], "max_tokens": 8, "stream": True}, separators=(",", ":"))
    holder: list[BothLegs] = []

    def decoded(_client: Client, _first: float) -> bool:
        holder[0].decoded()
        return False

    _, decode = await loop.create_connection(lambda: Client([post(body.encode())], decoded), "127.0.0.1", engines[1])
    _, prefill = await loop.create_connection(
        lambda: BothLegs([request(prompt)], done, decode), "127.0.0.1", engines[0]
    )
    holder.append(prefill)
    prefill.peers.append(decode)
    return prefill


class Done:
    """Counts requests until a moment has come."""

    def __init__(self, seconds: float, open_requests: int) -> None:
        self.first_events: list[float] = []
        self.finished = asyncio.Event()
        self.until = time.perf_counter() + seconds
        self._open = open_requests

    def __call__(self, _client: Client, first_event: float) -> bool:
        """One request is complete. Returns whether to send the next."""
        self.first_events.append(first_event)
        if time.perf_counter() < self.until:
            return True
        self._open -= 1
        if not self._open:
            self.finished.set()
        return False


async def load(
    subject: Subject, engines: tuple[int, int], seconds: float, concurrency: int
) -> tuple[list[float], float]:
    """Keep ``concurrency`` requests open. Returns times of first events, and seconds."""
    done = Done(seconds, concurrency)
    clients = [await connect(subject, engines, done) for _ in range(concurrency)]
    begin = time.perf_counter()
    done.until = begin + seconds
    for client in clients:
        client.send()
    await asyncio.wait_for(done.finished.wait(), seconds + 30)
    elapsed = time.perf_counter() - begin
    for client in clients:
        for connection in (client, *client.peers):
            connection.close()
    return done.first_events, elapsed


async def measure(subject: Subject, engines: tuple[int, int], seconds: float) -> None:
    """One round."""
    await load(subject, engines, 0.3, CONCURRENCY)
    before = cpu_seconds(subject.process) if subject.process else 0.0
    times, elapsed = await load(subject, engines, seconds, CONCURRENCY)
    subject.rates.append(len(times) / elapsed)
    if subject.process:
        used = cpu_seconds(subject.process) - before
        subject.cpu_us.append(used / len(times) * 1e6)
        subject.busy.append(used / elapsed)
    times, _ = await load(subject, engines, seconds / 2, 1)
    times.sort()
    subject.p50.append(times[len(times) // 2])
    subject.p99.append(times[int(len(times) * 0.99)])


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process on core 0."""
    return subprocess.Popen(arguments, preexec_fn=lambda: pin(0))  # noqa: PLW1509 - this process has no threads


async def run(rounds: int, seconds: float) -> list[Subject]:
    """Start everything, measure, stop everything."""
    pin(1)
    loop = asyncio.get_running_loop()
    answers = (prefill_answer(), health("prefill")), (decode_answer(), health("decode"))
    servers = [await loop.create_server(functools.partial(Engine, *answer), "127.0.0.1", 0) for answer in answers]
    engines = (servers[0].sockets[0].getsockname()[1], servers[1].sockets[0].getsockname()[1])
    commands = {"kvbelt": ["-c", KVBELT], "aiohttp": [str(HERE / "_proxy_aiohttp.py")]}
    subjects = [Subject("no proxy", prompt) for prompt in ("text", "ids")]
    processes = []
    try:
        for name, command in commands.items():
            port = free_port()
            arguments = [sys.executable, *command, str(port), str(engines[0]), str(engines[1])]
            process = start(arguments)
            processes.append(process)
            await wait_for(port)
            subjects += [Subject(name, prompt, port, process) for prompt in ("text", "ids")]
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for subject in subjects:
                await measure(subject, engines, seconds)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(10)
        for server in servers:
            server.close()
    return subjects


def spread(values: list[float]) -> str:
    """Median and range, or a dash where nothing was measured."""
    if not values:
        return "-"
    return f"{figure(statistics.median(values))} ({figure(min(values))} to {figure(max(values))})"


def added(subject: Subject, subjects: list[Subject], which: str) -> list[float]:
    """Milliseconds over the client that asks both engines itself, round by round."""
    if not subject.port:
        return []
    direct = next(other for other in subjects if other.port == 0 and other.prompt == subject.prompt)
    return [(mine - his) * 1e3 for mine, his in zip(getattr(subject, which), getattr(direct, which), strict=True)]


def main() -> None:
    """Run it."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=3.0, help="of load, a subject and round")
    args = arguments.parse_args()
    cores = os.sched_getaffinity(0)
    subjects = uvloop.run(run(args.rounds, args.seconds))
    os.sched_setaffinity(0, cores)
    head = ("", "prompt", "requests/s", "CPU µs a request", "share of its core", "added p50 ms", "added p99 ms")
    rows, results = [], []
    for s in subjects:
        p50, p99 = (added(s, subjects, which) for which in ("p50", "p99"))
        busy = f"{statistics.median(s.busy):.0%}" if s.busy else "-"
        rows.append((s.name, s.prompt, spread(s.rates), spread(s.cpu_us), busy, spread(p50), spread(p99)))
        results.append(
            {
                "name": s.name,
                "prompt": s.prompt,
                "requests_per_second": s.rates,
                "cpu_us_per_request": s.cpu_us,
                "core_share": s.busy,
                "added_p50_ms": p50,
                "added_p99_ms": p99,
                "first_event_p50_ms": [value * 1e3 for value in s.p50],
                "first_event_p99_ms": [value * 1e3 for value in s.p99],
            }
        )
    rate = {(s.name, s.prompt): statistics.median(s.rates) for s in subjects}
    ratio = {prompt: rate["kvbelt", prompt] / rate["aiohttp", prompt] for prompt in ("text", "ids")}
    verdict = "reached" if ratio["text"] >= TARGET else "not reached"
    cpu = {(s.name, s.prompt): statistics.median(s.cpu_us) for s in subjects if s.cpu_us}
    cpu_ratio = {prompt: cpu["aiohttp", prompt] / cpu["kvbelt", prompt] for prompt in ("text", "ids")}
    if min(statistics.median(s.busy) for s in subjects if s.busy) < CORE_SHARE:
        note("Something else runs on this machine: the proxies did not have their core. Trust the CPU time only.")
    shown = (
        f"{table(head, rows)}\n\nkvbelt's requests/s over aiohttp's: text {ratio['text']:.2f}, ids {ratio['ids']:.2f}; "
        f"to reach with text: {TARGET:g}: {verdict}\n"
        f"aiohttp's CPU time a request over kvbelt's: text {cpu_ratio['text']:.2f}, ids {cpu_ratio['ids']:.2f}"
    )
    finish("proxy", shown, {"subjects": results, "ratio": ratio, "cpu_ratio": cpu_ratio, "target": TARGET}, args.json)


if __name__ == "__main__":
    main()
