"""Benchmark 5: what the proxy alone costs, on one core, next to other proxies and to no proxy at all.

    python -m benchmarks.proxy [--rounds 5] [--seconds 3] [--system NAME=ARGUMENTS] [--other SRC] [--json FILE]

The rivals are a plain aiohttp proxy and vllm-router (Rust; the extra ``bench`` installs it), which routes prefill and
decode calls or whole requests. kvbelt asks the prefill engine for token ids, 43 KB in its answer. vllm-router does not,
and so gets none, except in the rows "sent ids".

The proxy under test has core 0 to itself; stand-in engines and load generator share core 1. Rounds are interleaved,
figures are medians with their spread (lowest to highest round). "No proxy" is a client that asks both engines itself:
the limit of this harness, and what the added time is measured against.

* ``requests/s``: requests completed, 32 at once.
* ``CPU µs``: the proxy process's CPU time a request in that run.
* ``split``: share of these requests that were split into prefill and decode.
* ``added time``: from the request's first byte to the first event, one request at a time, p50 and p99, minus the same
  percentile of the client that asks the prefill engine itself.

A proxy that cannot be started is left out, and reported. ``--system`` adds ``kvbelt proxy`` with further arguments,
``--other`` the kvbelt of another checkout, such as the one before a change, without further arguments.
"""

import asyncio
import functools
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from benchmarks._proxy_load import (
    Answered,
    BothLegs,
    Client,
    Engine,
    health,
    post,
    prompt_ids,
    request,
    text_prompt,
)
from benchmarks._proxy_systems import RIVALS, NotStartedError, Running, System, kvbelt, pin, start, stop
from benchmarks._run import figure, finish, note, parser, table

CONCURRENCY = 32
PROMPTS = ("text", "ids")
CORE_SHARE = 0.75  #: a proxy under full load that uses less of its core shares it with another process
_TICKS = os.sysconf("SC_CLK_TCK")

#: The kvbelt proxies that are measured, and their further arguments. The engines do not tell what their steps cost, so
#: elastic placement takes some requests whole and splits others.
KVBELTS = {"kvbelt split": "--placement split", "kvbelt elastic": "--placement elastic"}
OTHER = "other kvbelt"


@dataclass(frozen=True, slots=True)
class Target:
    """How many times another system's requests/s a system is to complete."""

    system: str
    over: str
    least: float | None = None  #: None: only to know


TARGETS = (
    Target("kvbelt elastic", "kvbelt split", 0.95),
    Target("kvbelt elastic", "vllm-router", 2.0),
    Target("kvbelt elastic", "vllm-router, sent ids", 2.0),
    Target("kvbelt split", "vllm-router", 2.0),
    Target("kvbelt split", "vllm-router, sent ids", 2.0),
    Target("kvbelt split", "aiohttp", 3.0),
    *(Target(name, OTHER) for name in KVBELTS),
)


@dataclass
class Subject:
    """One measured system, and its figures round by round."""

    name: str
    prompt: str  #: ``text`` or ``ids``
    port: int = 0  #: 0: no proxy
    process: subprocess.Popen[bytes] | None = None
    rates: list[float] = field(default_factory=list)
    split: list[float] = field(default_factory=list)  #: share of requests
    cpu_us: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  #: share of its core that the proxy used
    p50: list[float] = field(default_factory=list)  #: seconds
    p99: list[float] = field(default_factory=list)


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time of a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def connect(subject: Subject, engines: tuple[int, int], done: "Done") -> Client:
    """One connection of the load generator, or two if there is no proxy."""
    loop = asyncio.get_running_loop()
    prompt: str | list[int] = text_prompt() if subject.prompt == "text" else prompt_ids()
    if subject.port:
        _, client = await loop.create_connection(lambda: Client([request(prompt)], done), "127.0.0.1", subject.port)
        return client
    first = post(prompt=prompt, max_tokens=1, stream=False, return_token_ids=True)
    rest = post(prompt=[*prompt_ids(), 11], max_tokens=8, stream=True)
    holder: list[BothLegs] = []

    def decoded(_client: Client, _first: float) -> bool:
        holder[0].decoded()
        return False

    _, decode = await loop.create_connection(lambda: Client([rest], decoded), "127.0.0.1", engines[1])
    _, prefill = await loop.create_connection(lambda: BothLegs([first], done, decode), "127.0.0.1", engines[0])
    holder.append(prefill)
    prefill.peers.append(decode)
    return prefill


class Done:
    """Counts requests until a given time."""

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
    """Keep ``concurrency`` requests open. Returns the times of first events, and the seconds."""
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


