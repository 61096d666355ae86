"""``kvbelt top`` on a terminal: figures with their history, workers and requests, drawn anew at each answer."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import quote

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static

from kvbelt.errors import KVBeltError, SettingsError
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.top_view import (
    REQUESTS,
    WORKERS,
    Column,
    History,
    about_worker,
    figures,
    in_order,
    rate,
    severity,
    uptime,
)
from kvbelt.ops.why import describe
from kvbelt.wire.console import CONSOLE_STATE, Alarm, ConsoleState, RequestRow
from kvbelt.wire.request_record import REQUEST_RECORD
from kvbelt.wire.workers import WorkerRow

Row = TypeVar("Row")

#: Of the terminal's own palette, so that they fit light and dark ones.
_STYLES = {"critical": "bold red", "warning": "bold yellow", "": ""}
_NAME_WIDTH, _VALUE_WIDTH = 16, 32


def light_terminal() -> bool:
    """Whether the terminal says that its background is light: ``COLORFGBG`` ends with its colour."""
    return os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")


class RowTable(DataTable[Text], Generic[Row]):
    """Rows in the order of one column, which ``s`` changes."""

    BINDINGS: ClassVar[list[Any]] = [
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("enter", "select_cursor", "Open"),
        Binding("tab", "app.focus_next", "Other table"),
    ]

    def __init__(self, columns: Sequence[Column[Row]], key: Callable[[Row], str], *, falling: bool, id: str) -> None:  # noqa: A002 -- Textual's name
        super().__init__(cursor_type="row", cursor_foreground_priority="renderable", id=id)
        self._columns, self._row_key, self._sorted, self._falling = columns, key, columns[0], falling
        self._rows: list[Row] = []
        self._alarms: Sequence[Alarm] = ()
        self.by_key: dict[str, Row] = {}

    @property
    def _shown(self) -> list[Column[Row]]:
        return [column for column in self._columns if column.least_width <= self.app.size.width]

    def show(self, rows: Sequence[Row], alarms: Sequence[Alarm]) -> None:
        """Draw rows; the cursor stays on its row."""
        self._rows, self._alarms = list(rows), alarms
        chosen = self._chosen()
        self.clear(columns=True)
        for column in self._shown:
            arrow = ("▼" if self._falling else "▲") if column is self._sorted else ""
            self.add_column(Text(column.title + arrow, justify="right" if column.right else "left"), key=column.title)
        self.by_key = {self._row_key(row): row for row in in_order(rows, self._sorted, falling=self._falling)}
        for name, row in self.by_key.items():
            self.add_row(*(self._cell(column, row) for column in self._shown), key=name)
        if chosen in self.by_key:
            self.move_cursor(row=list(self.by_key).index(chosen), scroll=True)

    def _cell(self, column: Column[Row], row: Row) -> Text:
        style = _STYLES[severity(self._alarms, column.subject, row)]
        return Text(column.shown(row), style=style, justify="right" if column.right else "left")

    def _chosen(self) -> str:
        names = list(self.by_key)
        return names[self.cursor_row] if self.cursor_row < len(names) and self.cursor_row > 0 else ""

    def sort_by(self, title: str) -> None:
        """By a column; by the same one in the other direction."""
        if title == self._sorted.title:
            self._falling = not self._falling
        else:
            self._sorted = next(column for column in self._columns if column.title == title)
        self.show(self._rows, self._alarms)

    def action_sort(self) -> None:
        shown = self._shown
        at = shown.index(self._sorted) if self._sorted in shown else -1
        self.sort_by(shown[(at + 1) % len(shown)].title)

    def action_reverse(self) -> None:
        self.sort_by(self._sorted.title)


class Opened(ModalScreen[None]):
    """One worker or request in full."""

    BINDINGS: ClassVar[list[Any]] = [Binding("escape,enter,q", "dismiss", "Back")]

    def __init__(self, lines: Callable[[int], Sequence[str]]) -> None:
        super().__init__()
        self._lines = lines

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(Text("\n".join(self._lines(self.app.size.width - 4))), id="opened")
        yield Footer()


class TopApp(App[None]):
    """Asks the proxy once an interval, and waits for it while it does not answer."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "kvbelt top"
    CSS = """
    #head, #figures { height: auto; text-wrap: nowrap; text-overflow: ellipsis; }
    #alarms { height: auto; max-height: 3; }
    #figures { margin: 0 0 1 0; }
    RowTable { height: 1fr; scrollbar-size: 0 1; }
    RowTable > .datatable--header { background: ansi_default; color: ansi_default; text-style: bold underline; }
    #workers { height: auto; max-height: 45%; margin: 0 0 1 0; }
    Opened VerticalScroll { padding: 1 2; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("q,ctrl+c,ctrl+d", "quit", "Quit", priority=False),
        Binding("w", "window", "Window"),
    ]
    _WINDOWS = (10, 60, 300, 600)

    def __init__(self, proxy: ProxyClient, *, window: int, interval: float, light: bool) -> None:
        super().__init__()
        self.theme = "ansi-light" if light else "ansi-dark"
        self.failed: SettingsError | None = None
        self._proxy, self._window, self._interval = proxy, window, interval
        self._history = History()
        self._state: ConsoleState | None = None
        self._gone, self._gone_since = "", 0.0
        self._asked = asyncio.Event()

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="alarms")
        yield Static(id="figures")
        yield RowTable[WorkerRow](WORKERS, lambda row: f"{row.role} {row.worker}", falling=False, id="workers")
        yield RowTable[RequestRow](REQUESTS, lambda row: row.request_id, falling=True, id="requests")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#requests").focus()
        self.run_worker(self.poll(), name="poll")

    async def poll(self) -> None:
        """Ask until the end."""
        while True:
            place = f"/kvbelt/console.json?window={self._window}"
            try:
                state = await asyncio.to_thread(self._proxy.get, place, CONSOLE_STATE)
            except SettingsError as error:  # waiting does not mend it
                self.failed = error
                self.exit()
                return
            except KVBeltError as error:
                self._gone_since = self._gone_since or time.monotonic()
                self._gone = str(error)
            else:
                self._gone, self._gone_since = "", 0.0
                self.show(state)
            if self._gone:
                self._draw()
            self._asked.clear()
            try:
                async with asyncio.timeout(self._interval):
                    await self._asked.wait()
            except TimeoutError:
                pass

    def show(self, state: ConsoleState) -> None:
        """Show an answer of the proxy."""
        self._state = state
        self._history.add(state)
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if len(self.screen_stack) > 1 or not self.query("#head"):  # something is open, or the end has come
            return
        state, width = self._state, self.size.width
        self.query_one("#head", Static).update(self._head(state))
        self.query_one("#alarms", Static).update(self._trouble(state))
        if state is None:
            return
        shown = [self._figure(figure, state, width) for figure in figures(state.live)]
        self.query_one("#figures", Static).update(Text("\n").join(shown))
        self.query_one("#workers", RowTable).show(state.workers, state.alarms)
        self.query_one("#requests", RowTable).show(list(self._history.requests.values()), state.alarms)

    def _head(self, state: ConsoleState | None) -> Text:
        text = Text()
        text.append("kvbelt top", style="bold")
        text.append(f"  {self._proxy.url}")
        if state is not None:
            proxy = state.proxy
            text.append(
                f"  {proxy.model or 'no model yet'}  {proxy.in_flight} under way"
                f"  {rate(state.live.errors_per_second)} errors/s  last {state.live.seconds:.0f} s"
                f"  up {uptime(proxy.uptime_seconds)}"
            )
        return text

    def _trouble(self, state: ConsoleState | None) -> Text:
        text = Text()
        if self._gone:
            seconds = time.monotonic() - self._gone_since
            older = ", older values below" if state is not None else ""
            return text.append(f"waiting for the proxy for {seconds:.0f} s{older}: {self._gone}", style="bold red")
        if state is None:
            return text.append("asking the proxy")
        if not state.alarms:
            return text.append("✔ no threshold of the alerts is passed", style="green")
        first, *others = state.alarms
        more = f" (and {len(others)} more)" if others else ""
        return text.append(f"✖ {first.what}{more}: {first.change}", style=_STYLES[first.severity])

    def _figure(self, figure: Any, state: ConsoleState, width: int) -> Text:
        text = Text(f"{figure.name:<{_NAME_WIDTH}}")
        text.append(f"{figure.shown:<{_VALUE_WIDTH}}", style=_STYLES[severity(state.alarms, figure.subject)])
        text.append(self._history.sparks(figure.of, max(0, width - _NAME_WIDTH - _VALUE_WIDTH)), style="blue")
        return text

    def action_window(self) -> None:
        """The next longer window of rates and percentiles, or the shortest."""
        self._window = next((one for one in self._WINDOWS if one > self._window), self._WINDOWS[0])
        self._asked.set()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        if isinstance(event.data_table, RowTable):
            event.data_table.sort_by(str(event.column_key.value))

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        table = event.data_table
        row = table.by_key.get(str(event.row_key.value)) if isinstance(table, RowTable) else None
        state = self._state
        if isinstance(row, WorkerRow) and state is not None:
            self.push_screen(Opened(lambda _: about_worker(row, state)), lambda _: self._draw())
        elif isinstance(row, RequestRow):
            self.push_screen(Opened(await self._about_request(row.request_id)), lambda _: self._draw())

    async def _about_request(self, request_id: str) -> Callable[[int], Sequence[str]]:
        place = f"/kvbelt/requests/{quote(request_id, safe='')}"
        try:
            record = await asyncio.to_thread(self._proxy.get, place, REQUEST_RECORD)
        except KVBeltError as error:
            said = [str(error)]
            return lambda _: said
        return lambda width: describe(record, width=width)
