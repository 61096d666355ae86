"""``kvbelt top`` in front of a real proxy with stand-in workers."""

import asyncio
import contextlib
import copy
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from kvbelt.cli import main
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.top_app import Opened, TopApp
from kvbelt.ops.top_frame import frame
from kvbelt.ops.top_view import REQUESTS, WORKERS, in_order, sparkline
from kvbelt.wire.console import CONSOLE_STATE
from kvbelt.wire.load import Buffers
from tests.ops.served import serving

BODY = {"prompt": "hello", "max_tokens": 6, "stream": True}
ENTER = b"\033[?1049h"


@pytest.fixture(scope="module")
def served():
    """2p2d that has answered one request and refused one."""
    with serving(2, 2, health_interval_seconds=0.1) as made:
        made.call(made.deployment.ask(BODY, request_id="good"))
        made.call(made.deployment.ask(b"{", request_id="bad"))
        yield made


@pytest.fixture
def state(served, capsys):
    """The proxy's state, which a test may change."""
    assert main(["top", "--url", served.url, "--json"]) == 0
    return copy.deepcopy(json.loads(capsys.readouterr().out))


def names(served):
    """All workers' names."""
    return [f"127.0.0.1:{one.port}" for one in (*served.deployment.prefill, *served.deployment.decode)]