async def measure(subject: Subject, engines: tuple[int, int], answered: Answered, seconds: float) -> None:
    await load(subject, engines, 0.3, CONCURRENCY)
    before, prefills = cpu_seconds(subject.process) if subject.process else 0.0, answered.one_token
    times, elapsed = await load(subject, engines, seconds, CONCURRENCY)
    subject.rates.append(len(times) / elapsed)
    subject.split.append((answered.one_token - prefills) / len(times))
    if subject.process:
        used = cpu_seconds(subject.process) - before
        subject.cpu_us.append(used / len(times) * 1e6)
        subject.busy.append(used / elapsed)
    times, _ = await load(subject, engines, seconds / 2, 1)
    times.sort()
    subject.p50.append(times[len(times) // 2])
    subject.p99.append(times[int(len(times) * 0.99)])


async def run(systems: list[System], rounds: int, seconds: float) -> list[Subject]:
    pin(1)
    loop = asyncio.get_running_loop()
    answered = Answered()
    servers = [
        await loop.create_server(
            functools.partial(Engine, health(role), answered, always_ids=always_ids), "127.0.0.1", 0
        )
        for always_ids in (False, True)
        for role in ("prefill", "decode")
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    engines = {False: (ports[0], ports[1]), True: (ports[2], ports[3])}  # by System.ids
    subjects = [Subject("no proxy", prompt) for prompt in PROMPTS]
    running: list[Running] = []
    try:
        for system in systems:
            try:
                running.append(await start(system, engines[system.ids]))
            except NotStartedError as error:
                note(str(error))
        subjects += [Subject(one.system.name, prompt, one.port, one.process) for one in running for prompt in PROMPTS]
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for subject in subjects:
                await measure(subject, engines[False], answered, seconds)
    finally:
        stop(one.process for one in running)
        for server in servers:
            server.close()
    return subjects


def spread(values: list[float]) -> str:
    """Median and range, or a dash if nothing was measured."""
    if not values:
        return "-"
    return f"{figure(statistics.median(values))} ({figure(min(values))} to {figure(max(values))})"


def added(subject: Subject, subjects: list[Subject], which: str) -> list[float]:
    """Milliseconds more than the client that calls both engines itself, round by round."""
    if not subject.port:
        return []
    direct = next(other for other in subjects if other.port == 0 and other.prompt == subject.prompt)
    return [(mine - his) * 1e3 for mine, his in zip(getattr(subject, which), getattr(direct, which), strict=True)]


def of_both(subjects: list[Subject], target: Target, which: str) -> dict[str, list[float]]:
    """One system's figures over another's, round by round; nothing for a system that was not measured."""
    ratios = {}
    for prompt in PROMPTS:
        mine, his = (
            next((getattr(s, which) for s in subjects if (s.name, s.prompt) == (name, prompt)), None)
            for name in (target.system, target.over)
        )
        if mine is not None and his is not None:
            ratios[prompt] = [a / b for a, b in zip(mine, his, strict=True)]
    return ratios


def judged(subjects: list[Subject], target: Target) -> list[str]:
    """A line for each figure in which two systems are compared; none if one of them was not measured."""
    lines = []
    for which, name in (("rates", "requests/s"), ("cpu_us", "CPU µs a request")):
        if ratios := of_both(subjects, target, which):
            line = f"{name}, {target.system} over {target.over}: "
            line += ", ".join(f"{prompt} {spread(values)}" for prompt, values in ratios.items())
            if which == "rates" and target.least is not None:
                reached = min(statistics.median(values) for values in ratios.values()) >= target.least
                line += f"; to reach: {target.least:g}: {'reached' if reached else 'not reached'}"
            lines.append(line)
    return lines


def shown(subjects: list[Subject]) -> str:
    """Two tables, and the comparisons."""
    rates, times = [], []
    for s in subjects:
        busy, split = (f"{statistics.median(values):.0%}" if values else "-" for values in (s.busy, s.split))
        rates.append((s.name, s.prompt, spread(s.rates), spread(s.cpu_us), busy))
        times.append((s.name, s.prompt, *(spread(added(s, subjects, which)) for which in ("p50", "p99")), split))
    return "\n\n".join(
        [
            table(("", "prompt", "requests/s", "CPU µs a request", "share of its core"), rates),
            table(("added time, ms", "prompt", "p50", "p99", "split"), times),
            "\n".join(line for target in TARGETS for line in judged(subjects, target)),
        ]
    )


def as_json(subjects: list[Subject]) -> dict[str, Any]:
    return {
        "subjects": [
            {
                "name": s.name,
                "prompt": s.prompt,
                "requests_per_second": s.rates,
                "split": s.split,
                "cpu_us_per_request": s.cpu_us,
                "core_share": s.busy,
                "added_p50_ms": added(s, subjects, "p50"),
                "added_p99_ms": added(s, subjects, "p99"),
                "first_event_p50_ms": [value * 1e3 for value in s.p50],
                "first_event_p99_ms": [value * 1e3 for value in s.p99],
            }
            for s in subjects
        ],
        "ratios": [
            {"system": target.system, "over": target.over, "least": target.least, "requests_per_second": ratios}
            for target in TARGETS
            if (ratios := of_both(subjects, target, "rates"))
        ],
    }


def named(text: str) -> System:
    """Read ``NAME=ARGUMENTS``."""
    name, _, arguments = text.partition("=")
    return kvbelt(name, arguments)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=3.0, help="of load, a subject and round")
    arguments.add_argument(
        "--system", type=named, action="append", default=[], metavar="NAME=ARGUMENTS", help="one more kvbelt proxy"
    )
    arguments.add_argument("--other", type=Path, metavar="SRC", help="the src folder of another checkout")
    args = arguments.parse_args()
    systems = [kvbelt(name, told) for name, told in KVBELTS.items()] + args.system
    if args.other is not None:
        systems.append(kvbelt(OTHER, source=args.other))
    cores = os.sched_getaffinity(0)
    subjects = uvloop.run(run([*systems, *RIVALS], args.rounds, args.seconds))
    os.sched_setaffinity(0, cores)
    if min((statistics.median(s.busy) for s in subjects if s.busy), default=1.0) < CORE_SHARE:
        note("Something else runs on this machine: the proxies did not have their core. Trust the CPU time only.")
    finish("proxy", shown(subjects), as_json(subjects), args.json, packages=("vllm-router", "aiohttp"))


if __name__ == "__main__":
    main()
