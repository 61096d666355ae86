"""The life of the proxy's process: start, serve until SIGTERM or SIGINT, drain, end."""

import asyncio
import signal

import uvloop

from kvbelt.proxy.app import Proxy
from kvbelt.proxy.settings import ProxySettings
from kvbelt.telemetry import configure_logging


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
