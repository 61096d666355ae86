"""Draws the chart of the README from the results of a serving benchmark.

python -m tools.draw_results docs/results/vllm-0.26-2xh200.json docs/images/results.svg

GitHub shows an SVG image in the colours of the reader's system, which need not be those of the page around it. So the
chart has a background, and its text is readable on any page.
"""

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import msgspec

#: The system's name in the results, and its name in the chart.
SYSTEMS = {
    "aggregated": "plain vLLM",
    "nixl": "vLLM, NixlConnector",
    "kvbelt": "kvbelt",
}
#: The chart's groups of bars: title, field of vLLM's benchmark.
FIGURES = {
    "time to first token, median": "p50_ttft_ms",
    "time to first token, 99th percentile": "p99_ttft_ms",
    "time between tokens, 99th percentile": "p99_itl_ms",
}
RATE = 4.0

WIDTH, LEFT, RIGHT, TOP = 760, 190, 80, 64
BAR, BAR_STEP, GROUP_HEAD, GROUP_GAP = 16, 21, 22, 12

STYLE = """\
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.quiet { fill: #59636e; font-size: 12px }
.group, .kvbelt text { font-weight: 600 }
.paper { fill: #ffffff; stroke: #d1d9e0 }
.bar { fill: #b7c0ca }
.kvbelt .bar { fill: #0969da }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.quiet { fill: #9198a1 }
.paper { fill: #0d1117; stroke: #3d444d }
.bar { fill: #525b66 }
.kvbelt .bar { fill: #4493f8 }
}"""


class Plan(msgspec.Struct):
    """The load of a session."""

    input_len: int
    output_len: int


class Run(msgspec.Struct):
    """One rate of one system. ``bench`` is what ``vllm bench serve`` wrote."""

    rate: float
    bench: dict[str, object]


class Session(msgspec.Struct):
    """One system, at each rate."""

    system: str
    versions: dict[str, object]
    plan: Plan
    runs: list[Run]


def chart(results: bytes) -> str:
    """The SVG of a results file.

    Raises:
        LookupError: a system or the rate is missing.
    """
    sessions = {session.system: session for session in msgspec.json.decode(results, type=list[Session])}
    first = sessions["aggregated"]
    gpus = first.versions["gpus"]
    assert isinstance(gpus, list)
    load = f"{first.plan.input_len:,} tokens in, {first.plan.output_len} out, {RATE:g} requests a second"
    gpu, _, _ = str(gpus[0]).partition(",")
    machine = f"{len(gpus)} {gpu}, vLLM {first.versions['vllm']}, NIXL {first.versions['nixl']}"
    bars = list(_bars({system: _figures(sessions[system]) for system in SYSTEMS}))
    height = TOP + len(FIGURES) * (GROUP_HEAD + len(SYSTEMS) * BAR_STEP + GROUP_GAP)
    size = f'width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {height}">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
            '<text class="title" x="16" y="27">Milliseconds; shorter is better</text>',
            f'<text class="quiet" x="16" y="46">{escape(f"{machine}; {load}")}</text>',
            *bars,
            "</svg>\n",
        ]
    )


def _figures(session: Session) -> dict[str, float]:
    bench = next((run.bench for run in session.runs if run.rate == RATE), None)
    if bench is None:
        raise LookupError(f"{session.system} has no run at {RATE:g} requests a second")
    return {field: float(str(bench[field])) for field in FIGURES.values()}


def _bars(figures: dict[str, dict[str, float]]) -> Iterator[str]:
    scale = (WIDTH - LEFT - RIGHT) / max(value for row in figures.values() for value in row.values())
    y = TOP
    for title, field in FIGURES.items():
        yield f'<text class="group" x="16" y="{y + 14}">{title}</text>'
        y += GROUP_HEAD
        for system, name in SYSTEMS.items():
            value = figures[system][field]
            yield (
                f'<g class="{system}"><text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>'
                f'<rect class="bar" x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" rx="2"/>'
                f'<text x="{LEFT + value * scale + 6:.1f}" y="{y + 13}">{value:.0f}</text></g>'
            )
            y += BAR_STEP
        y += GROUP_GAP


def main(argv: list[str]) -> None:
    """Draw the second file from the first one."""
    results, picture = map(Path, argv)
    picture.write_text(chart(results.read_bytes()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
