"""The rules of deploy/prometheus: the seed's three alerts unchanged, and no unknown metric."""

import re
from typing import Any

import pytest
import yaml
from tools.draw_rules import drawn

from tests.e2e.prometheus import hurried
from tests.metrics.scrape import PROMETHEUS, promtool, rules_of, unknown_names

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


def test_the_seed_s_alerts_are_there_to_the_letter() -> None:
    """Name, expression, time, labels and summary are the seed's; the action is ours."""
    ours = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
    for theirs in yaml.safe_load(SEED):
        rule = ours[theirs["alert"]]
        assert rule == theirs | {"annotations": theirs["annotations"] | {"action": rule["annotations"]["action"]}}


@pytest.mark.parametrize(
    "rule", rules_of("recording.yml") + rules_of("alerts.yml"), ids=lambda r: next(iter(r.values()))
)
def test_a_rule_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    """Every alert also has a severity, a summary and an action."""
    assert unknown_names(rule["expr"]) == set()
    if "alert" in rule:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "action"}


def test_promtool_finds_the_rules_and_the_example_right() -> None:
    """The configuration is of 2p2d with the usual ports."""
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_kubernetes_gets_the_same_rules() -> None:
    """``python -m tools.draw_rules deploy`` changes nothing."""
    deploy = PROMETHEUS.parent
    for place, text in drawn(deploy).items():
        assert (deploy / place).read_text(encoding="utf-8") == text, place


def test_every_alert_fires_when_it_should_and_not_before() -> None:
    """Each alert has a test in promtool's simulated time."""
    tests = PROMETHEUS / "tests" / "alerts.yml"
    named = {test["name"].split(" ")[0] for test in yaml.safe_load(tests.read_text(encoding="utf-8"))["tests"]}
    assert named == {rule["alert"] for rule in rules_of("alerts.yml")}
    promtool("test", "rules", str(tests))


def test_a_hurried_rule_differs_in_its_durations_only() -> None:
    """All durations are divided by 60; nothing else changes."""
    text = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
    changed = [pair for pair in zip(text.splitlines(), hurried(text).splitlines(), strict=True) if pair[0] != pair[1]]
    assert all("for: " in before or "[" in before for before, _ in changed)
    assert "        for: 2000ms" in hurried(text)
    assert "rate(lmcache_nixl_transfer_failures_total[5000ms]) > 0.1" in hurried(text)
    assert not re.search(r"\[\d+m\]|for: \d+[smh]\n", hurried(text))
