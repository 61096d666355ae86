"""The figures of a load of a system: without the times of each request, they are small enough to be published."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.gpu._rows import LEVELS, Row, percentile, share_within


class Figures(msgspec.Struct):
    """One load of one system, its seeds and repetitions together; times in milliseconds, None: none was measured."""

    system: str
    load: str
    seeds: list[int]  #: of each run
    asked: int
    done: int
    ttft_p50: float | None
    ttft_p99: float | None
    ttft_max: float | None
    tpot_p50: float | None
    tpot_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    gap2_p50: float | None  #: between the first and the second token
    within: dict[str, float]  #: by level: the share of all requests
    within_runs: dict[str, list[float]]  #: the same of each run
    tokens_per_second: float
    gpus: list[float]  #: mean utilisation in percent
    actions: dict[str, int]
    lag_max: float  #: of the client
    arguments: list[str] = msgspec.field(default_factory=list)  #: of kvbelt's proxy


class Results(msgspec.Struct):
    """What is published of a benchmark."""

    machines: list[dict[str, Any]]  #: versions and GPUs, as each session had them
    figures: list[Figures]


def figures_of(rows: Sequence[Row]) -> Figures:
    """The figures of one load of one system."""
    answers = [answer for row in rows for answer in row.answers]
    done = [answer for answer in answers if not answer.error]
    ttft, tpot = [answer.ttft for answer in done], [answer.tpot for answer in done if answer.gaps]
    gaps = [gap for answer in done for gap in answer.gaps]
    second = [answer.gaps[0] for answer in done if answer.gaps]
    tokens = sum(answer.prompt + answer.tokens for answer in done) / sum(row.seconds for row in rows)
    names = sorted({gpu for row in rows for gpu in row.gpus})
    busy = [sum(row.gpus.get(gpu, {"utilisation": 0})["utilisation"] for row in rows) / len(rows) for gpu in names]

    def ms(values: Sequence[float], share: float) -> float | None:
        return round(percentile(values, share), 2) if values else None

    return Figures(
        system=rows[0].system,
        load=rows[0].load,
        seeds=[row.seed for row in rows],
        asked=len(answers),
        done=len(done),
        ttft_p50=ms(ttft, 0.5),
        ttft_p99=ms(ttft, 0.99),
        ttft_max=ms(ttft, 1.0),
        tpot_p50=ms(tpot, 0.5),
        tpot_p99=ms(tpot, 0.99),
        itl_p50=ms(gaps, 0.5),
        itl_p99=ms(gaps, 0.99),
        gap2_p50=ms(second, 0.5),
        within={level.name: round(share_within(answers, level), 5) for level in LEVELS},
        within_runs={level.name: [round(share_within(row.answers, level), 5) for row in rows] for level in LEVELS},
        tokens_per_second=round(tokens, 1),
        gpus=[round(share, 1) for share in busy],
        actions=dict(Counter(answer.action for answer in done).most_common()),
        lag_max=max(answer.lag for answer in answers),
        arguments=list(rows[0].about.get("arguments", ())),
    )


def results_of(rows: Iterable[Row]) -> Results:
    """The figures of all rows: one for each load and system, in the order in which they were measured."""
    together: dict[tuple[str, str], list[Row]] = {}
    machines: list[dict[str, Any]] = []
    for row in rows:
        together.setdefault((row.load, row.system), []).append(row)
        machine = row.about.get("versions", {})
        if machine not in machines:
            machines.append(machine)
    return Results(machines, [figures_of(same) for same in together.values()])


def write_results(file: Path, results: Results) -> None:
    """Write a line for each load and system, so that a change can be read."""
    lines = ",\n".join(msgspec.json.encode(figures).decode() for figures in results.figures)
    machines = msgspec.json.encode(results.machines).decode()
    file.write_text(f'{{"machines": {machines}, "figures": [\n{lines}\n]}}\n', encoding="utf-8")


HEAD = (
    "system", "load", "seeds", "done", "TTFT p50", "p99", "max", "TPOT p50", "p99", "ITL p50", "p99", "gap 2 p50",
    *(f"within {level.name}" for level in LEVELS), "tok/s", "GPU %", "actions", "client's lag",
)  # fmt: skip


def cells(f: Figures) -> list[str]:
    """A line of the table."""
    times = (
        f.ttft_p50, f.ttft_p99, f.ttft_max, f.tpot_p50, f.tpot_p99, f.itl_p50, f.itl_p99, f.gap2_p50,
    )  # fmt: skip
    return [
        f.system,
        f.load,
        ",".join(str(seed) for seed in f.seeds),
        f"{f.done}/{f.asked}",
        *("-" if value is None else f"{value:.1f}" for value in times),
        *(f"{100 * share:.1f} %" for share in f.within.values()),
        f"{f.tokens_per_second:,.0f}",
        "/".join(f"{value:.0f}" for value in f.gpus) or "-",
        ", ".join(f"{action}: {count}" for action, count in f.actions.items()),
        f"{f.lag_max:.1f}",
    ]


def print_results(results: Results) -> None:
    """Print a table in Markdown, a line for each system and load; milliseconds."""
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for figures in results.figures:
        print("| " + " | ".join(cells(figures)) + " |")
