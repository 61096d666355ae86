"""The page about failures says what the code does."""

import re
from pathlib import Path

import pytest

from kvbelt.belt_metrics import belt_families
from kvbelt.ops.draw_failures import page
from kvbelt.ops.failures import GROUPS
from kvbelt.proxy.metrics import Metrics
from kvbelt.routing.pairs import Pairs
from kvbelt.wire.reasons import REASONS, Where
from tests.transfer.belts import Side
from tests.worker.test_peers import MemoryChannel, MemoryNetwork

ROOT = Path(__file__).parents[2]
FAILURES = [failure for group in GROUPS for failure in group.failures]
REGISTERED = {reason.name for reason in REASONS}


def exported():
    """Names of metrics, of the proxy and of a worker's belt."""
    text = Metrics(lambda: (), Pairs()).text().decode()
    with Side("p", "prefill", MemoryChannel("p", MemoryNetwork())) as side:
        families = list(belt_families(side.belt.snapshot()))
    belt = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)) | belt


def test_the_page_is_what_is_drawn():
    """To the letter; python -m kvbelt.ops.draw_failures docs/failures.md draws it anew."""
    assert (ROOT / "docs" / "failures.md").read_text(encoding="utf-8") == page()


def test_every_reason_is_explained_on_the_page():
    """With its meaning."""
    drawn = page()
    for reason in REASONS:
        assert f"| `{reason.name}` | {reason.meaning}" in drawn


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.cause[:30]}, {failure.phase[:30]}")
def test_a_row_is_shown_by_a_test_that_exists(failure):
    """And its reasons are registered."""
    file, _, test = failure.shown_by.partition("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE)
    assert set(failure.reasons) <= REGISTERED


def test_every_metric_of_a_row_is_exported():
    """By the proxy or by a worker."""
    names = exported()
    for failure in FAILURES:
        assert failure.metrics
        assert set(failure.metrics) <= names, failure


def test_every_reason_of_a_failed_leg_or_an_error_is_in_a_row():
    """Whoever meets one finds the case."""
    in_rows = {name for failure in FAILURES for name in failure.reasons}
    missing = {
        reason.name for reason in REASONS if reason.where & (Where.PREFILL | Where.DECODE | Where.ERROR)
    } - in_rows
    assert missing == {"stale_connection", "kv_lost"}  # neither is a cause: see their meaning
