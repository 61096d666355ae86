"""Benchmark 5b: the cost of metrics and records: the same proxy with and without them, in turn.

    python -m benchmarks.proxy_overhead [--lives 8] [--rounds 12] [--seconds 0.3] [--json FILE]

The proxy has core 0; stand-in engines and load generator share core 1, as in ``benchmarks.proxy``. One process is
switched between the two, for processes of the same program differ by some percent (where their memory lies). Rounds are
short, behind a moment that is not measured, in which the list of records fills; a round's figures are compared with
that round's alone. Several processes, one after the other.

* ``without``: counts nothing and keeps nothing. What a request's way itself is made of stays: its record and attempts
  are what a proxy tries again by.
* ``with``: as everybody runs it.

The stand-in engines tell of no transfers; what it costs to count and keep one is measured by itself, and so is one
answer to an open console, which asks once a second.
"""

import asyncio
import functools
import os
import signal
import statistics
import subprocess
import time
import timeit
from pathlib import Path
from time import monotonic

import msgspec
import uvloop
from benchmarks._proxy_load import Answered, Engine, health
from benchmarks._proxy_systems import pin, script, start, stop
from benchmarks._run import figure, finish, note, parser, table
from benchmarks.proxy import CONCURRENCY, CORE_SHARE, Subject, load, spread

from kvbelt.proxy import Address, ProxySettings
from kvbelt.proxy.admin.access import Access
from kvbelt.proxy.admin.console import Console
from kvbelt.proxy.admin.doctor import Doctor
from kvbelt.proxy.context import Context
from kvbelt.proxy.observe.records import Record
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import TransferDone

TARGET = 0.03  #: of the proxy's requests/s

_LOOK = "/kvbelt/console.json?window=30"
_PROXY = script("proxy", "_proxy_bare.py")
_NAMES = ("without", "with")


async def measure(subject: Subject, engines: tuple[int, int], seconds: float) -> None:
    assert subject.process is not None
    before = cpu_seconds(subject.process)
    times, elapsed = await load(subject, engines, seconds, CONCURRENCY)
    used = cpu_seconds(subject.process) - before
    subject.rates.append(len(times) / elapsed)
    subject.cpu_us.append(used / len(times) * 1e6)
    subject.busy.append(used / elapsed)


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time of a process by the scheduler's count; /proc/PID/stat has steps of 10 ms."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9


async def run(lives: int, rounds: int, seconds: float) -> list[Subject]:
    """Measure so many processes, with so many rounds each."""
    pin(1)
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(functools.partial(Engine, health(role), Answered()), "127.0.0.1", 0)
        for role in ("prefill", "decode")
    ]
    engines = (servers[0].sockets[0].getsockname()[1], servers[1].sockets[0].getsockname()[1])
    subjects = [Subject(name, "text") for name in _NAMES]
    try:
        for life in range(lives):
            note(f"process {life + 1} of {lives}")
            await _live(subjects, engines, rounds, seconds)
    finally:
        for server in servers:
            server.close()
    return subjects


async def _live(subjects: list[Subject], engines: tuple[int, int], rounds: int, seconds: float) -> None:
    running = await start(_PROXY, engines)
    for subject in subjects:
        subject.port, subject.process = running.port, running.process
    try:
        for _ in range(rounds):
            for subject in subjects:
                await load(subject, engines, seconds, CONCURRENCY)
                await measure(subject, engines, seconds)
                running.process.send_signal(signal.SIGUSR1)
    finally:
        stop([running.process])


def by_itself() -> dict[str, float]:
    """Microseconds to count and keep one transfer, and to answer an open console, with a full list of requests."""
    context = Context(ProxySettings(decode=(Address("127.0.0.1", 1),)))
    told = TransferDone(
        transfer_id=TransferId("t999"), sender=EngineId("p"), receiver=EngineId("d"), num_bytes=1000, seconds=0.01,
        channel="nixl", num_tokens=10, num_writes=3, exposed_seconds=0.001,
    )  # fmt: skip
    for number in range(context.records.most):
        record = Record(f"r{number}", "/v1/completions", monotonic(), time.time(), stream=True)
        context.records.add(record)
        attempt = context.records.attempt(record, "prefill", "p", f"t{number}")
        attempt.transfer, attempt.transfer_at = told, monotonic()
        record.first_token = record.decode_first = monotonic()
        record.streamed = 9
        context.records.end(record)
    console = Console(context, Access(context.settings), Doctor(context.settings, lambda: 0))
    notified = min(timeit.repeat(lambda: context.notified(told), number=20_000, repeat=5)) / 20_000
    answered = min(timeit.repeat(lambda: msgspec.json.encode(console.shown(_LOOK)), number=20, repeat=10)) / 20
    return {"transfer_us": notified * 1e6, "console_us": answered * 1e6}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--lives", type=int, default=8, help="processes")
    arguments.add_argument("--rounds", type=int, default=12, help="of each process")
    arguments.add_argument("--seconds", type=float, default=0.3, help="of load, a subject and round")
    args = arguments.parse_args()
    cores = os.sched_getaffinity(0)
    subjects = uvloop.run(run(args.lives, args.rounds, args.seconds))
    alone = by_itself()
    os.sched_setaffinity(0, cores)
    without = subjects[0]
    rows, results = [], []
    for subject in subjects:
        lost = [1 - mine / his for mine, his in zip(subject.rates, without.rates, strict=True)]
        cpu = [mine / his - 1 for mine, his in zip(subject.cpu_us, without.cpu_us, strict=True)]
        busy = f"{statistics.median(subject.busy):.0%}"
        own = subject is without
        rows.append(
            (
                subject.name,
                spread(subject.rates),
                spread(subject.cpu_us),
                busy,
                "-" if own else _share(lost),
                "-" if own else _share(cpu),
            )
        )
        results.append(
            {
                "name": subject.name,
                "requests_per_second": subject.rates,
                "cpu_us_per_request": subject.cpu_us,
                "core_share": subject.busy,
                "requests_per_second_lost": lost,
                "cpu_added": cpu,
            }
        )
    if min(statistics.median(subject.busy) for subject in subjects) < CORE_SHARE:
        note("Something else runs on this machine: the proxies did not have their core. Trust the CPU time only.")
    head = ("", "requests/s", "CPU µs a request", "share of its core", "requests/s lost", "CPU added")
    lost = statistics.median(results[1]["requests_per_second_lost"])
    cpu = statistics.median(results[1]["cpu_added"])
    verdict = "reached" if lost <= TARGET else "not reached"
    shown = (
        f"{table(head, rows)}\n\n"
        f"metrics and records cost, by the rounds' median, {lost:.1%} of the requests/s"
        f" (at most {TARGET:.0%}: {verdict}) and {cpu:.1%} of CPU time\n"
        f"by itself: {figure(alone['transfer_us'])} µs to count and keep a transfer, "
        f"{figure(alone['console_us'])} µs to answer an open console"
    )
    finish("proxy_overhead", shown, {"subjects": results, "by_itself": alone, "target": TARGET}, args.json)


def _share(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
