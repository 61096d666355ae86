"""``kvbelt top``: workers, rates, times and last errors of a deployment, live in a terminal.

It redraws once per interval and when the terminal is resized; q or Ctrl-C quits. ``--once`` prints one frame,
``--json`` the proxy's JSON.
"""

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import replace

from kvbelt.errors import KVBeltError, SettingsError
from kvbelt.ops import proxy_client
from kvbelt.ops.arguments import positive_int, positive_number
from kvbelt.ops.parser import add_examples
from kvbelt.ops.top_frame import frame
from kvbelt.wire.console import CONSOLE_STATE, ConsoleState

#: Keys are read between two requests, so a request must not take long.
_ANSWER_SECONDS = 2.0
_ENTER, _LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"  # the alternate screen without a cursor, and back
_HOME, _END_OF_LINE, _REST = "\033[H", "\033[K\n", "\033[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    proxy_client.add_arguments(parser)
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--json", action="store_true", help="print the proxy's JSON and exit")
    parser.add_argument("--window", type=positive_int, default=10, metavar="SECONDS", help="of rates and percentiles")
    parser.add_argument("--interval", type=positive_number, default=1.0, metavar="SECONDS", help="between two looks")
    add_examples(
        parser,
        ("kvbelt top", "watch the deployment on this host"),
        ("kvbelt top --url http://10.0.0.5:9100 --window 60", "watch another one, with rates of the last minute"),
        ("kvbelt top --once", "print it once, as for a report"),
    )


def run(args: argparse.Namespace) -> int:
    proxy = replace(proxy_client.ProxyClient.of(args), answer_seconds=_ANSWER_SECONDS)
    place = f"/kvbelt/console.json?window={args.window}"
    if not (args.once or args.json or (sys.stdin.isatty() and sys.stdout.isatty())):
        raise SettingsError("kvbelt top needs a terminal, and this is not one; use --once or --json")
    if args.json:
        print(proxy.pretty(place))
        return 0
    state = proxy.get(place, CONSOLE_STATE)
    if args.once:
        width = shutil.get_terminal_size((100, 24)).columns
        print("\n".join(frame(state, url=proxy.url, width=width)))
    else:
        _live(proxy, place, state, args.interval)
    return 0


def _live(proxy: proxy_client.ProxyClient, place: str, state: ConsoleState, interval: float) -> None:
    """Redraw until the user quits."""
    gone, since = "", 0.0
    with _screen() as resized:
        asked = time.monotonic()
        while True:
            _draw(state, proxy.url, gone)
            left = asked + interval - time.monotonic()
            ready, _, _ = select.select([sys.stdin, resized], [], [], max(0.0, left))
            if sys.stdin in ready and _quits(os.read(sys.stdin.fileno(), 64)):
                return
            if resized in ready:
                os.read(resized, 64)
            if time.monotonic() < asked + interval:
                continue
            asked = time.monotonic()
            try:
                state, gone = proxy.get(place, CONSOLE_STATE), ""
            except KVBeltError as error:
                since = since if gone else asked
                gone = f"no answer for {asked - since:.0f} s, older values below: {error}"


def _quits(keys: bytes) -> bool:
    """Whether a key is q, Ctrl-C or Ctrl-D. No bytes mean that the terminal is gone."""
    return not keys or bool({b"q", b"Q", b"\x03", b"\x04"} & {keys[i : i + 1] for i in range(len(keys))})


def _draw(state: ConsoleState, url: str, gone: str) -> None:
    size = os.get_terminal_size(sys.stdout.fileno())  # the COLUMNS variable does not follow a resize
    # The last line stays empty: a character at its end would scroll.
    lines = frame(state, url=url, width=size.columns - 1, height=size.lines - 1, gone=gone)
    sys.stdout.write(_HOME + "".join(line + _END_OF_LINE for line in lines) + _REST)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[int]:
    """Prepare the terminal and restore it at the end. Yields a file descriptor that is readable after a resize."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    waker = signal.set_wakeup_fd(writing)
    handler = signal.signal(signal.SIGWINCH, lambda *_: None)
    sys.stdout.write(_ENTER)
    sys.stdout.flush()
    try:
        tty.setcbreak(terminal)
        yield reading
    finally:
        signal.signal(signal.SIGWINCH, handler)
        signal.set_wakeup_fd(waker)
        os.close(reading)
        os.close(writing)
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
