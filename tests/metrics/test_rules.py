"""The rules of deploy/prometheus: the seed's three alerts to the letter, and no name that nobody exports."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvbelt.metrics import CATALOGUE, Kind
from kvbelt.ops.draw_rules import drawn
from tests.e2e.prometheus import hurried
from tests.programs import need_program

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"

#: As they were given to us.
SEED = """
- alert: DisaggHighTTFT
  expr: histogram_quantile(0.99, rate(lmcache_ttft_bucket[5m])) > 500
  for: 2m
  labels:
    severity: warning
  annotations:
    summary: "Disaggregated Prefill TTFT > 500ms"
- alert: NIXLTransferFailure
  expr: rate(lmcache_nixl_transfer_failures_total[5m]) > 0.1
  for: 1m
  labels:
    severity: critical
  annotations:
    summary: "NIXL 传输失败率过高"
- alert: PrefillerOverload
  expr: lmcache_prefill_queue_size > 10
  for: 3m
  labels:
    severity: warning
  annotations:
    summary: "Prefiller 队列堆积"
"""

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
    """It must succeed."""
    done = subprocess.run([need_program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_seed_s_alerts_are_there_to_the_letter() -> None:
    """Name, expression, time, labels and summary; what to do is added."""
    ours = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
    for theirs in yaml.safe_load(SEED):
        rule = ours[theirs["alert"]]
        assert rule == theirs | {"annotations": theirs["annotations"] | {"action": rule["annotations"]["action"]}}


@pytest.mark.parametrize(
    "rule", rules_of("recording.yml") + rules_of("alerts.yml"), ids=lambda r: next(iter(r.values()))
)
def test_a_rule_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    """And every alert has a severity, a summary and what to do."""
    assert unknown_names(rule["expr"]) == set()
    if "alert" in rule:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "action"}


def test_promtool_finds_the_rules_and_the_example_right() -> None:
    """The configuration is of 2p2d with the usual ports."""
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_kubernetes_gets_the_same_rules() -> None:
    """To the letter; python -m kvbelt.ops.draw_rules deploy draws them anew."""
    deploy = PROMETHEUS.parent
    for place, text in drawn(deploy).items():
        assert (deploy / place).read_text(encoding="utf-8") == text, place


def test_every_alert_fires_when_it_should_and_not_before() -> None:
    """In promtool's simulation of time; each alert has a test there."""
    tests = PROMETHEUS / "tests" / "alerts.yml"
    named = {test["name"].split(" ")[0] for test in yaml.safe_load(tests.read_text(encoding="utf-8"))["tests"]}
    assert named == {rule["alert"] for rule in rules_of("alerts.yml")}
    promtool("test", "rules", str(tests))


def test_a_hurried_rule_differs_in_its_durations_only() -> None:
    """Divided by 60, in windows and in for; nothing else of the file changes."""
    text = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
    changed = [pair for pair in zip(text.splitlines(), hurried(text).splitlines(), strict=True) if pair[0] != pair[1]]
    assert all("for: " in before or "[" in before for before, _ in changed)
    assert "        for: 2000ms" in hurried(text)
    assert "rate(lmcache_nixl_transfer_failures_total[5000ms]) > 0.1" in hurried(text)
    assert not re.search(r"\[\d+m\]|for: \d+[smh]\n", hurried(text))
