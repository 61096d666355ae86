"""Helpers to read scrapes and rules."""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvbelt.metrics import CATALOGUE, By, Kind
from tests.programs import need_program


def names_in(text: str) -> dict[str, Kind]:
    """Each metric as the catalogue names it, and its kind."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = Kind(family.type)
    return found


def expected(by: By) -> set[str]:
    """The names of metrics that such a process exports."""
    return {spec.name for spec in CATALOGUE.values() if by in spec.by}


def value_in(text: str, name: str, **labels: str) -> float:
    """The value of a series, or the sum of several."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"


_NAME = re.compile(r"\b(?:kvbelt|lmcache|nixl|process)_[a-z0-9_]+|\bkvbelt:[a-z0-9_:]+")


def rules_of(file: str) -> list[dict[str, Any]]:
    """Every rule of a file."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> set[str]:
    """Names that recording rules make."""
    return {rule["record"] for rule in rules_of("recording.yml")}


def unknown_names(expression: str) -> set[str]:
    """Names in an expression that no process exports and no rule records."""
    known = set(recorded())
    for spec in CATALOGUE.values():
        parts = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count"), Kind.SUMMARY: ("_sum", "_count")}.get(spec.kind, ("",))
        known |= {spec.name + part for part in parts}
    # Labels and their values are no names of metrics.
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', expression))) - known


def promtool(*arguments: str) -> None:
    """Run promtool, which must succeed."""
    done = subprocess.run([need_program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
