"""A proxy with stand-in workers on a loop of its own, for commands that ask it from outside."""

import asyncio
import contextlib
import threading

from tests.proxy.support import Deployment


class Served:
    """A proxy with its stand-ins."""

    def __init__(self, deployment):
        self.deployment = deployment
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def url(self):
        """The proxy's URL."""
        return f"http://127.0.0.1:{self.deployment.proxy.port}"

    def begin(self, work):
        """Run something on the loop. Returns a future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work):
        """Run a coroutine on the loop to its end."""
        return self.begin(work).result(120)

    def end(self):
        """The loop ends."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def serving(*args, **settings):
    """Stand-ins and a proxy, as ``Deployment`` takes them."""
    made = Served(Deployment(*args, **settings))
    try:
        made.call(made.deployment.__aenter__())
        yield made
    finally:
        made.call(made.deployment.__aexit__())
        made.end()