def test_one_frame_has_workers_rates_times_and_errors(served, capsys):
    """--once prints one frame without a terminal."""
    assert main(["top", "--url", served.url, "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"kvbelt 0.2.0 at {served.url}, toy, up ")
    assert re.search(r"requests/s, 0 under way, \S+ tokens/s", lines[1])
    assert re.fullmatch(r"first token +\S+ ms +\S+ ms", lines[5])
    assert re.fullmatch(r"KV exposed +- +-", lines[7])
    head = next(index for index, line in enumerate(lines) if line.startswith("WORKER"))
    rows = [line.split() for line in lines[head + 1 : head + 5]]
    assert [row[:3] for row in rows] == [
        [name, role, "ready"] for name, role in zip(names(served), ("prefill",) * 2 + ("decode",) * 2, strict=True)
    ]
    errors = lines[lines.index("LAST ERRORS") + 1 :]
    assert "bad  the request body is not a JSON object" in errors[0]


def frame_of(state, **options):
    """The lines of one frame."""
    return frame(CONSOLE_STATE.convert(state, "the proxy"), **options)


def test_memory_is_shown_in_shares(state):
    """The frame shows used and cached blocks, and the receive buffer's fill, as shares."""
    worker = state["workers"][2]
    worker["load"] |= {"running": 3, "waiting": 1, "blocks_total": 200, "blocks_free": 150, "blocks_cached": 20}
    sizes = {"receive_bytes": 2_000_000_000, "bytes_reserved": 100_000_000, "bytes_committed": 400_000_000}
    worker["buffers"] = dict.fromkeys(Buffers.__struct_fields__, 0) | sizes
    (row,) = [line for line in frame_of(state, url="u") if line.startswith(worker["worker"])]
    assert row.split()[3:] == ["3", "1", "0", "25%", "10%", "25%", "of", "2", "GB"]


def test_what_is_wrong_is_said_in_words(state):
    """With what to do about it."""
    alarm = {"severity": "critical", "subject": "pair", "alert": "KVBeltPairsRefused"}
    state["alarms"] = [alarm | {"what": "p:1 cannot send to d:1: refused_dtype", "change": "start workers alike"}]
    assert "critical: p:1 cannot send to d:1: refused_dtype; start workers alike" in frame_of(state, url="u")


@pytest.mark.parametrize("width", [20, 80, 300])
def test_a_frame_fits_its_terminal(state, width):
    """No line is wider than the terminal."""
    assert max(map(len, frame_of(state, url="u" * 200, width=width))) <= width


def test_a_frame_says_all_of_what_is_wrong_on_a_narrow_terminal(state):
    """Sentences are wrapped, and columns left out whole."""
    state["alarms"] = [
        {"severity": "warning", "subject": "first_token_ms", "alert": "DisaggHighTTFT",
         "what": "the slowest first tokens take 783 ms", "change": "kvbelt why of a slow request; kvbelt doctor"}
    ]  # fmt: skip
    lines = frame_of(state, url="u", width=60)
    assert "warning: the slowest first tokens take 783 ms; kvbelt why of a slow request; kvbelt doctor" in " ".join(
        line.strip() for line in lines
    )
    (head,) = [line for line in lines if line.startswith("WORKER")]
    assert head.split() == ["WORKER", "ROLE", "STATE", "RUN", "WAIT", "KV", "USED"]


def test_without_a_terminal_it_prints_one_frame(served, capsys):
    """As in a pipe."""
    assert main(["top", "--url", served.url]) == 0
    assert "WORKER" in capsys.readouterr().out


def test_a_missing_proxy_is_reported(capsys):
    """The error names the proxy's URL."""
    assert main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 2
    assert "no answer from the proxy at http://127.0.0.1:1" in capsys.readouterr().err


def test_rows_without_a_value_come_last(state):
    """In both directions."""
    rows = CONSOLE_STATE.convert(state, "the proxy").requests
    first = next(column for column in REQUESTS if column.title.startswith("TTFT"))
    for falling in (False, True):
        assert [row.request_id for row in in_order(rows, first, falling=falling)] == ["good", "bad"]


def test_a_sparkline_has_a_block_for_each_value():
    assert sparkline([0, 1, None, 8]) == "▁▂ █"
    assert sparkline([None, 0.0]) == " ▁"


class Shown:
    """The screen of a program that is drawn to memory."""

    def __init__(self, app, pilot):
        self.app, self.pilot = app, pilot

    async def until(self, condition):
        """Let the program run until something is true."""
        async with asyncio.timeout(60):
            while not condition():
                await self.pilot.pause()

    async def press(self, *keys):
        """Type keys."""
        await self.pilot.press(*keys)
        await self.pilot.pause()

    @property
    def lines(self):
        """What stands on the screen."""
        return ["".join(segment.text for segment in strip) for strip in self.app.screen._compositor.render_strips()]

    @property
    def text(self):
        """The same as one string."""
        return "\n".join(self.lines)

    def styles(self, word):
        """The colours in which a word is drawn."""
        strips = self.app.screen._compositor.render_strips()
        return [segment.style.color.name for strip in strips for segment in strip if word in segment.text]


@contextlib.asynccontextmanager
async def shown(url, *, width=80, height=24):
    """The program in a terminal of some size, once it has answers."""
    app = TopApp(ProxyClient(url), window=10, interval=0.3, light=False)
    async with app.run_test(size=(width, height)) as pilot:
        screen = Shown(app, pilot)
        await screen.until(lambda: ("WORKER▲" in screen.text and "UTC▼" in screen.text) or "waiting for" in screen.text)
        yield screen


def test_workers_and_requests_stand_under_the_figures(served):
    async def see():
        async with shown(served.url) as screen:
            # A machine under load passes a threshold for a moment.
            words = ("good", *names(served), "first token", "no threshold of the alerts is passed")
            await screen.until(lambda: all(word in screen.text for word in words))
            for hint in ("Open", "Sort", "Other table", "Quit"):
                assert hint in screen.lines[-1]

    asyncio.run(see())


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_each_width_shows_the_columns_that_fit(served, width):
    """No column is cut, and a wide terminal has all of them."""

    async def see():
        async with shown(served.url, width=width) as screen:
            for columns, first in ((WORKERS, "WORKER▲"), (REQUESTS, "UTC▼")):
                titles = [column.title for column in columns if column.least_width <= width]
                (head,) = [line for line in screen.lines if first in line]
                assert [title for title in titles if title not in head] == []

    asyncio.run(see())


def test_it_follows_the_size_of_its_terminal(served):
    async def see():
        async with shown(served.url, width=120) as screen:
            assert "CACHED" in screen.text
            await screen.pilot.resize_terminal(60, 24)
            await screen.until(lambda: "CACHED" not in screen.text)

    asyncio.run(see())


def test_s_sorts_by_the_next_column_and_r_the_other_way(served):
    def order(screen):
        return sorted(("good", "bad"), key=screen.text.index)

    async def see():
        async with shown(served.url) as screen:
            await screen.until(lambda: "good" in screen.text)
            assert order(screen) == ["bad", "good"]  # the newest first
            await screen.press("s")
            await screen.until(lambda: "REQUEST▼" in screen.text)
            assert order(screen) == ["good", "bad"]
            await screen.press("r")
            await screen.until(lambda: "REQUEST▲" in screen.text)
            assert order(screen) == ["bad", "good"]

    asyncio.run(see())


def test_enter_opens_a_request_and_a_worker(served):
    """Escape leads back."""

    async def see():
        async with shown(served.url) as screen:
            await screen.until(lambda: "good" in screen.text)
            await screen.press("down", "enter")
            await screen.until(lambda: "rest of the answer" in screen.text)
            await screen.press("escape", "tab", "enter")
            await screen.until(lambda: isinstance(screen.app.screen, Opened))
            await screen.until(lambda: f"prefill worker {names(served)[0]}: ready" in screen.text)
            assert f"{names(served)[0]} to {names(served)[2]}" in screen.text

    asyncio.run(see())


def test_trouble_is_coloured_where_it_stands():
    """A lost worker is red, and the line above the figures says what to do."""

    async def see(mortal):
        async with shown(mortal.url) as screen:
            mortal.call(mortal.deployment.decode[1].stop())
            await screen.until(lambda: "does not answer" in screen.text)
            assert "kvbelt workers remove" in screen.app.query_one("#alarms").content.plain
            await screen.until(lambda: screen.styles("lost") == ["red"])
            assert screen.styles("ready") != ["red"]

    with serving(2, 2, health_interval_seconds=0.05, health_timeout_seconds=0.2) as mortal:
        asyncio.run(see(mortal))


def test_it_waits_for_a_proxy_and_goes_on_when_it_is_back():
    """Before the first answer, and between two."""

    async def see(mortal, url, port):
        async with shown(url) as screen:
            assert "waiting for the proxy" in screen.text
            mortal.call(mortal.deployment.restart_proxy(port))
            await screen.until(lambda: "no threshold" in screen.text)
            mortal.call(mortal.deployment.proxy.close())
            await screen.until(lambda: "older values below" in screen.text)
            mortal.call(mortal.deployment.restart_proxy(port))
            await screen.until(lambda: "no threshold" in screen.text)

    with serving(health_interval_seconds=0.1) as mortal:
        port = mortal.deployment.proxy.port
        url = mortal.url
        mortal.call(mortal.deployment.proxy.close())
        asyncio.run(see(mortal, url, port))


def test_w_takes_the_next_longer_window(served):
    async def see():
        async with shown(served.url) as screen:
            await screen.press("w")
            assert screen.app._window == 60

    asyncio.run(see())


def test_it_leaves_the_terminal_as_it_was(served):
    """Q ends it, in a terminal of its own."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "kvbelt", "top", "--url", served.url, "--interval", "0.1"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip # noqa: PLW1509
    try:
        said = b""
        give_up = time.monotonic() + 60
        pressed = False
        while process.poll() is None:
            assert time.monotonic() < give_up, said[-2000:]
            if select.select([master], [], [], 0.1)[0]:
                said += os.read(master, 65536)
            if not pressed and b"no threshold" in said:
                pressed = True
                os.write(master, b"q")
        assert process.returncode == 0
        assert said.startswith(ENTER)
        assert termios.tcgetattr(slave) == before
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(60)
        os.close(master)
        os.close(slave)
