"""The page about failures agrees with the code."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from tools.draw_failures import WELL, page
from tools.failures import GROUPS, Failure

from kvbelt.belt_metrics import belt_families
from kvbelt.proxy.observe.metrics import Metrics
from kvbelt.proxy.request.plan import TABLE
from kvbelt.proxy.request.steps import Outcome
from kvbelt.routing.pairs import Pairs
from kvbelt.wire.reasons import REASONS, Where
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.transfer.belts import Side

ROOT = Path(__file__).parents[2]
FAILURES = [failure for failures in GROUPS.values() for failure in failures]
REGISTERED = {reason.name for reason in REASONS}


def exported():
    """Names of metrics of the proxy and of a worker's belt."""
    text = Metrics(lambda: (), Pairs()).text().decode()
    with Side("p", "prefill", MemoryChannel("p", MemoryNetwork())) as side:
        families = list(belt_families(side.belt.snapshot()))
    belt = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)) | belt


def test_the_page_is_what_is_drawn():
    """``python -m tools.draw_failures docs/failures.md`` changes nothing."""
    assert (ROOT / "docs" / "failures.md").read_text(encoding="utf-8") == page()


def test_every_reason_is_explained_on_the_page():
    """The page has each reason's meaning."""
    drawn = page()
    for reason in REASONS:
        assert f"| `{reason.name}` | {reason.meaning}" in drawn


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.title)
def test_a_failure_is_shown_by_a_test(failure: Failure) -> None:
    """The test can be imported, and the failure's reasons are registered."""
    file, _, name = failure.shown_by.partition("::")
    assert Path(file).name.startswith("test_")
    assert name.startswith("test_")
    module = importlib.import_module(f"tests.{file.removesuffix('.py').replace('/', '.')}")
    assert inspect.isfunction(getattr(module, name))
    assert set(failure.reasons) <= REGISTERED


def test_every_failure_that_the_plan_knows_is_on_the_page() -> None:
    """Each outcome of a failed step has its section."""
    named = {outcome for failure in FAILURES for outcome in failure.outcomes}
    assert named == set(Outcome) - WELL
    drawn = page()
    for outcome in named:
        assert f"### After: {outcome}\n" in drawn
    met = {outcome for moves in TABLE.values() for outcome in moves}
    assert met == set(Outcome)


def test_every_metric_of_a_row_is_exported():
    """The proxy or a worker exports it."""
    names = exported()
    for failure in FAILURES:
        assert failure.metrics
        assert set(failure.metrics) <= names, failure


def test_every_reason_of_a_failed_attempt_or_an_error_is_in_a_row():
    """A user who sees such a reason finds its case."""
    in_rows = {name for failure in FAILURES for name in failure.reasons}
    missing = {
        reason.name for reason in REASONS if reason.where & (Where.PREFILL | Where.DECODE | Where.ERROR)
    } - in_rows
    assert missing == {"kv_lost"}  # the decode worker did not give the cause
