"""The life of the proxy's process: start, serve until SIGTERM or SIGINT, drain, end."""

import asyncio
import gc
import signal

import uvloop

from kvbelt.proxy.app import Proxy
from kvbelt.proxy.settings import ProxySettings
from kvbelt.telemetry import configure_logging


def calm_collector() -> None:
    """Look for garbage in cycles rarely: requests leave next to none, and each look at all that is kept is a pause.

    What is there at the start is not looked at again. With the interpreter's own settings collections took 6 % of the
    proxy's time, and the largest of them 12 ms (``gc.callbacks``, under the load of ``benchmarks.proxy_overhead``).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


async def serve(settings: ProxySettings) -> None:
    """Serve until told to stop.

    Raises:
        StartError: a port is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    proxy = Proxy(settings)
    await proxy.start()
    calm_collector()
    try:
        await stop.wait()
    finally:
        await proxy.close()


def run_proxy(settings: ProxySettings, *, log_json: bool = False) -> None:
    """Run the proxy to its end.

    Raises:
        StartError: a port is taken.
    """
    configure_logging(json=log_json)
    uvloop.run(serve(settings))
