"""The orderly end of a deployment: no new requests, time for the open ones. A second signal cuts them."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from kvbelt.ops.http_client import Address, Client, NoAnswerError, UnreadableReplyError
from kvbelt.ops.terminal import Terminal
from kvbelt.wire.health import PROXY_HEALTH

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 2.0


class Signals:
    """Ctrl-C, SIGTERM or SIGHUP: the first asks for the end, the second for the end at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def _told(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._told)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


async def drain(proxy: Address, key: str, seconds: float, terminal: Terminal, at_once: asyncio.Event) -> None:
    """Let a proxy take no more requests, and wait until none is open, for ``seconds`` at most, or ``at_once``.

    A proxy that does not answer has nothing that could be waited for.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    shown = None
    try:
        with Client(proxy, key) as client:
            reply = await client.request("POST", "/kvbelt/drain", None, _ANSWER_SECONDS)
            while (left := reply.read(PROXY_HEALTH, "the proxy").open_requests) > 0:
                rest = deadline - loop.time()
                if rest <= 0 or at_once.is_set():
                    terminal.error(f"{_requests(left)} cut off" + ("" if at_once.is_set() else f" after {seconds:g} s"))
                    return
                line = f"stopping: {_requests(left)} open, {rest:.0f} s left; Ctrl-C ends at once"
                if terminal.redraws:
                    terminal.redraw([line])
                elif shown != left:
                    terminal.info(line)
                shown = left
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(at_once.wait(), _POLL_SECONDS)
                reply = await client.get("/health", _ANSWER_SECONDS)
    except (NoAnswerError, UnreadableReplyError):
        return
    finally:
        terminal.stop_redrawing()


def _requests(number: int) -> str:
    return f"{number} request{' is' if number == 1 else 's are'}"
