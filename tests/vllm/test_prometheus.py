"""Our figures in vLLM's metrics, with vLLM's own classes. Skipped where vLLM is not installed."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from kvbelt.vllm.figures import Figure

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def metrics() -> Iterator[Any]:
    """The metrics of one engine, as its HTTP process creates them."""
    from kvbelt.vllm.prometheus import BeltProm  # noqa: PLC0415 -- it imports vllm

    kinds = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    made = BeltProm(SimpleNamespace(kv_transfer_config=None), kinds, ["model_name", "engine"], {0: ["demo", "0"]})
    yield made
    for metric in made._metrics.values():
        REGISTRY.unregister(metric)


def report(source: str, sent: float, used: float) -> dict[str, Any]:
    """The serialised report of an engine."""
    from kvbelt.vllm.prometheus import BeltStats  # noqa: PLC0415

    figures = [
        Figure("test_sent_bytes", True, "Sent.", {"side": "send"}, sent),
        Figure("test_used_bytes", False, "Used.", {}, used),
    ]
    return BeltStats.of(source, figures).data


def shown(name: str, **labels: str) -> float | None:
    """The value that a scrape returns."""
    return REGISTRY.get_sample_value(name, {"model_name": "demo", "engine": "0", **labels})


def test_ranks_add_up(metrics: Any) -> None:
    """Counters and gauges are sums over the ranks, whichever of them has reported last."""
    metrics.observe(report("rank 0", 100, 5) | report("rank 1", 50, 7), 0)
    metrics.observe(report("rank 0", 130, 6), 0)
    assert shown("test_sent_bytes_total", side="send") == 180
    assert shown("test_used_bytes") == 13


def test_a_report_that_comes_twice_changes_nothing(metrics: Any) -> None:
    """Reports hold totals, not differences."""
    metrics.observe(report("rank 0", 100, 5), 0)
    metrics.observe(report("rank 0", 100, 5), 0)
    assert shown("test_sent_bytes_total", side="send") == 100


def test_reports_of_a_step_are_put_together() -> None:
    """Reports are aggregated as in vLLM, over ranks and steps; vLLM's log line names the counters."""
    from kvbelt.vllm.prometheus import BeltStats  # noqa: PLC0415

    stats = BeltStats(data=report("rank 0", 100, 5)).aggregate(BeltStats(data=report("rank 1", 50, 7)))
    stats = stats.aggregate(BeltStats(data=report("rank 0", 110, 5)))
    assert stats.reduce() == {"test_sent_bytes{send}": 160}
    assert not stats.is_empty()
