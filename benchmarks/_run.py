"""What the benchmarks share: summaries of repeated measurements, tables, JSON, and a description of the machine."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvbelt.ops.model_dir import find_model
from kvbelt.ops.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one quantity."""

    count: int
    median: float
    low: float  #: 10th percentile
    high: float  #: 90th percentile
    p99: float

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.low)} to {figure(self.high)})"


def summarise(values: Iterable[float]) -> Summary:
    """Median and spread of at least one measurement."""
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        median=statistics.median(ordered),
        low=percentile(ordered, 10),
        high=percentile(ordered, 90),
        p99=percentile(ordered, 99),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values."""
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def figure(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What figures depend on: processor, cores, versions of kvbelt and of these packages."""
    versions: dict[str, str | None] = {}
    for name in ("kvbelt", "torch", "transformers", "nixl", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return made


def add_model_arguments(to: argparse.ArgumentParser) -> None:
    """``--model`` and ``--dtype``."""
    to.add_argument("--model", default="demo", help="demo, or a local Hugging Face model folder")
    to.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def model_folder(name: str) -> Path:
    """The folder of ``--model``; the demo model is made on first use."""
    return find_model(name, note)


class Prompts:
    """Prompts of an exact number of tokens that read like language and never repeat."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._chance = random.Random(seed)

    def make(self, tokens: int) -> list[int]:
        """Token ids of a new prompt."""
        ids: list[int] = []
        while len(ids) < tokens:
            words = self._chance.choices(_WORDS, k=self._chance.randrange(6, 14))
            ids += self._tokenizer.encode(" " + " ".join(words).capitalize() + ".", add_special_tokens=False).ids
        return ids[:tokens]


_TEXT = """
the a this every old new small river mountain harbour teacher farmer engine letter garden market winter
morning answer question carries follows builds remembers forgets paints sells and but while near under
beyond without slowly gladly never always seven twelve stone paper silver quiet bright
"""
_WORDS = _TEXT.split()


def note(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def quiet_terminal() -> Terminal:
    """A launcher's terminal, without the workers' logs."""
    return Terminal(show_logs=False)


def finish(name: str, shown: str, results: Any, json_file: Path | None, *, packages: Sequence[str] = ()) -> None:
    """Print the table, and write the JSON on request; ``packages`` are those whose versions matter."""
    host = machine(packages)
    versions = ", ".join(f"{package} {version}" for package, version in host["versions"].items())
    print(f"{name} on {host['processor']}, {host['cores']} cores; {versions}\n")
    print(shown, flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"benchmark": name, "machine": host, "results": results}
        json_file.write_text(json.dumps(document, indent=2, default=_plain) + "\n", encoding="utf-8")
        note(f"written to {json_file}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return asdict(value)


def verdict(reached: bool, what: str) -> str:
    """One line that says whether a target was reached."""
    return f"{'reached' if reached else 'NOT reached'}: {what}"
