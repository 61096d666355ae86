"""Writes the tables of the placement benchmark, a row for each load, into a page between two marks.

python -m tools.write_placement docs/results/placement-2xh200.json docs/performance.md
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu._figures import Figures, Results
from benchmarks.gpu._load import Load

from kvbelt.errors import SettingsError
from tools.placement import ARRIVALS, LENGTHS, LEVEL_NAMES, Measured, by_load, is_plain, read_results

BEGIN = "<!-- written by python -m tools.write_placement -->"
END = "<!-- end of what is written -->"


def tables(results: Results) -> str:
    """Shares within the levels, then times, then the systems that stand in no column."""
    loads = by_load(results)
    parts = [
        (
            "Share of all requests within the level. Brackets have the lowest and the highest run. Where kvbelt\n"
            f"has level {LEVEL_NAMES[-1]} set, its share within {LEVEL_NAMES[0]} follows."
        ),
        _table(
            ["load", *(head for name in LEVEL_NAMES for head in (f"best plain, {name}", f"kvbelt, {name} set"))],
            ([_name(one.load), *_shares(one)] for one in loads),
        ),
    ]
    for title, cell in _TIMES.items():
        rows = ([_name(one.load), *map(cell, _compared(one))] for one in loads)
        head = ["load", f"best plain, {LEVEL_NAMES[0]}", *(f"kvbelt, {name} set" for name in LEVEL_NAMES)]
        parts += [f"{title}:", _table(head, rows)]
    if others := [[_name(one.load), *row] for one in loads for row in _others(one)]:
        head = [
            "load",
            "system",
            f"within {' / '.join(LEVEL_NAMES)}",
            "TTFT p50 / p99 / longest",
            "TPOT p50 / ITL p99; tok/s",
        ]
        parts += ["Other systems, milliseconds:", _table(head, others)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _name(load: Load) -> str:
    lengths = "" if (load.input_len, load.output_len) == LENGTHS else f", {load.input_len:,} / {load.output_len:,}"
    spread = f", lengths ± {load.spread:.0%}" if load.spread else ""
    return f"{ARRIVALS[load.arrivals]}, {load.rate:g}/s for {load.seconds:g} s{lengths}{spread}"


def _shares(one: Measured) -> Iterator[str]:
    for number, level in enumerate(LEVEL_NAMES):
        best, ours = one.best_plain(level), one.systems.get(level)
        yield "-" if best is None else f"{_share(one, best, level)}, {best.system}"
        if ours is None:
            yield "-"
        else:
            earlier = (f"{name} {_percent(ours.within[name])} %" for name in LEVEL_NAMES[:number])
            yield "; ".join([_share(one, ours, level), *earlier])


def _share(one: Measured, figures: Figures, level: str) -> str:
    """With the seeds, if they are others than those of the load's other systems."""
    runs = figures.within_runs[level]
    spread = f" ({_percent(min(runs))} to {_percent(max(runs))})" if len(runs) > 1 else ""
    seeds = "" if figures.seeds == one.seeds else f", seeds {' '.join(map(str, figures.seeds))} only"
    return f"{_percent(figures.within[level])} %{spread}{seeds}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _ms(*values: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values)


def _compared(one: Measured) -> list[Figures | None]:
    return [one.best_plain(LEVEL_NAMES[0]), *(one.systems.get(name) for name in LEVEL_NAMES)]


def _first_token(f: Figures | None) -> str:
    if f is None:
        return "-"
    missing = f"; {f.asked - f.done} of {f.asked} not answered" if f.done < f.asked else ""
    return _ms(f.ttft_p50, f.ttft_p99, f.ttft_max) + missing


def _between_tokens(f: Figures | None) -> str:
    return "-" if f is None else _ms(f.tpot_p50, f.itl_p99, f.gap2_p50)


def _throughput(f: Figures | None) -> str:
    if f is None:
        return "-"
    busy = " / ".join(f"{gpu:.0f}" for gpu in f.gpus)
    return f"{f.tokens_per_second:,.0f}" + (f"; {busy}" if busy else "")


_TIMES: dict[str, Callable[[Figures | None], str]] = {
    "TTFT p50 / p99 / longest in milliseconds": _first_token,
    "TPOT p50 / ITL p99 / gap before token 2 p50 in milliseconds": _between_tokens,
    "Tokens a second, prompts included; each GPU's utilisation in %": _throughput,
}


def _others(one: Measured) -> Iterator[list[str]]:
    for name, f in one.systems.items():
        if not is_plain(name) and name not in LEVEL_NAMES:
            within = " / ".join(f"{_percent(f.within[level])} %" for level in LEVEL_NAMES)
            yield [name, within, _first_token(f), f"{_ms(f.tpot_p50, f.itl_p99)}; {f.tokens_per_second:,.0f}"]


def redrawn(page: str, results: Results) -> str:
    """The page with its tables.

    Raises:
        SettingsError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingsError(f"the page has no {BEGIN!r} followed by {END!r}; write both where the tables belong")
    return f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}"


def main(argv: list[str]) -> None:
    """Write the tables of the first file into the second one."""
    results, page = map(Path, argv)
    page.write_text(redrawn(page.read_text(encoding="utf-8"), read_results(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
