"""Draws what commands show on terminals of three sizes, light and dark.

python -m tools.draw_screens docs/images/terminal

A test compares their text with what the commands say today.
"""

import asyncio
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI
from rich.text import Text

from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.ops.top_app import TopApp
from kvbelt.wire.console import ConsoleState
from tools import screens

#: Columns and lines. What a command prints may be longer than its terminal.
SIZES = {"60": (60, 24), "80": (80, 24), "120": (120, 40)}
THEMES = {"light": DEFAULT_TERMINAL_THEME, "dark": MONOKAI}
#: Of a deployment, as ``kvbelt top`` shows them at 80 columns.
STATES = ("calm", "overloaded", "dead-worker", "empty")
PRINTED = {"up": screens.up, "why": screens.why, "doctor": screens.doctor}
NAMES = (*PRINTED, "top")
FILES = (
    *(f"{name}-{size}-{theme}.svg" for name in NAMES for size in SIZES for theme in THEMES),
    *(f"top-{state}.svg" for state in STATES),
)

#: As rich's own, without a window's frame and without a font from elsewhere.
_SVG = """\
<svg viewBox="VIEW" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
<rect x="-10" y="-8" width="100%" height="100%" fill="BACKGROUND" rx="6"/>
<g>
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class _Example(TopApp):
    """Has its answers from the example."""

    answers: Sequence[ConsoleState] = ()

    async def poll(self) -> None:
        for state in self.answers:
            self.show(state)


def _console(width: int) -> Console:
    return Console(
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        record=True,
        legacy_windows=False,
    )


def _exported(console: Console, name: str, theme: str) -> str:
    colours = THEMES[theme]
    background = "#{:02x}{:02x}{:02x}".format(*colours.background_color)
    drawn = console.export_svg(title="", theme=colours, code_format=_SVG, unique_id=f"{name}-{theme}")
    (width, height), *_ = re.findall(r'<rect width="([0-9.]+)" height="([0-9.]+)"/>', drawn)
    view = f"-10 -8 {float(width) + 20:.0f} {float(height) + 16:.0f}"
    return drawn.replace("VIEW", view).replace("BACKGROUND", background)


def printed(name: str, size: str, theme: str) -> str:
    """A command's output. A line that is too long goes on in the next one, as on a terminal."""
    width = SIZES[size][0]
    console = _console(width)
    for line in PRINTED[name](width):
        text = Text.from_ansi(line)
        for piece in text.divide(range(width, len(text), width)):
            console.print(piece, soft_wrap=True)
    return _exported(console, name, theme)


async def top(size: str, theme: str, answers: Sequence[ConsoleState]) -> str:
    """The program in memory, after it has had all its answers."""
    app = _Example(ProxyClient(screens.URL), window=10, interval=1, light=theme == "light")
    app.answers = answers
    async with app.run_test(size=SIZES[size]) as pilot:
        await pilot.pause()
        await app.workers.wait_for_complete()
        await pilot.pause()
        console = _console(SIZES[size][0])
        console.print(app.screen._compositor.render_update(full=True))  # noqa: SLF001 -- as Textual's own export does
    return _exported(console, "top", theme)


def drawn() -> Iterator[tuple[str, str]]:
    """Each file's name and content."""
    for size in SIZES:
        for theme in THEMES:
            for name in PRINTED:
                yield f"{name}-{size}-{theme}.svg", printed(name, size, theme)
            yield f"top-{size}-{theme}.svg", asyncio.run(top(size, theme, screens.top()))
    for state, answer in screens.console().items():
        yield f"top-{state}.svg", asyncio.run(top("80", "dark", [answer]))


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawn():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
