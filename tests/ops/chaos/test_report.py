"""The report and the invariants of a run."""

import dataclasses
import json
from collections import Counter

import pytest

from kvbelt.ops.chaos import report
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.ledger import Failure
from kvbelt.ops.chaos.memory import MIB, Growth
from kvbelt.ops.chaos.monitor import UnexpectedExit
from kvbelt.ops.chaos.result import invariants
from kvbelt.ops.chaos.verdict import Outcome, Verdict
from tests.ops.chaos.support import GOOD, RIGHT

FAILURE = Failure(
    Verdict(Outcome.WRONG, "choice 0, token 1: 5 instead of 2"),
    "chaos-17",
    began=12.0,
    seconds=0.4,
    stream=True,
    deadline=20.0,
    route="/v1/completions",
    body={"prompt": "a lantern"},
    given="data: {...}",
    right=RIGHT,
    path="first-token",
    record='{"request_id": "chaos-17"}',
    faults=("stop-prefill of prefill-0",),
    logs={"decode-0": "the last line"},
)


def text(result):
    """The whole report."""
    return "\n".join(report.lines(result))


def test_a_good_run_is_reported_as_one():
    """It has faults with counts and recoveries, answers by kind, and the verdict at the end."""
    told = text(GOOD)
    assert report.held(GOOD)
    assert told.endswith("Every invariant held.")
    (row,) = [line for line in told.splitlines() if line.startswith("| stop-decode ")]
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["2", "1", "2", "0.50", "1.50"]
    for part in ("seed 7", "3 faults", "7,015 requests", "503 unavailable", "6,000 first-token, 1,000 local",
                 "network namespaces need root", "p99 1.10 times", "4,096 bytes", "1 more"):  # fmt: skip
        assert part in told, part


BROKEN = [
    {"outcomes": GOOD.outcomes + Counter({Outcome.WRONG: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.HANG: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.TRUNCATED: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.DROPPED: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.MALFORMED: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.REFUSED: 1})},
    {"outcomes": GOOD.outcomes + Counter({Outcome.INTERNAL: 1})},
    {"outcomes": Counter({Outcome.ERROR: 100})},
    {"holdings": {"decode-0": Holdings("ready", staging_bytes=1)}},
    {"holdings": {"decode-0": Holdings("ready", quarantined_bytes=1)}},
    {"holdings": {"decode-0": Holdings("ready", blocks=1)}},
    {"holdings": {"decode-0": Holdings("ready", transfers=1)}},
    {"holdings": {"decode-0": Holdings("silent")}},
    {"growths": (Growth("proxy", 1, 900.0, 40 * MIB, 50 * MIB, 500 * MIB),)},
    {"deaths": (UnexpectedExit("decode-0", "Traceback"),)},
    {"idle": ("decode-0",)},
    {"not_back": {"decode-0": "not ready after 60 s"}},
]


@pytest.mark.parametrize("change", BROKEN)
def test_each_invariant_can_break(change):
    """Exactly one invariant breaks, and the verdict says so."""
    result = dataclasses.replace(GOOD, **change)
    assert sum(not invariant.held for invariant in invariants(result)) == 1
    assert not report.held(result)
    assert text(result).endswith("of 12 invariants did not hold.")


def test_a_failure_is_reported_with_its_context():
    """It has seed, request, both answers, the proxy's record, the faults and the logs."""
    told = text(dataclasses.replace(GOOD, failures=(FAILURE,)))
    for part in ("wrong answer: choice 0, token 1: 5 instead of 2", "chaos-17 of seed 7", '{"prompt":"a lantern"}',
                 "token_ids=((1, 2, 3),)", "data: {...}", '{"request_id": "chaos-17"}', "stop-prefill of prefill-0",
                 "the last line"):  # fmt: skip
        assert part in told, part


def test_the_same_as_json():
    """The JSON has the verdict, the invariants and all findings."""
    body = json.loads(report.as_json(dataclasses.replace(GOOD, failures=(FAILURE,))))
    assert body["held"] is True
    assert [invariant["found"] for invariant in body["invariants"]][-1] == 7000
    assert body["result"]["injected"][0]["injection"]["kind"]["name"] == "stop-decode"
    assert body["result"]["failures"][0]["record"] == '{"request_id": "chaos-17"}'


def test_what_is_not_known_is_left_out():
    """Without own processes there is no memory, effect or exit to report; an interrupted run says so."""
    told = text(dataclasses.replace(GOOD, effect=None, growths=(), interrupted=True))
    assert "p99" not in told
    assert "resident" not in told
    assert "interrupted" in told
