"""Draws the chart of the placement benchmark: which share of the requests is within a level, at which request rate.

python -m tools.draw_placement docs/results/placement-2xh200.json docs/images/placement.svg
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.gpu._figures import Figures, Results

from tools.draw_results import STYLE
from tools.placement import ARRIVALS, LENGTHS, LEVEL_NAMES, Measured, by_load, read_results

LEVEL_TITLES = {"A": "A: TTFT ≤ 500, TPOT ≤ 25 ms", "B": "B: TTFT ≤ 500, ITL p99 ≤ 50 ms"}
#: The lines' classes and what the legend says of them, the last one on top.
LINES = {
    "other": "each other system",
    "best": "the best plain vLLM setting at each rate",
    "kvbelt": "kvbelt, this level set",
}

WIDTH, HEIGHT, PANEL_WIDTH, PANEL_HEIGHT = 760, 576, 300, 170
LEFTS = {"even": 60, "poisson": 436}
TOPS = {"A": 116, "B": 356}

_STYLE = """
.grid { stroke: #d1d9e0 }
.line { fill: none; stroke-linejoin: round; stroke-linecap: round }
.other { stroke: #b7c0ca; stroke-width: 1 }
.best { stroke: #59636e; stroke-width: 2; stroke-dasharray: 5 5 }
.kvbelt { stroke: #0969da; stroke-width: 3 }
@media (prefers-color-scheme: dark) {
.grid { stroke: #3d444d }
.other { stroke: #525b66 }
.best { stroke: #9198a1 }
.kvbelt { stroke: #4493f8 }
}"""


@dataclass(frozen=True, slots=True)
class Panel:
    """The axes of one level and one kind of arrivals."""

    level: str
    arrivals: str
    highest: float  #: rate

    def x(self, rate: float) -> float:
        return round(LEFTS[self.arrivals] + PANEL_WIDTH * rate / (self.highest + 0.5), 1)

    def y(self, share: float) -> float:
        return round(TOPS[self.level] + PANEL_HEIGHT * (1 - share), 1)

    def axes(self, rates: Sequence[float]) -> Iterator[str]:
        left, bottom = LEFTS[self.arrivals], TOPS[self.level] + PANEL_HEIGHT
        title = f"{LEVEL_TITLES[self.level]}; {ARRIVALS[self.arrivals]}"
        yield f'<text class="group" x="{left}" y="{TOPS[self.level] - 12}">{title}</text>'
        for share in (0.0, 0.5, 1.0):
            yield f'<path class="grid" d="M{left} {self.y(share)}h{PANEL_WIDTH}"/>'
            yield f'<text class="quiet" x="{left - 8}" y="{self.y(share) + 4}" text-anchor="end">{share:.0%}</text>'
        for rate in rates:
            yield f'<text class="quiet" x="{self.x(rate)}" y="{bottom + 18}" text-anchor="middle">{rate:g}</text>'

    def line(self, kind: str, name: str, shown: dict[float, Figures | None]) -> Iterator[str]:
        """The shares of one system, with the range of its runs."""
        points = {rate: figures for rate, figures in sorted(shown.items()) if figures is not None}
        if not points:
            return
        path = "L".join(f"{self.x(rate)} {self.y(figures.within[self.level])}" for rate, figures in points.items())
        yield f'<g class="line {kind}"><title>{escape(name)}</title><path d="M{path}h0"/>'  # h0: one point is a dot
        for rate, figures in points.items():
            runs = figures.within_runs[self.level]
            if kind != "other":
                span = f"M{self.x(rate)} {self.y(min(runs))}V{self.y(max(runs))}"
                yield f'<path stroke-dasharray="none" d="{span}"/>'
        yield "</g>"


def chart(results: Results) -> str:
    """The SVG.

    Raises:
        LookupError: no load has the usual lengths.
    """
    loads = [one for one in by_load(results) if one.usual_lengths]
    if not loads:
        raise LookupError(f"no load has {LENGTHS[0]} tokens in and {LENGTHS[1]} out")
    panels = [line for level in LEVEL_NAMES for arrivals in ARRIVALS for line in _panel(level, arrivals, loads)]
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}">',
            f"<style>{STYLE}{_STYLE}</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
            '<text class="title" x="16" y="27">Share of requests within the level, by requests a second</text>',
            f'<text class="quiet" x="16" y="46">{escape(_about(results))}</text>',
            *_legend(),
            *panels,
            "</svg>\n",
        ]
    )


def _panel(level: str, arrivals: str, loads: Sequence[Measured]) -> Iterator[str]:
    # Of loads that differ only in their length, the longest stands for its rate.
    at = {one.load.rate: one for one in loads if one.load.arrivals == arrivals}
    panel = Panel(level, arrivals, max(at, default=1.0))
    yield from panel.axes(list(at))
    for name in sorted({name for one in at.values() for name in one.systems if name != level}):
        yield from panel.line("other", name, {rate: one.systems.get(name) for rate, one in at.items()})
    yield from panel.line("best", "best plain", {rate: one.best_plain(level) for rate, one in at.items()})
    yield from panel.line("kvbelt", f"kvbelt, {level} set", {rate: one.systems.get(level) for rate, one in at.items()})


def _about(results: Results) -> str:
    machine = results.machines[0]
    gpus = machine.get("gpus", [])
    names = f"{len(gpus)} {gpus[0].partition(',')[0]}, " if gpus else ""
    return f"{names}vLLM {machine['vllm']}, NIXL {machine['nixl']}; {LENGTHS[0]:,} tokens in, {LENGTHS[1]} out"


def _legend() -> Iterator[str]:
    x = 16
    for kind, says in reversed(LINES.items()):
        yield f'<path class="line {kind}" d="M{x} 68h28"/><text class="quiet" x="{x + 36}" y="72">{says}</text>'
        x += 64 + 6 * len(says)


def main(argv: list[str]) -> None:
    """Draw the second file from the first one."""
    results, picture = map(Path, argv)
    picture.write_text(chart(read_results(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
