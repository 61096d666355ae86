"""A proxy without metrics and records; each SIGUSR1 switches them on or off.

``_proxy_bare.py PORT PREFILL DECODE``
"""

import asyncio
import itertools
import signal
import sys
from time import monotonic

import uvloop

from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.proxy.app import calm_collector, keep_freed_memory
from kvbelt.proxy.observe.metrics import Metrics
from kvbelt.proxy.observe.records import Attempt, Leg, Record, Records
from kvbelt.wire.notification import Notification


class NoMetrics(Metrics):
    """Counts nothing."""

    def notified(self, notification: Notification) -> None:
        """Nothing."""

    def first_token(self, record: Record) -> None:
        """Nothing."""

    def ended(self, record: Record) -> None:
        """Nothing."""


class NoRecords(Records):
    """Keeps no ended request. Running ones must be known, because engines know requests by their ids."""

    def attempt(self, record: Record, leg: Leg, worker: str, transfer_id: str = "") -> Attempt:
        """A leg begins. Retries need it; no transfer finds it."""
        attempt = Attempt(leg, worker, monotonic(), transfer_id)
        record.attempts.append(attempt)
        return attempt

    def end(self, record: Record) -> None:
        """The request has ended."""
        del self.open[record.request_id]


async def main(port: int, prefill: int, decode: int) -> None:
    """Serve until SIGTERM."""
    settings = ProxySettings(
        prefill=(Address("127.0.0.1", prefill),),
        decode=(Address("127.0.0.1", decode),),
        port=port,
        notification_port=0,
    )
    proxy = Proxy(settings)
    context, loop = proxy.context, asyncio.get_running_loop()
    kinds = itertools.cycle([(NoMetrics, NoRecords), (Metrics, Records)])

    def switch() -> None:
        if context.records.open:  # the last ones have been answered, and end in this turn
            loop.call_soon(switch)
            return
        context.metrics.__class__, records = next(kinds)
        context.records = records(settings.records_kept)

    switch()
    keep_freed_memory()
    await proxy.start()
    calm_collector()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, switch)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await proxy.close()


uvloop.run(main(*map(int, sys.argv[1:])))
