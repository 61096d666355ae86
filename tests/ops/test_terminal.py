"""Log lines: splitting, prefixing, colouring, and a terminal that goes away."""

import io
import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from kvbelt.ops.start_board import StartBoard
from kvbelt.ops.terminal import MAX_LINE_BYTES, LineSplitter, Terminal, wants_colour


class TtyStream(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Say so."""
        return True


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_lines_do_not_depend_on_how_bytes_arrive(data, cuts):
    """However the output is cut into chunks, the lines are the same."""
    whole = LineSplitter()
    expected = [*whole.feed(data), *whole.close()]
    splitter = LineSplitter()
    lines = []
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(places):
        lines += splitter.feed(data[start:end])
    lines += splitter.close()
    assert lines == expected


def test_endless_line_is_handed_on_in_pieces():
    """A child that never ends its line does not make the launcher buffer all of it."""
    splitter = LineSplitter()
    pieces = list(splitter.feed(b"x" * (3 * MAX_LINE_BYTES + 5)))
    assert [len(piece) for piece in pieces] == [MAX_LINE_BYTES] * 3
    assert list(splitter.close()) == ["xxxxx"]


def test_prefixes_are_aligned_and_plain_without_a_terminal():
    """Every line starts with its process's name, padded to the longest, and no escape codes."""
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.register(["prefill-0", "proxy"])
    terminal.log("prefill-0", "hello")
    terminal.log("proxy", "world")
    terminal.error("oh")
    assert stream.getvalue() == "prefill-0 | hello\nproxy     | world\nup        | oh\n"


def test_names_have_colours_of_their_own_on_a_terminal(monkeypatch):
    """On a terminal two processes differ in colour."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(TtyStream())
    terminal.register(["a", "b"])
    first, second = terminal.prefixed("a", "x"), terminal.prefixed("b", "x")
    assert first.startswith("\033[")
    assert first.split("m")[0] != second.split("m")[0]


def test_no_color_is_obeyed(monkeypatch):
    """NO_COLOR switches colours off on a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(TtyStream())


def test_closed_terminal_ends_the_showing_and_nothing_else():
    """Writing to a closed stream raises nothing."""
    stream = io.StringIO()
    terminal = Terminal(stream)
    stream.close()
    terminal.info("nobody hears")
    terminal.info("this either")


def test_without_logs_warnings_are_shown_once_all_is_ready():
    """With logs off, the launcher's own lines remain, and processes' warnings while it serves."""
    stream = io.StringIO()
    terminal = Terminal(stream, show_logs=False)
    terminal.log("p", "10:45:15 [warning  ] slow start")
    terminal.info("news")
    terminal.serving = True
    terminal.log("p", "10:45:15 [info     ] chatter")
    terminal.log("p", "10:45:15 [warning  ] worker lost")
    assert stream.getvalue() == "up | news\np  | 10:45:15 [warning  ] worker lost\n"


def test_progress_is_redrawn_in_place_on_a_terminal(monkeypatch):
    """Each process has one line, which the next state replaces; without a terminal each change is a line."""
    monkeypatch.setenv("TERM", "xterm")
    tty, file = TtyStream(), io.StringIO()
    for stream in (tty, file):
        board = StartBoard(["a", "proxy"], Terminal(stream, colour=False))
        board.show(["starting", "starting"], 0.0)
        board.show(["loading", "waiting: a: 503"], 1.0)
        board.show(["ready", "ready"], 2.0)
        board.show(["ready", "ready"], 3.0)
        board.close()
    assert "\033[1A" in tty.getvalue()
    assert "✔ a      ready  2 s  (starting 1.0 s, loading the model 1.0 s)" in tty.getvalue().rpartition("\033[1A")[2]
    assert file.getvalue().splitlines() == [
        "up | a starting, 0.0 s",
        "up | proxy starting, 0.0 s",
        "up | a loading the model, 1.0 s",
        "up | proxy waiting for workers, 1.0 s",
        "up | a ready after 2.0 s (starting 1.0 s, loading the model 1.0 s)",
        "up | proxy ready after 2.0 s (starting 1.0 s, waiting for workers 1.0 s)",
    ]


def test_a_redrawn_line_stays_one_line_on_a_narrow_terminal(monkeypatch):
    """Its end is left out."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    tty = TtyStream()
    board = StartBoard(["a", "proxy"], Terminal(tty, colour=False))
    board.show(["ready", f"waiting: 127.0.0.1:7200: {'x' * 40}"], 1.0)
    board.close()
    shown = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", tty.getvalue()))
    assert max(map(len, shown)) <= 40
    assert {line[-1] for line in shown if "waiting" in line} == {"…"}
