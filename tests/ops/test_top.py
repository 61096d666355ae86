"""``kvbelt top`` in front of a real proxy with stand-in workers; live, in a terminal of its own."""

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
from kvbelt.ops.top_frame import frame
from kvbelt.wire.console import CONSOLE_STATE
from kvbelt.wire.load import Buffers
from tests.ops.served import serving

BODY = {"prompt": "hello", "max_tokens": 6, "stream": True}
ENTER, LEAVE = b"\033[?1049h", b"\033[?1049l"


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


def test_a_pair_that_cannot_exchange_kv_is_named(state):
    """The frame shows the pair with the reason."""
    state["pairs"][0] |= {"state": "refused", "reason": "refused_dtype"}
    assert any(line.endswith("refused_dtype") and "cannot send to" in line for line in frame_of(state, url="u"))


@pytest.mark.parametrize(("width", "height"), [(20, 5), (80, 24), (300, 100)])
def test_a_frame_fits_its_terminal(state, width, height):
    """No line is wider than the terminal, and there are not more lines than it has."""
    lines = frame_of(state, url="u" * 200, width=width, height=height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height


def test_without_a_terminal_it_says_how_to_ask(served, capsys):
    """Without a terminal the error names --once and --json."""
    assert main(["top", "--url", served.url]) == 2
    assert "--once" in capsys.readouterr().err


def test_a_missing_proxy_is_reported(capsys):
    """The error names the proxy's URL."""
    assert main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 2
    assert "no answer from the proxy at http://127.0.0.1:1" in capsys.readouterr().err


class Terminal:
    """A terminal with the command in it."""

    def __init__(self, url, columns):
        self._master, slave = pty.openpty()
        self.resize(columns)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        command = [sys.executable, "-m", "kvbelt", "top", "--url", url, "--interval", "0.1"]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip # noqa: PLW1509
        self.shown = b""

    def resize(self, columns):
        """Change the width; the system signals the command."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def until(self, condition):
        """Read until the output fulfils a condition."""
        give_up = time.monotonic() + 60
        while not condition(self.shown):
            assert time.monotonic() < give_up, self.shown[-2000:]
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 65536)

    def press(self, keys):
        """Type keys."""
        os.write(self._master, keys)

    @property
    def settings(self):
        """The terminal's current settings."""
        return termios.tcgetattr(self._slave)

    def close(self):
        """End the command, whatever happened."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(60)
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal(served):
    """A terminal of 100 columns."""
    made = Terminal(served.url, 100)
    yield made
    made.close()


def last_frame(shown):
    """The lines of the last frame that is complete."""
    *_, last, _ = shown.split(b"\033[H")
    return last.split(b"\033[K\r\n")[:-1]


def widest(shown):
    """Width of the last complete frame; 0 if nothing was drawn."""
    return max(map(len, last_frame(shown)), default=0) if shown.count(b"\033[H") >= 3 else 0


def test_it_redraws_in_place_follows_the_size_and_ends_with_q(terminal, served):
    """Q ends it and leaves the terminal as it was."""
    terminal.until(lambda shown: shown.count(b"\033[H") >= 3)
    assert terminal.shown.startswith(ENTER)
    assert [line.split()[0].decode() for line in last_frame(terminal.shown)[11:15]] == names(served)
    terminal.resize(40)
    terminal.shown = b""
    terminal.until(lambda shown: widest(shown) == 39)
    assert terminal.settings[3] != terminal.before[3]
    terminal.press(b"q")
    terminal.until(lambda shown: LEAVE in shown)
    assert terminal.process.wait(60) == 0
    assert terminal.settings == terminal.before


def test_it_goes_on_when_the_proxy_is_back():
    """While the proxy is away, the frame says that its values are old."""
    with serving(health_interval_seconds=0.1) as mortal:
        port = mortal.deployment.proxy.port
        terminal = Terminal(mortal.url, 120)
        try:
            terminal.until(lambda shown: b"under way" in shown)
            mortal.call(mortal.deployment.proxy.close())
            terminal.until(lambda shown: b"older values below" in shown)
            mortal.call(mortal.deployment.restart_proxy(port))
            terminal.shown = b""
            terminal.until(lambda shown: b"under way" in shown)
            terminal.press(b"\x03")
            assert terminal.process.wait(60) in (0, 130)
        finally:
            terminal.close()
