"""The table of the results of ``serving.py``."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = (
    "system", "shape", "beside", "rate", "done", "TTFT p50", "p99", "TPOT p50", "ITL p50", "p99", "gap 2 p50", "tok/s",
    "exposed p50", "p99", "GPU %", "paths",
)  # fmt: skip


def cells(system: str, run: dict[str, Any]) -> list[str]:
    saved = run["bench"]
    exposed = sorted(
        request["transfer"]["exposed_ms"]
        for request in run.get("requests", [])
        if request["transfer"] and request["transfer"]["state"] == "done"
    )
    busy = "/".join(f"{gpu['utilisation']:.0f}" for gpu in run["gpus"].values()) or "-"
    figures = [saved[name] for name in ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p50_itl_ms", "p99_itl_ms")]
    done = f"{saved['completed']}/{run['prompts']}"
    ends = [f"{exposed[len(exposed) // 2]:.1f}", f"{exposed[-1 - len(exposed) // 100]:.1f}"] if exposed else ["-", "-"]
    total = f"{saved['total_token_throughput']:,.0f}"
    gaps = [gaps[0] * 1000 for gaps in saved["itls"] if gaps]
    figures.append(statistics.median(gaps) if gaps else float("nan"))
    paths = " ".join(f"{path}:{count}" for path, count in run.get("paths", {}).items()) or "-"
    where = [run.get("shape", "-"), str(run.get("beside", "-"))]
    return [system, *where, f"{run['rate']:g}", done, *(f"{value:.1f}" for value in figures), total, *ends, busy, paths]


def line_of(system: str, run: dict[str, Any]) -> str:
    return "| " + " | ".join(f"{name} {cell}" for name, cell in zip(HEAD, cells(system, run), strict=True)) + " |"


def print_table(out: Path, systems: Sequence[str]) -> None:
    """Print all measured systems side by side, in milliseconds."""
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for system in systems:
        path = out / f"{system}.json"
        for run in json.loads(path.read_text())["runs"] if path.exists() else []:
            print("| " + " | ".join(cells(system, run)) + " |")
    traced = out / "kvbelt.json"
    for name, lines in (json.loads(traced.read_text()) if traced.exists() else {}).get("traces", {}).items():
        if ways := ways_of(lines):
            print(f"\n{name}: milliseconds since the server's scheduler got the request, median and 90th percentile")
            for events, requests in ways.most_common(3):
                print(f"{len(requests)} requests: " + ", ".join(_spread(event, requests) for event in events))


def ways_of(lines: Sequence[str]) -> "Ways":
    """What happened to the requests that a decode server has loaded, up to the second step of each."""
    by_request: dict[str, list[tuple[float, str]]] = {}
    for line in lines:
        noted = json.loads(line)
        by_request.setdefault(noted["request"], []).append((noted["ms"], noted["what"]))
    ways = Ways()
    for noted in by_request.values():
        events: dict[str, float] = {}
        for moment, what in sorted(noted):
            name = "scheduled again" if what == "scheduled" and "scheduled" in events else what
            events.setdefault(name, moment)
        if "new" in events and "scheduled again" in events and "fill" in events:
            kept = {what: at - events["new"] for what, at in events.items() if at <= events["scheduled again"]}
            ways.setdefault(tuple(kept), []).append(kept)
    return ways


class Ways(dict[tuple[str, ...], list[dict[str, float]]]):
    """Requests by the sequence of what happened to them."""

    def most_common(self, number: int) -> list[tuple[tuple[str, ...], list[dict[str, float]]]]:
        return sorted(self.items(), key=lambda way: -len(way[1]))[:number]


def _spread(event: str, requests: list[dict[str, float]]) -> str:
    moments = sorted(request[event] for request in requests)
    return f"{event} {moments[len(moments) // 2]:.1f} ({moments[len(moments) * 9 // 10]:.1f})"
