"""Bars on a common time axis, as text. Pure.

A bar has a resolution of an eighth of a character. A shorter span gets the thinnest mark, so that none is invisible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: Left-aligned blocks of one to eight eighths.
_EIGHTHS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Bar:
    """One span, in milliseconds from the start of the axis."""

    label: str
    start: float
    duration: float
    note: str = ""


def milliseconds(value: float) -> str:
    """Three significant digits below 100, whole milliseconds above: ``0.413``, ``4.13``, ``41.3``, ``4,130``."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def bytes_of(count: float) -> str:
    """Three significant digits, with a decimal unit: ``46.1 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def drawn(bar: Bar, total: float, width: int, *, plain: bool = False) -> str:
    """One bar as ``width`` characters, on an axis of ``total`` milliseconds."""
    if total <= 0:
        return " " * width
    cells = width * 8
    start = min(max(0, round(cells * bar.start / total)), cells - 1)
    end = min(max(start + 1, round(cells * (bar.start + bar.duration) / total)), cells)
    # Rounding is no reason for the sign of a bar that goes on.
    goes_on = bar.start + bar.duration > total * (1 + 1e-9)
    first, last = start // 8, (end - 1) // 8
    if plain:
        return _signed((" " * first + "#" * (last - first + 1)).ljust(width), ">" if goes_on else "")
    # Block characters grow from the left only, so a bar starts at a whole character and ends at an eighth.
    filled = max(1, end - 8 * first)
    text = " " * first + "█" * (filled // 8) + (_EIGHTHS[filled % 8 - 1] if filled % 8 else "")
    return _signed(text.ljust(width)[:width], "▶" if goes_on else "")


def _signed(text: str, sign: str) -> str:
    return text[:-1] + sign if sign else text


def axis_line(total: float, width: int) -> str:
    """The axis from 0 to ``total`` milliseconds, with a number at each end and, where it fits, in the middle."""
    left, middle, right = "0", milliseconds(total / 2), f"{milliseconds(total)} ms"
    line = left + right.rjust(width - len(left))
    begin = width // 2 - len(middle) // 2
    free = line[begin - 2 : begin + len(middle) + 2]
    return line if free.strip() or begin < 2 else line[:begin] + middle + line[begin + len(middle) :]


def chart(bars: Sequence[Bar], *, width: int = 80, plain: bool = False, end: float | None = None) -> list[str]:
    """The time axis, and one line per bar: label, milliseconds, bar, note.

    Args:
        bars: in the order to show.
        width: characters per line; a note that does not fit goes on the next line.
        plain: ASCII only.
        end: of the axis, in milliseconds; a bar that goes on has a sign there (default: the last bar's end).
    """
    if not bars:
        return []
    total = max(bar.start + bar.duration for bar in bars) if end is None else end
    labels = max(len(bar.label) for bar in bars)
    times = [f"{milliseconds(bar.duration)} ms" for bar in bars]
    time_width = max(map(len, times))
    head_width = 2 + labels + 2 + time_width + 2
    axis = max(10, min(40, width - head_width - 2))
    lines = [" " * head_width + axis_line(total, axis)] if total > 0 else []
    for bar, time in zip(bars, times, strict=True):
        line = f"  {bar.label:<{labels}}  {time:>{time_width}}  {drawn(bar, total, axis, plain=plain)}"
        if bar.note and len(line) + 2 + len(bar.note) <= width:
            lines.append(f"{line}  {bar.note}")
        else:
            lines.append(line.rstrip())
            if bar.note:
                lines.append(" " * head_width + bar.note)
    return lines
